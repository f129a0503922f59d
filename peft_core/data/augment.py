"""Reformat part of the training examples: as fill-in-the-middle (FIM) or as an instruction with its answer.

In: an example in plain format, the `TaskMixture` (fractions of the examples, 0 to 1), and a seed. Out: the example and its
format. The format is random, but the same for the same example and seed. Held-out examples are never reformatted, so that
results of different mixtures compare. An example that does not suit its format (no docstring, or too long) stays plain.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

from peft_core.data.examples import RESERVED_TOKENS
from peft_core.data.grammars import Grammar
from peft_core.data.languages import language_named
from peft_core.data.records import RECORD
from peft_core.data.syntax import parse_syntax
from peft_core.data.token_counter import TokenCounter
from peft_core.errors import DataError
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Example, Segment
from peft_core.schemas.training import TaskMixture

if TYPE_CHECKING:
    from tree_sitter import Node


_MIN_GAP_BYTES = 12  # a shorter gap is a name, which an editor completes
_MAX_GAP_SHARE = 0.5  # share of the unit
_MIN_DOCSTRING_WORDS = 4  # a shorter docstring does not say what to write
# A method is indented; after this line it parses as a method.
_METHOD_WRAPPER = b"class _:\n"
_COMMENT_MARKS = re.compile(r"^\s*(/\*+|\*+/|\*|//+!?|#+|--+)\s?|\s*\*+/\s*$", re.MULTILINE)
_QUOTES = re.compile(r"^[A-Za-z]*(\"\"\"|'''|\"|')(.*)\1$", re.DOTALL)


class ExampleFormat(StrEnum):
    """How an example presents its code unit."""

    PLAIN = "plainly"
    FILL_IN_THE_MIDDLE = "fill_in_the_middle"
    INSTRUCTION = "instruction"


def require_fim_tokens(mixture: TaskMixture, token_counter: TokenCounter) -> None:
    """Check that the base model supports what the mixture asks for.

    Raises:
        DataError: 'no_fill_in_the_middle'.
    """
    if mixture.fill_in_the_middle and token_counter.fill_in_the_middle is None:
        raise DataError(
            f"mixture.fill_in_the_middle = {mixture.fill_in_the_middle:g} needs a base model with fill-in-the-middle tokens, "
            "and the vocabulary of this one has none that are known.",
            code="no_fill_in_the_middle",
            suggestions=[
                "Set mixture.fill_in_the_middle to 0",
                "Or train on a base for code completion, such as Qwen2.5-Coder or StarCoder2",
            ],
        )


def reformat_example(
    example: Example, mixture: TaskMixture, token_counter: TokenCounter, *, max_length: int, seed: int
) -> tuple[Example, ExampleFormat]:
    """Return the example in the format that is drawn for it, and that format."""
    rng = random.Random(f"retell/{seed}/{example.path}/{example.start_line}/{example.segments[-1].text}")  # noqa: S311 -- not a secret
    drawn = _draw_format(example, mixture, rng.random())
    segments = None
    if drawn is ExampleFormat.FILL_IN_THE_MIDDLE:
        segments = _fim_segments(example, token_counter, rng)
    elif drawn is ExampleFormat.INSTRUCTION:
        segments = _instruction_segments(example, token_counter)
    if segments is None:
        return example, ExampleFormat.PLAIN
    tokens = sum(token_counter.count([segment.text for segment in segments])) + 1
    if tokens + RESERVED_TOKENS - 1 > max_length:
        return example, ExampleFormat.PLAIN
    # Both formats end: the gap where its suffix continues, the answer with the unit.
    return example.model_copy(update={"segments": segments, "tokens": tokens, "ends": True}), drawn


def _draw_format(example: Example, mixture: TaskMixture, number: float) -> ExampleFormat:
    """Return the format for a random number between 0 and 1. Records keep the format in which they were given."""
    if example.kind == RECORD or not example.segments[-1].learn:
        return ExampleFormat.PLAIN
    if number < mixture.fill_in_the_middle:
        return ExampleFormat.FILL_IN_THE_MIDDLE
    if number < mixture.fill_in_the_middle + mixture.instructions:
        return ExampleFormat.INSTRUCTION
    return ExampleFormat.PLAIN


def _fim_segments(example: Example, token_counter: TokenCounter, rng: random.Random) -> tuple[Segment, ...] | None:
    """Return prefix, suffix and gap in the order in which the base model reads them. The gap is a node of the syntax tree.

    As in Gong et al., arXiv 2506.00204, and unlike gaps at random characters: people complete an expression, a statement or a
    block.
    """
    tokens, *context, body = token_counter.fill_in_the_middle, *example.segments
    root, offset = _parse_body(example)
    if tokens is None or root is None:
        return None
    raw = body.text.encode()
    gap = _choose_gap(root, offset, len(raw), rng)
    if gap is None:
        return None
    before, middle, after = (part.decode() for part in (raw[: gap.start], raw[gap.start : gap.stop], raw[gap.stop :]))
    prefix = (Segment(text=tokens.prefix, learn=False), *context, *_segments(before, body))
    suffix = (Segment(text=tokens.suffix, learn=False), *_segments(after, body))
    with_middle = (*prefix, *suffix, Segment(text=tokens.middle, learn=False))
    prompt = with_middle if tokens.middle else (*suffix, *prefix)
    return (*prompt, *_segments(middle, body), *_segments(tokens.end))


def _choose_gap(root: Node, offset: int, size: int, rng: random.Random) -> range | None:
    """Return the bytes of a random node, weighted by length; None if no node has a suitable length."""
    spans = [range(node.start_byte - offset, node.end_byte - offset) for node in _nodes(root) if node.named_child_count]
    spans = [
        span
        for span in spans
        if span.start >= 0 and span.stop <= size and _MIN_GAP_BYTES <= len(span) <= _MAX_GAP_SHARE * size
    ]
    return rng.choices(spans, weights=[len(span) for span in spans])[0] if spans else None


def _instruction_segments(example: Example, token_counter: TokenCounter) -> tuple[Segment, ...] | None:
    """Return a conversation in the base model's chat template: the docstring asks for the unit, and the answer is learned."""
    grammar = language_named(example.language).grammar
    root, offset = _parse_body(example)
    if root is None or grammar is None or not example.ends:
        return None
    definition = _only_definition(root, offset, grammar)
    name = None if definition is None else definition.child_by_field_name("name")
    if definition is None or name is None or name.text is None:
        return None
    docstring = _docstring(definition) if example.language == "python" else _leading_comment(definition, grammar)
    if len(docstring.split()) < _MIN_DOCSTRING_WORDS:
        return None
    kind = "class" if definition.type in grammar.classes else "function"
    kind = "method" if example.kind == "method" and kind == "function" else kind
    instruction = f"Write the {example.language} {kind} `{name.text.decode()}` of {example.path}.\n\n{docstring}"
    body = example.segments[-1].text.rstrip("\n")
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": body}]
    (rendered,) = token_counter.render_chat(Conversation.learning_every_answer(messages))
    return _mark_literal(rendered, instruction, body) if example.segments[-1].literal else rendered


