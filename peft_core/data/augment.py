"""Other ways to tell a unit of code, in place of the plain one: as a gap to fill in, or as the answer to its docstring.

What is held out is always told plainly, so that figures of different mixtures compare. A unit that does not lend itself to
what was drawn for it (no docstring, too long told that way) stays plain.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

from peft_core.data.chunking import parse_syntax
from peft_core.data.examples import RESERVED_TOKENS
from peft_core.data.languages import Grammar, language_named
from peft_core.data.records import RECORD
from peft_core.data.token_counter import TokenCounter
from peft_core.errors import DataError
from peft_core.schemas.dataset import Example, Segment
from peft_core.schemas.training import TaskMixture

if TYPE_CHECKING:
    from tree_sitter import Node


_LEAST_BYTES = 12  # of a gap: less is a name, which the editor completes
_MOST_SHARE = 0.5  # of the unit that may be the gap
_LEAST_WORDS = 4  # of a docstring that says what to write
# A method begins indented; behind this it parses as one.
_AROUND_METHODS = b"class _:\n"
_COMMENT_MARKS = re.compile(r"^\s*(/\*+|\*+/|\*|//+!?|#+|--+)\s?|\s*\*+/\s*$", re.MULTILINE)
_QUOTES = re.compile(r"^[A-Za-z]*(\"\"\"|'''|\"|')(.*)\1$", re.DOTALL)


class ExampleFormat(StrEnum):
    """How an example tells its unit."""

    PLAIN = "plainly"
    FILL_IN_THE_MIDDLE = "fill_in_the_middle"
    INSTRUCTION = "instruction"


def require_fim_tokens(mixture: TaskMixture, token_counter: TokenCounter) -> None:
    """That the base can be told what is asked for.

    Raises:
        DataError: 'no_fill_in_the_middle'.
    """
    if mixture.fill_in_the_middle and token_counter.fill_in_the_middle is None:
        raise DataError(
            f"mixture.fill_in_the_middle = {mixture.fill_in_the_middle:g} needs a base with tokens for it, and this base's "
            "vocabulary has none of a form that is known here.",
            code="no_fill_in_the_middle",
            suggestions=[
                "Set mixture.fill_in_the_middle to 0",
                "Or train on a base for code completion, such as Qwen2.5-Coder or StarCoder2",
            ],
        )


def reformat_example(
    example: Example,
    mixture: TaskMixture,
    token_counter: TokenCounter,
    *,
    max_length: int,
    seed: int,
) -> tuple[Example, ExampleFormat]:
    """The example, told as the lot drawn for it says. The same example and seed are always told in the same way."""
    lot = random.Random(f"retell/{seed}/{example.path}/{example.start_line}/{example.segments[-1].text}")  # noqa: S311 -- not a secret
    chance = lot.random()
    told, segments = ExampleFormat.PLAIN, None
    if example.kind == RECORD or not example.segments[-1].learn:
        pass  # somebody else decided how it is told
    elif chance < mixture.fill_in_the_middle:
        told, segments = ExampleFormat.FILL_IN_THE_MIDDLE, _gap(example, token_counter, lot)
    elif chance < mixture.fill_in_the_middle + mixture.instructions:
        told, segments = ExampleFormat.INSTRUCTION, _answer(example, token_counter)
    if segments is None:
        return example, ExampleFormat.PLAIN
    tokens = sum(token_counter.count([segment.text for segment in segments])) + 1
    if tokens + RESERVED_TOKENS - 1 > max_length:
        return example, ExampleFormat.PLAIN
    # A gap ends where its unit goes on, and a whole unit is answered.
    return example.model_copy(update={"segments": segments, "tokens": tokens, "ends": True}), told


def _gap(example: Example, token_counter: TokenCounter, lot: random.Random) -> tuple[Segment, ...] | None:
    """Before, after and gap in the order in which the base reads them. The gap is a node of the syntax tree.

    As in Gong et al., arXiv 2506.00204, and unlike gaps at random characters: what people leave out is an expression, a
    statement, a block.
    """
    tokens, *context, body = token_counter.fill_in_the_middle, *example.segments
    root, start = _tree(example)
    if tokens is None or root is None:
        return None
    raw = body.text.encode()
    spans = [(node.start_byte - start, node.end_byte - start) for node in _nodes(root) if node.named_child_count]
    spans = [(a, b) for a, b in spans if a >= 0 and b <= len(raw) and _LEAST_BYTES <= b - a <= _MOST_SHARE * len(raw)]
    if not spans:
        return None
    ((first, last),) = lot.choices(spans, weights=[b - a for a, b in spans])
    before, gap, after = (part.decode() for part in (raw[:first], raw[first:last], raw[last:]))
    above = (Segment(text=tokens.prefix, learn=False), *context, *_segments(before, body))
    below = (Segment(text=tokens.suffix, learn=False), *_segments(after, body))
    around = (*above, *below, Segment(text=tokens.middle, learn=False)) if tokens.middle else (*below, *above)
    return (*around, *_segments(gap, body), *_segments(tokens.end))


def _answer(example: Example, token_counter: TokenCounter) -> tuple[Segment, ...] | None:
    """A conversation in the base's own template: what is to be written, and the unit. Only the answer is learned."""
    grammar = language_named(example.language).grammar
    root, start = _tree(example)
    if root is None or grammar is None or not example.ends:
        return None
    definition = _only_definition(root, start, grammar)
    name = None if definition is None else definition.child_by_field_name("name")
    if definition is None or name is None or name.text is None:
        return None
    words = _docstring(definition) if example.language == "python" else _leading_comment(definition, grammar)
    if len(words.split()) < _LEAST_WORDS:
        return None
    kind = "class" if definition.type in grammar.classes else "function"
    kind = "method" if example.kind == "method" and kind == "function" else kind
    asked = f"Write the {example.language} {kind} `{name.text.decode()}` of {example.path}.\n\n{words}"
    body = example.segments[-1].text.rstrip("\n")
    said = token_counter.render_chat([{"role": "user", "content": asked}, {"role": "assistant", "content": body}])
    return _apart(said, asked, body) if example.segments[-1].literal else said


