"""Tests of FIM and instruction examples: no code is lost, and held-out examples stay plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.base_models.families import FIM_TOKENS
from peft_core.data.augment import ExampleFormat, reformat_example, require_fim_tokens
from peft_core.data.dataset import read_examples
from peft_core.data.examples import learned_text
from peft_core.data.leakage import TrainingFingerprint
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Example, FillInTheMiddle, Segment
from peft_core.schemas.training import TaskMixture
from tests.factories import make_dataset_spec
from tests.unit.data.test_prepare import Words, repository

FIM_ONLY, INSTRUCTIONS_ONLY = TaskMixture(fill_in_the_middle=1), TaskMixture(instructions=1)
FUNCTION = '''def load(path, strict):
    """Read a configuration file from the given path."""
    values = parse(path.read_text(), comments=True)
    if strict and values.unknown:
        raise ValueError(f"unknown: {values.unknown}")
    return values
'''
METHOD = "".join(f"    {line}" for line in FUNCTION.splitlines(keepends=True))
JAVASCRIPT = """/**
 * Adds up the prices of a whole basket.
 */
export function total(basket) {
  return basket.items.reduce((sum, item) => sum + item.price * item.count, 0);
}
"""


def example_of(text: str, *, language: str = "python", kind: str = "function", context: str = "# a/b.py\n") -> Example:
    header = (Segment(text=context, learn=False),) if context else ()
    return Example(segments=(*header, Segment(text=text)), path="a/b.py", language=language, kind=kind, start_line=7)


def reformatted(
    example: Example, mixture: TaskMixture, *, seed: int = 0, max_length: int = 512
) -> tuple[Example, ExampleFormat]:
    return reformat_example(example, mixture, EstimatedTokenCounter(), max_length=max_length, seed=seed)


def original_text(example: Example, tokens: FillInTheMiddle) -> str:
    """Return the plain text of a FIM example."""
    if not tokens.middle:
        suffix, rest = example.text.removeprefix(tokens.suffix).split(tokens.prefix)
        return rest + suffix
    prefix, rest = example.text.removeprefix(tokens.prefix).split(tokens.suffix)
    suffix, middle = rest.split(tokens.middle)
    return prefix + middle.removesuffix(tokens.end) + suffix


@pytest.mark.parametrize("tokens", FIM_TOKENS)
@pytest.mark.parametrize("code", [FUNCTION, METHOD])
@given(seed=st.integers(0, 1000))
def test_prefix_gap_and_suffix_add_up_to_the_unit_in_every_fim_format(
    tokens: FillInTheMiddle, code: str, seed: int
) -> None:
    class Coder(EstimatedTokenCounter):
        fill_in_the_middle = tokens

    result, chosen_format = reformat_example(example_of(code), FIM_ONLY, Coder(), max_length=512, seed=seed)
    assert chosen_format is ExampleFormat.FILL_IN_THE_MIDDLE
    assert original_text(result, tokens) == "# a/b.py\n" + code
    marks = [segment for segment in result.segments if segment.text in (tokens.prefix, tokens.suffix, tokens.middle)]
    order = [tokens.prefix, tokens.suffix, tokens.middle] if tokens.middle else [tokens.suffix, tokens.prefix]
    assert [mark.text for mark in marks] == order
    assert not any(mark.learn for mark in marks)
    gap, *end = result.segments[-2:] if tokens.end else result.segments[-1:]
    assert [segment.text for segment in end] == ([tokens.end] if tokens.end else [])
    assert all(segment.learn for segment in (gap, *end))
    assert 12 <= len(gap.text) <= len(code) / 2


def test_a_fingerprint_recognises_units_that_were_trained_on_as_fim(tmp_path: Path) -> None:
    class Coder(Words):
        fill_in_the_middle = FIM_TOKENS[0]

    result = prepare(
        make_dataset_spec(repository(tmp_path / "code", files=10, functions=20), max_length=256, mixture=FIM_ONLY),
        directory=tmp_path / "out",
        token_counter=Coder(),
        report=lambda _: None,
    )
    assert result.summary.told["fill_in_the_middle"] > result.summary.train_examples / 2
    plain_dataset = prepare(
        make_dataset_spec(tmp_path / "code", max_length=256),
        directory=tmp_path / "plain",
        token_counter=Coder(),
        report=lambda _: None,
    )
    known = TrainingFingerprint.from_bytes((tmp_path / "out" / "trained_on.bin").read_bytes())
    assert known is not None
    assert plain_dataset.summary.told.keys() == {"plainly"}
    assert {known.share_of(learned_text(example)) for example in read_examples(tmp_path / "plain" / "train.jsonl")} == {
        1.0
    }


def test_a_fim_example_has_an_end_token_and_a_part_of_a_unit_is_never_an_answer() -> None:
    part = example_of(FUNCTION).model_copy(update={"ends": False})
    gap, chosen_format = reformatted(part, FIM_ONLY)
    assert (chosen_format, gap.ends) == (ExampleFormat.FILL_IN_THE_MIDDLE, True)
    assert reformatted(part, INSTRUCTIONS_ONLY) == (part, ExampleFormat.PLAIN)


@given(st.text(max_size=300), st.sampled_from(["python", "javascript", "c", "text"]), st.integers(0, 99))
def test_reformatting_keeps_all_of_a_text_or_leaves_it_plain(text: str, language: str, seed: int) -> None:
    plain = example_of(text or "x", language=language)
    result, chosen_format = reformatted(plain, FIM_ONLY, seed=seed)
    if chosen_format is ExampleFormat.PLAIN:
        assert result == plain
    else:
        learned = [segment.text for segment in result.segments if segment.learn]
        assert sorted("".join(learned)) == sorted(plain.segments[-1].text)


def test_gaps_are_syntax_nodes_and_differ_between_seeds() -> None:
    gaps = {reformatted(example_of(FUNCTION), FIM_ONLY, seed=seed)[0].segments[-1].text for seed in range(60)}
    assert "return values" in gaps
    assert len(gaps) > 5
    for gap in gaps:
        assert gap.count("(") == gap.count(")")
    assert reformatted(example_of(FUNCTION), FIM_ONLY, seed=3) == reformatted(example_of(FUNCTION), FIM_ONLY, seed=3)


@pytest.mark.parametrize(
    ("code", "language", "kind", "expected_question"),
    [
        (FUNCTION, "python", "function", "Write the python function `load` of a/b.py.\n\nRead a configuration file"),
        (METHOD, "python", "method", "Write the python method `load` of a/b.py.\n\nRead a configuration file"),
        (
            JAVASCRIPT,
            "javascript",
            "function",
            "Write the javascript function `total` of a/b.py.\n\nAdds up the prices",
        ),
    ],
)
def test_an_instruction_asks_with_the_docstring_and_answers_with_the_unit(
    code: str, language: str, kind: str, expected_question: str
) -> None:
    result, chosen_format = reformatted(example_of(code, language=language, kind=kind), INSTRUCTIONS_ONLY)
    assert chosen_format is ExampleFormat.INSTRUCTION
    question, answer = result.segments
    assert question.text.startswith(expected_question)
    assert not question.learn
    assert answer == Segment(text=code.rstrip("\n"))


OTHERS = {"python": "def other(a):\n    return a + 1\n", "javascript": "function other(a) {\n  return a + 1;\n}\n"}


@pytest.mark.parametrize(
    ("code", "language"),
    [(FUNCTION, "python"), (METHOD, "python"), (JAVASCRIPT, "javascript")],
    ids=["py", "method", "js"],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_unit_with_more_than_one_definition_is_never_an_answer(code: str, language: str, *, before: bool) -> None:
    indent = "    " if code.startswith(" ") else ""
    other = "".join(f"{indent}{line}" for line in OTHERS[language].splitlines(keepends=True))
    joined = example_of(f"{other}\n{code}" if before else f"{code}\n{other}", language=language)
    assert reformatted(joined, INSTRUCTIONS_ONLY) == (joined, ExampleFormat.PLAIN)
    loose = example_of(f"{code}{indent}limit = 3\n", language=language)
    assert reformatted(loose, INSTRUCTIONS_ONLY) == (loose, ExampleFormat.PLAIN)


@pytest.mark.parametrize("prefix", ["@cache\n", "# How it is read.\n", "@cache\n@other(1)\n"])
@pytest.mark.parametrize("indent", ["", "    "])
def test_comments_and_decorators_belong_to_their_definition(prefix: str, indent: str) -> None:
    code = "".join(f"{indent}{line}" for line in (prefix + FUNCTION).splitlines(keepends=True))
    result, chosen_format = reformatted(example_of(code), INSTRUCTIONS_ONLY)
    assert chosen_format is ExampleFormat.INSTRUCTION
    assert result.segments[-1].text == code.rstrip("\n")


@pytest.mark.parametrize(
    "example",
    [
        example_of("def add(a, b):\n    return a + b\n"),
        example_of('def add(a, b):\n    "Adds."\n    return a + b\n'),
        example_of("some words that are not code\n", language="text"),
        example_of(FUNCTION, kind="record"),
    ],
    ids=["no docstring", "one word", "not code", "a record"],
)
def test_a_unit_without_a_docstring_stays_plain(example: Example) -> None:
    assert reformatted(example, INSTRUCTIONS_ONLY) == (example, ExampleFormat.PLAIN)


@pytest.mark.parametrize("mixture", [FIM_ONLY, INSTRUCTIONS_ONLY])
def test_an_example_that_would_become_too_long_stays_plain(mixture: TaskMixture) -> None:
    result, chosen_format = reformatted(example_of(FUNCTION), mixture)
    assert chosen_format is not ExampleFormat.PLAIN
    assert (
        reformatted(example_of(FUNCTION), mixture, max_length=result.tokens + 1)[1] is chosen_format
    )  # one more for the token that begins a text
    assert reformatted(example_of(FUNCTION), mixture, max_length=result.tokens)[1] is ExampleFormat.PLAIN


class Template(EstimatedTokenCounter):
    """Renders conversations as Qwen's template does."""

    has_chat_template = True

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        question, answer = (message["content"] for message in conversation.messages)
        prompt = Segment(text=f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", learn=False)
        return ((prompt, Segment(text=f"{answer}<|im_end|>")),)


@pytest.mark.parametrize("mixture", [FIM_ONLY, INSTRUCTIONS_ONLY])
@given(seed=st.integers(0, 50))
def test_only_template_marks_become_special_tokens_and_code_never_does(mixture: TaskMixture, seed: int) -> None:
    token_counter = Template()
    spelled = " ".join([*token_counter.fill_in_the_middle[:3], "<|im_start|>", "<|im_end|>"])
    code = FUNCTION.replace("unknown: ", spelled).replace("Read a", f"{spelled} Read a")
    plain = example_of(code)
    plain = plain.model_copy(update={"segments": tuple(s.model_copy(update={"literal": True}) for s in plain.segments)})
    result, chosen_format = reformat_example(plain, mixture, token_counter, max_length=512, seed=seed)
    assert chosen_format is not ExampleFormat.PLAIN
    marks = [segment.text for segment in result.segments if not segment.literal]
    if chosen_format is ExampleFormat.FILL_IN_THE_MIDDLE:
        assert marks == [*token_counter.fill_in_the_middle[:3]]
    else:
        assert marks == ["<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"]
        assert "".join(s.text for s in result.segments if s.learn) == code.rstrip("\n") + "<|im_end|>"


def test_an_example_stays_plain_if_the_template_rewrites_its_text() -> None:
    class Shouting(EstimatedTokenCounter):
        has_chat_template = True

        def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
            return (tuple(Segment(text=message["content"].upper()) for message in conversation.messages),)

    plain = Example(segments=(Segment(text=FUNCTION, literal=True),), path="a.py", language="python", kind="function")
    assert reformat_example(plain, INSTRUCTIONS_ONLY, Shouting(), max_length=512, seed=0) == (
        plain,
        ExampleFormat.PLAIN,
    )


def test_the_formats_have_the_requested_shares() -> None:
    mixture = TaskMixture(fill_in_the_middle=0.5, instructions=0.25)
    chosen_formats = [reformatted(example_of(FUNCTION.replace("load", f"load_{n}")), mixture)[1] for n in range(400)]
    assert chosen_formats.count(ExampleFormat.FILL_IN_THE_MIDDLE) == pytest.approx(200, abs=40)
    assert chosen_formats.count(ExampleFormat.INSTRUCTION) == pytest.approx(100, abs=40)


def test_fim_is_refused_for_a_base_model_without_fim_tokens() -> None:
    require_fim_tokens(INSTRUCTIONS_ONLY, Words())
    with pytest.raises(
        DataError, match="fill_in_the_middle = 1 needs a base model with fill-in-the-middle tokens"
    ) as caught:
        require_fim_tokens(FIM_ONLY, Words())
    assert caught.value.code == "no_fill_in_the_middle"
    assert "Qwen2.5-Coder" in caught.value.suggestions[1]


def test_shares_that_exceed_one_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at most 1"):
        TaskMixture(fill_in_the_middle=0.7, instructions=0.4)


def test_a_dataset_counts_its_formats_and_holds_out_only_plain_text(tmp_path: Path) -> None:
    source = repository(tmp_path / "source")

    def summary_of(name: str, mixture: TaskMixture) -> dict[str, Any]:
        result = prepare(
            make_dataset_spec(source, max_length=256, mixture=mixture),
            directory=tmp_path / name,
            token_counter=EstimatedTokenCounter(),
            report=lambda _detail: None,
        )
        return result.summary.model_dump()

    plain, half = summary_of("plain", TaskMixture()), summary_of("half", TaskMixture(fill_in_the_middle=0.5))
    assert plain["told"] == {"plainly": plain["train_examples"]}
    assert sum(half["told"].values()) == half["train_examples"] == plain["train_examples"]
    assert half["told"]["fill_in_the_middle"] == pytest.approx(half["train_examples"] / 2, rel=0.3)
    assert half["sha256"] != plain["sha256"]
    train = read_examples(tmp_path / "half" / "train.jsonl")
    assert half["train_tokens"] == sum(example.tokens for example in train)
    held_out = [(tmp_path / name / "held_out.jsonl").read_bytes() for name in ("plain", "half")]
    assert held_out[0] == held_out[1]
    assert summary_of("half", TaskMixture(fill_in_the_middle=0.5)) == half  # the existing dataset is reused
    assert summary_of("half", TaskMixture()) == plain  # the request differs, so it is prepared again