def _parse_body(example: Example) -> tuple[Node | None, int]:
    """Return the syntax tree of the learned text, and the byte offset at which that text begins in what was parsed."""
    grammar, text = language_named(example.language).grammar, example.segments[-1].text
    if grammar is None:
        return None, 0
    wrapper = _METHOD_WRAPPER if example.language == "python" and text[:1] in (" ", "\t") else b""
    return parse_syntax(wrapper + text.encode(), grammar), len(wrapper)


def _nodes(root: Node) -> Iterator[Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.named_children))


def _only_definition(root: Node, start: int, grammar: Grammar) -> Node | None:
    """Return the definition of a unit that is nothing but one definition with its comments; otherwise None."""
    definition_types = grammar.functions | grammar.methods | grammar.classes
    definition = next(
        (node for node in _nodes(root) if node.start_byte >= start and node.type in definition_types), None
    )
    if definition is None:
        return None
    outermost = _with_wrappers(definition, grammar)
    siblings = root if not start else root.named_children[0].child_by_field_name("body")  # the wrapper of a method
    if siblings is None or outermost.parent != siblings or (start and root.named_child_count > 1):
        return None
    others = [node for node in siblings.named_children if node != outermost]
    leads = all(node.type in grammar.leads and node.end_byte <= outermost.start_byte for node in others)
    return definition if leads else None


def _with_wrappers(definition: Node, grammar: Grammar) -> Node:
    """Return a definition together with `export`, `const name =` or the decorators around it."""
    while definition.parent is not None and definition.parent.type in grammar.wrappers:
        definition = definition.parent
    return definition


def _docstring(definition: Node) -> str:
    body = definition.child_by_field_name("body")
    first = None if body is None else next(iter(body.named_children), None)
    text = (
        next(iter(first.named_children), None) if first is not None and first.type == "expression_statement" else None
    )
    if text is None or text.type != "string" or text.text is None:
        return ""
    quoted = _QUOTES.match(text.text.decode())
    return inspect.cleandoc(quoted[2]) if quoted else ""


def _leading_comment(definition: Node, grammar: Grammar) -> str:
    lines = list[str]()
    before = _with_wrappers(definition, grammar).prev_named_sibling
    while before is not None and "comment" in before.type and before.text is not None:
        lines.insert(0, before.text.decode())
        before = before.prev_named_sibling
    return inspect.cleandoc(_COMMENT_MARKS.sub("", "\n".join(lines)))


def _mark_literal(rendered: tuple[Segment, ...], instruction: str, body: str) -> tuple[Segment, ...] | None:
    """Separate the given texts from those of the template, so that they cannot add special tokens to it.

    Returns None if the template changed the texts.
    """
    if len(rendered) != 2 or instruction not in rendered[0].text or body not in rendered[1].text:
        return None
    segments: list[Segment] = []
    for segment, text in zip(rendered, (instruction, body), strict=True):
        before, _, after = segment.text.partition(text)
        parts = (Segment(text=before), Segment(text=text, literal=True), Segment(text=after))
        segments += [part.model_copy(update={"learn": segment.learn}) for part in parts if part.text]
    return tuple(segments)


def _segments(text: str, like: Segment | None = None) -> tuple[Segment, ...]:
    return (Segment(text=text, literal=like is not None and like.literal),) if text else ()
