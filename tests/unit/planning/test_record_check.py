"""Records are checked with the base model's template and tokenizer when the request is made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.data.records import Record
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import TokenCounter
from peft_core.errors import DataError, InvalidArgument
from peft_core.planning import check_records as check_records_module
from peft_core.planning import record_check
from peft_core.planning.check_records import check
from peft_core.planning.planner import plan
from peft_core.planning.record_check import check_records
from peft_core.planning.token_counts import token_counter_of
from peft_core.schemas.base_model import Base
from peft_core.schemas.training import TrainingConfig
from tests.factories import make_base
from tests.model_files import ARRAY, GGUF_METADATA, TEXT, U32, gguf_bytes, write_model

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }}\\n{{ m.content }} <|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\\n{% endif %}"
).replace("\\\\", "\\")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
WITHOUT_TOOLS = CHATML.replace(
    "<|im_start|> {{", "{% if m.role == 'tool' %}{% continue %}{% endif %}<|im_start|> {{", 1
)


def base_with(directory: Path, template: str | None, context: int = 4096) -> Base:
    base = write_model(directory / "base", max_position_embeddings=context)
    if template is not None:
        (base / "chat_template.jinja").write_text(template)
    return resolve(str(base), Settings())


def talk(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def written(directory: Path, records: Sequence[dict[str, Any]]) -> Path:
    path = directory / "records.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_check, "run_json_child", lambda _module, request, _answer, **_options: check(request))


def checked(tmp_path: Path, template: str, records: Sequence[dict[str, Any]], **options: Any) -> Any:
    base, path = base_with(tmp_path, template), written(tmp_path, records)
    source = summarise_source(str(path))
    return check_records(source, str(path), base, **{"max_length": 64, "skip": False, **options})


ODD = [talk(f"question {n}", f"answer {n}", system="Be brief" if n == 37 else None) for n in range(61)]


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"Line 38 of .*records\.jsonl cannot be used with .*: .* System role not supported"
    ):
        checked(tmp_path, STRICT, ODD)


def test_it_is_left_out_and_counted_where_the_request_allows_it(tmp_path: Path) -> None:
    source, _ = checked(tmp_path, STRICT, ODD, skip=True)
    assert (source.examples, source.left_out) == (60, {"chat_template": 1})
    assert [(each.count, each.first) for each in source.skipped] == [(1, ("line 38",))]
    assert "1 record, chat template (line 38)" in source.unused_in_words


def test_what_the_template_does_not_write_is_noticed(tmp_path: Path) -> None:
    records = [talk(f"question {n}", "CALLING", "more", "ANSWER") for n in range(20)]
    for record in records:
        record["messages"][2] = {"role": "tool", "content": "RESULT"}
    with pytest.raises(DataError, match=r"Line 1 of .* does not write tool results"):
        checked(tmp_path, WITHOUT_TOOLS, records)


LONG = [talk(f"question {n}", "word " * (300 if n % 4 else 3) + str(n)) for n in range(240)]


def test_records_that_are_too_long_are_named_and_do_not_count(tmp_path: Path) -> None:
    source, max_length = checked(tmp_path, CHATML, LONG)
    assert (max_length, source.examples, source.lengths.too_long) == (64, 60, 180)
    assert source.estimated_tokens < 60 * 64
    assert source.unused_in_words == "", "the advice says it"
    (advice,) = source.advice
    assert advice == (
        "180 of 240 records are longer than config.max_length = 64 tokens (the longest has about 309). "
        "Set config.max_length = 512, which takes all of them"
    )


def test_max_length_is_not_raised_to_a_limit_that_takes_no_further_record(tmp_path: Path) -> None:
    source, max_length = checked(tmp_path, CHATML, LONG, longer_allowed=128)
    assert (max_length, source.lengths.too_long, source.raised_max_length) == (64, 180, None)


def test_max_length_follows_the_records_where_the_request_leaves_it_open(tmp_path: Path) -> None:
    source, max_length = checked(tmp_path, CHATML, LONG, longer_allowed=2048)
    assert (max_length, source.examples, source.lengths) == (512, 240, None)
    assert source.raised_max_length.too_long == 180


def test_if_no_record_fits_the_error_has_the_lengths(tmp_path: Path) -> None:
    records = [talk(f"question {n}", "word " * 300) for n in range(60)]
    with pytest.raises(
        DataError, match=r"60 of 60 records are longer than .* = 64 tokens .*Set config.max_length = 512"
    ):
        checked(tmp_path, CHATML, records)


def test_of_a_long_conversation_the_turns_that_fit_are_used(tmp_path: Path) -> None:
    records = [talk("question", f"first {n}", "more", "word " * 300) for n in range(20)]
    source, _ = checked(tmp_path, CHATML, records)
    assert (source.examples, source.lengths.shortened) == (20, 20)


MANY = [
    talk(f"question {n}", "answer " + "word " * (n % 9 if n != 90 else 300), system="Be brief" if n == 95 else None)
    for n in range(100)
]


@pytest.fixture
def few_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_records_module, "RENDERED", 30)


@pytest.mark.usefixtures("few_are_rendered")
def test_of_many_conversations_those_like_others_are_counted_from_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = check_records_module.render_record

    def recorded(record: Record, counter: TokenCounter) -> Any:
        rendered.append(record.name)
        return render(record, counter)

    monkeypatch.setattr(check_records_module, "render_record", recorded)
    source, _ = checked(tmp_path, CHATML, MANY)
    assert rendered == [*(f"line {n}" for n in range(1, 31)), "line 91", "line 96"], (
        "one is long, and one has a new shape"
    )
    assert (source.examples, source.lengths.too_long) == (99, 1)
    monkeypatch.setattr(check_records_module, "RENDERED", 100)
    exact, _ = checked(tmp_path, CHATML, MANY)
    assert source.estimated_tokens == pytest.approx(exact.estimated_tokens, rel=0.05)


@pytest.mark.usefixtures("few_are_rendered")
def test_of_many_conversations_one_of_another_shape_is_refused_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Line 96 of .* System role not supported"):
        checked(tmp_path, STRICT, MANY)


def test_where_counting_takes_too_long_new_shapes_are_still_checked_and_the_rest_is_extrapolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_records_module, "COUNTED_S", -1.0)
    source, _ = checked(tmp_path, CHATML, MANY)
    assert (source.examples, source.advice) == (100, ("2 of 100 records were counted; the job counts the others",))
    with pytest.raises(DataError, match=r"Line 96 of .* System role not supported"):
        checked(tmp_path, STRICT, MANY)


@pytest.mark.parametrize("code_comes_first", [True, False])
def test_records_are_checked_and_counted_beside_code(tmp_path: Path, *, code_comes_first: bool) -> None:
    code, talks = tmp_path / "code", tmp_path / "talks"
    for directory in (code, talks):
        directory.mkdir()
    for number in range(4):
        text = "".join(f"def f{number}_{n}(a):\n    return a * {n} + {number}\n\n\n" for n in range(10))
        (code / f"{number}.py").write_text(text)
    main, other = (code, written(talks, ODD)) if code_comes_first else (written(talks, ODD), code)
    config = {"more_sources": [str(other)], "device": "cpu", "max_length": 64}

    def planned(template: str) -> Any:
        base = base_with(tmp_path, template)
        request = TrainingConfig(base_model=str(base.path), **config)
        return plan(str(main), request, Settings(data_dir=tmp_path / "data"), lambda *_: None).found

    with pytest.raises(DataError, match=r"Line 38 of .*System role not supported"):
        planned(STRICT)
    found = planned(CHATML)
    assert (found.files, found.units, found.examples, found.languages) == (4, 40, 61, {"python": 4})


def test_inline_records_are_checked_too(tmp_path: Path) -> None:
    base = base_with(tmp_path, STRICT)
    with pytest.raises(DataError, match=r"Record 38 cannot be used with"):
        check_records(summarise_source(ODD), ODD, base, max_length=64, skip=False)


def test_a_base_model_with_named_templates_only_is_refused_with_their_names(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", max_position_embeddings=4096)
    named = [{"name": "tool_use", "template": CHATML}, {"name": "rag", "template": CHATML}]
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": named}))
    config = TrainingConfig(base_model=str(base), device="cpu")
    with pytest.raises(InvalidArgument, match=r"no chat template called 'default', only named ones \(rag, tool_use\)"):
        plan(str(written(tmp_path, LONG)), config, Settings(data_dir=tmp_path / "data"), lambda *_: None)


@pytest.mark.slow
def test_a_template_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(record_check, "TIMEOUT_S", 5.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="took longer than 5 s and was stopped"):
        checked(tmp_path, endless, LONG)


def test_the_vocabulary_of_a_gguf_file_counts(tmp_path: Path) -> None:
    vocabulary = ["a", "b", "ab", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.tokens": (ARRAY, (TEXT, [*vocabulary, *(f"t{n}" for n in range(44))])),
        "tokenizer.ggml.token_type": (ARRAY, (U32, [1, 1, 1, 3, *([1] * 44)])),
        "tokenizer.ggml.merges": (ARRAY, (TEXT, ["a b"])),
    }
    file = tmp_path / "base.gguf"
    file.write_bytes(gguf_bytes(GGUF_METADATA | metadata))
    counter = token_counter_of(make_base(path=file))
    assert counter.count(["abab", "ba", "a<|im_end|>"]) == [2, 2, 2]
