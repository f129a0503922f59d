"""The text of a tool result, and what is left to its data."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mcp.types import TextContent

from peft_core.jobs.status import status_of
from peft_core.schemas.dataset import SkippedRecords
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.export import ExportReport, Verification
from peft_core.schemas.generation import Generation, GenerationSettings
from peft_core.schemas.local_bases import LocalBase, LocalBases
from peft_core.schemas.results import AdapterList, AdapterSummary, Phase, Status, TrainingDataReport
from server.format_results import (
    RESULT_IN_META,
    format_adapters,
    format_bases,
    format_export,
    format_generation,
    format_inspection,
    format_status,
)
from tests.factories import make_job, make_request, make_source


def report_of(held_out: list[str]) -> TrainingDataReport:
    request = make_job().request
    return TrainingDataReport(
        training_data="code",
        base_model="base",
        device="cpu",
        train_examples=90,
        held_out_examples=10,
        train_tokens=9000,
        held_out_tokens=1000,
        files=20,
        languages={"python": 20},
        left_out={"tiny": 1},
        secrets_removed=0,
        held_out_files=held_out,
        largest_files={},
        samples=[],
        config=request.config,
        estimate=request.estimate,
    )


@pytest.mark.parametrize(("count", "more"), [(2, ""), (20, ""), (30, " and 10 more")])
def test_an_inspection_is_one_text_that_names_held_out_files_and_programs_find_all_of_them(
    count: int, more: str
) -> None:
    names = [f"file_{n}.py" for n in range(count)]
    result = format_inspection(report_of(names))
    (text,) = (part.text for part in result.content if isinstance(part, TextContent))
    assert f"from {', '.join(names[:20])}{more}.\n" in text
    assert result.structured_content is None
    assert result.meta is not None
    assert result.meta[RESULT_IN_META]["held_out_files"] == names


def make_generation(text: str, base_text: str | None = None) -> Generation:
    return Generation(
        text=text,
        base_text=base_text,
        base_model="base",
        engine="llamacpp",
        adapter_path="/adapters/a",
        applied=GenerationSettings(prompt_format="text", max_new_tokens=9, temperature=0.0, top_p=1.0, seed=0, stop=[]),
        prompt_tokens=3,
        completion_tokens=7,
        finish_reason="stop",
        elapsed_s=1.0,
        tokens_per_second=30.0,
    )


def test_a_generation_is_its_text_verbatim_and_the_facts_beside_it() -> None:
    generation = make_generation(text='def f():\n    return "x"\n')
    result = format_generation(generation)
    code, facts = (part.text for part in result.content if isinstance(part, TextContent))
    assert code == 'def f():\n    return "x"\n'
    assert facts.startswith("(base with /adapters/a in llama.cpp; 3 + 7 tokens, stop, ")
    assert result.structured_content is None


def test_a_comparison_of_two_generations_names_both_texts() -> None:
    result = format_generation(make_generation(text="ours", base_text="theirs"))
    texts = [part.text for part in result.content if isinstance(part, TextContent)]
    assert texts[:2] == ["With the adapter:\nours", "Base model:\ntheirs"]


def test_the_structured_content_begins_with_the_sentence_and_has_no_empty_value() -> None:
    job = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=7, total_steps=9)
    content = format_status(status_of(job, None, Path("none"), now=0.0)).structured_content
    assert content is not None
    assert next(iter(content)) == "summary"
    assert content["summary"].startswith("web: training: step 7/9")
    assert content["next_step"]["tool"] == "get_training_status"
    assert "reason" not in content["next_step"], "`next` has it"

    def empty_values(value: Any) -> list[Any]:
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            return [*([] if value else [value]), *(empty for item in inner for empty in empty_values(item))]
        return [value] if value in (None, "") else []

    assert empty_values(content) == []


def test_a_loss_that_is_no_number_is_left_out() -> None:
    job = make_job(
        status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=7, loss=float("nan"), held_out_loss=float("inf")
    )
    result = format_status(status_of(job, None, Path("none"), now=0.0))
    assert result.structured_content is not None
    assert {"loss", "held_out_loss"}.isdisjoint(result.structured_content)
    data = result.content[1]
    assert isinstance(data, TextContent)
    json.loads(data.text, parse_constant=pytest.fail)  # called for NaN and Infinity, which are no JSON


def test_a_poll_carries_only_what_changes() -> None:
    job = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=7)
    status = status_of(job, None, Path("none"), now=0.0)
    first, poll = format_status(status, is_new=True).structured_content, format_status(status).structured_content
    assert first is not None
    assert poll is not None
    assert first["estimate"]["steps"] == job.request.estimate.steps
    assert {"estimate", "training_data", "dataset", "base_model"}.isdisjoint(poll)
    assert len(json.dumps(poll)) < 700


@pytest.mark.parametrize("created_at", ["", "yesterday", "2026-01-01T12:00:00", "9999-12-31T23:59:59-14:00"])
def test_an_adapter_with_any_date_in_its_manifest_is_listed(created_at: str) -> None:
    summary = AdapterSummary(
        adapter_id="a",
        project_id="web",
        current=True,
        created_at=created_at,
        base_model="base",
        base_perplexity=None,
        adapter_perplexity=None,
        adapter_bytes=1,
        adapter_path="/a",
    )
    content = format_adapters(AdapterList(adapters=[summary], next="")).structured_content
    assert content is not None
    assert content["summary"].startswith("1 adapter: web/a (current, not evaluated")


NOW = datetime(2026, 1, 3, 12, tzinfo=UTC).timestamp()


def test_a_list_of_adapters_names_them_with_verdict_and_age() -> None:
    summary = AdapterSummary(
        adapter_id="b",
        project_id="web",
        current=True,
        created_at="2026-01-01T12:00:00+00:00",
        base_model="base",
        base_perplexity=None,
        adapter_perplexity=None,
        verdict=Verdict.HELPS,
        adapter_bytes=1,
        adapter_path="/a/b",
    )
    older = summary.model_copy(update={"adapter_id": "a", "current": False, "verdict": None, "resident": True})
    listed = AdapterList(adapters=[summary, older], next="Call load_adapter.")
    content = format_adapters(listed, now=NOW).structured_content
    assert content is not None
    assert content["summary"] == (
        "2 adapters: web/b (current, helps, 2 days old); web/a (not evaluated, 2 days old, in memory)."
    )


NOT_READ = {"no_code": {".json": 30}, "lfs_pointer": {".sql": 20, ".js": 4}}
ADVICE = "24 files are Git LFS pointers without their contents (a.sql): run `git lfs pull`"


def test_the_answer_of_a_new_job_names_what_is_not_read_however_far_the_job_has_come() -> None:
    source = make_source().model_copy(update={"left_out_by_extension": NOT_READ, "advice": (ADVICE,)})
    job = make_job(request=make_request(found=source))
    status = status_of(job, None, Path("none"), now=0.0).model_copy(update={"step": 7})
    text = format_status(status, is_new=True).content[0]
    assert isinstance(text, TextContent)
    assert "Not read: 30 .json (no code); 20 .sql, 4 .js (lfs pointer)." in text.text
    assert ADVICE in text.text
    assert status.left_out_by_extension == NOT_READ


def test_an_inspection_counts_records_beside_code_as_records() -> None:
    report = report_of([])
    beside_code = {
        "training_data": "/data/chat.jsonl",
        "files": 85,
        "records": 80,
        "code_files": 5,
        "config": report.config.model_copy(update={"more_sources": ["/code/web"]}),
    }
    text = format_inspection(report.model_copy(update=beside_code)).content[0]
    assert isinstance(text, TextContent)
    assert text.text.startswith("/data/chat.jsonl, /code/web, 5 files and 80 records.\n")


def test_an_inspection_names_what_is_not_read() -> None:
    report = report_of([]).model_copy(update={"left_out_by_extension": NOT_READ, "advice": [ADVICE]})
    text = format_inspection(report).content[0]
    assert isinstance(text, TextContent)
    assert "Files not read: 30 .json (no code); 20 .sql, 4 .js (lfs pointer)." in text.text
    assert f"{ADVICE}." in text.text


def test_one_of_anything_is_counted_in_the_singular() -> None:
    source = make_source().model_copy(
        update={"files": 1, "languages": {"rust": 1}, "without_grammar": {"rust": 1}, "examples": 1, "units": 1}
    )
    request = make_request(found=source)
    request = request.model_copy(update={"estimate": request.estimate.model_copy(update={"steps": 1})})
    status = status_of(make_job(request=request), None, Path("none"), now=0.0)
    of_training = format_status(status, is_new=True).content[0]
    one = {"files": 1, "train_examples": 1, "held_out_examples": 1, "secrets_removed": 1, "unread_files": 1}
    of_inspection = format_inspection(report_of(["a.rs"]).model_copy(update=one)).content[0]
    assert isinstance(of_training, TextContent)
    assert isinstance(of_inspection, TextContent)
    assert "Training data: 1 file (1 rust) and 1 record in " in of_training.text
    assert "Cut at blank lines: 1 rust file; " in of_training.text
    assert "Estimate: 1 step, " in of_training.text
    assert "code, 1 file. 1 more file was not read.\n" in of_inspection.text
    assert "Training set: 1 example, " in of_inspection.text
    assert "Held-out set: 1 example, " in of_inspection.text
    assert "1 line with credentials is blanked." in of_inspection.text


def test_keys_that_are_not_used_and_records_that_are_skipped_are_named_in_both_answers() -> None:
    skipped = SkippedRecords(reason="unknown_key", count=7, first=("line 4", "line 9"), example="Line 4 has 'mood'.")
    source = make_source(
        kind="jsonl",
        path=Path("/data/chat.jsonl"),
        examples=90,
        left_out={"unknown_key": 7, "thinking": 3},
        unused_keys={"id": 90, "source": 90},
        skipped=(skipped,),
    )
    status = status_of(make_job(request=make_request(found=source)), None, Path("none"), now=0.0)
    text = format_status(status, is_new=True).content[0]
    assert isinstance(text, TextContent)
    assert (
        "Not used: id, source. Left out: 3 thinking. Skipped: 7 records, unknown key (line 4, line 9, …). Base model:"
        in text.text
    )
    report = report_of([]).model_copy(update={"unused_keys": source.unused_keys, "skipped": [skipped]})
    text = format_inspection(report).content[0]
    assert isinstance(text, TextContent)
    assert "\nNot used: id, source.\nSkipped 7 (unknown key; line 4, line 9): Line 4 has 'mood'.\n" in text.text


def test_the_text_of_an_export_has_its_summary_first_then_how_to_use_it_and_what_to_beware_of() -> None:
    report = ExportReport(
        summary="Exported a as a LoRA file, and verified in llama.cpp.",
        to="gguf-lora",
        format="f32",
        directory="/exports/a",
        files=[],
        adapter_path="/adapters/a",
        adapter_id="a",
        base_model="base",
        base_fingerprint={},
        verification=Verification(status="verified", positions=200, mean_difference=0.004),
        usage=["llama-server -m base.gguf --lora a.gguf"],
        warnings=["Take care."],
        created_at="2026-01-01T00:00:00+00:00",
        elapsed_s=1.0,
        next="Use it.",
    )
    result = format_export(report)
    text, data = (part.text for part in result.content if isinstance(part, TextContent))
    assert text.splitlines() == [
        report.summary,
        "/exports/a",
        "Use it:",
        "- llama-server -m base.gguf --lora a.gguf",
        "Warning: Take care.",
        "Use it.",
    ]
    assert json.loads(data)["verification"]["mean_difference"] == 0.004
    assert result.structured_content is not None
    assert result.structured_content["warnings"] == ["Take care."]


def test_base_models_are_listed_one_a_line_and_others_counted() -> None:
    coder = LocalBase(
        base_model="ollama:qwen2.5-coder:1.5b",
        source="ollama",
        trainable=True,
        parameters=1_540_000_000,
        quantisation="Q4_K",
        size_bytes=986_000_000,
        fill_in_the_middle=True,
        chat_template=True,
        memory_bytes=3_400_000_000,
        seconds_per_1000_examples=5400.0,
    )
    vision = LocalBase(base_model="ollama:llava:7b", source="ollama", trainable=False, reason="a vision-language model")
    result = format_bases(LocalBases(base_models=[coder, vision], device="cpu", next="Call inspect_training_data."))
    text = result.content[0]
    assert isinstance(text, TextContent)
    assert text.text == (
        "2 base models on this machine, 1 trainable on cpu:\n"
        "- ollama:qwen2.5-coder:1.5b: 1540M parameters, Q4_K, 986 MB, fill-in-the-middle, chat, training takes 3.4 GB, about "
        "1 h 30 min for 1000 examples\n"
        "1 is not trainable or not examined; `reason` says why.\n"
        "Call inspect_training_data."
    )