def _tree(example: Example) -> tuple[Node | None, int]:
    """The syntax of what is learned, and at which byte of what was parsed that begins."""
    grammar, text = language_named(example.language).grammar, example.segments[-1].text
    if grammar is None:
        return None, 0
    around = _AROUND_METHODS if example.language == "python" and text[:1] in (" ", "\t") else b""
    return parse_syntax(around + text.encode(), grammar), len(around)


def _nodes(root: Node) -> Iterator[Node]:
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(node.named_children))


def _only_definition(root: Node, start: int, grammar: Grammar) -> Node | None:
    """The definition that a unit is, with what leads to it. None where more was joined to it: nobody asked for that."""
    meant = grammar.functions | grammar.methods | grammar.classes
    definition = next((node for node in _nodes(root) if node.start_byte >= start and node.type in meant), None)
    if definition is None:
        return None
    outermost = _wrapped(definition, grammar)
    place = root if not start else root.named_children[0].child_by_field_name("body")  # of what methods are parsed in
    if place is None or outermost.parent != place or (start and root.named_child_count > 1):
        return None
    others = [node for node in place.named_children if node != outermost]
    leads = all(node.type in grammar.leads and node.end_byte <= outermost.start_byte for node in others)
    return definition if leads else None


def _wrapped(definition: Node, grammar: Grammar) -> Node:
    """With `export`, `const name =` or the decorators around it."""
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
    before = _wrapped(definition, grammar).prev_named_sibling
    while before is not None and "comment" in before.type and before.text is not None:
        lines.insert(0, before.text.decode())
        before = before.prev_named_sibling
    return inspect.cleandoc(_COMMENT_MARKS.sub("", "\n".join(lines)))


def _apart(said: tuple[Segment, ...], asked: str, body: str) -> tuple[Segment, ...] | None:
    """The words of the code apart from those of the template, whose special tokens they must not add to."""
    if len(said) != 2 or asked not in said[0].text or body not in said[1].text:
        return None  # the template rewrote them
    found: list[Segment] = []
    for segment, words in zip(said, (asked, body), strict=True):
        before, _, after = segment.text.partition(words)
        parts = (Segment(text=before), Segment(text=words, literal=True), Segment(text=after))
        found += [part.model_copy(update={"learn": segment.learn}) for part in parts if part.text]
    return tuple(found)


def _segments(text: str, like: Segment | None = None) -> tuple[Segment, ...]:
    return (Segment(text=text, literal=like is not None and like.literal),) if text else ()
