"""The text of a tool result, and what is left to its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mcp.types import TextContent

from peft_core.jobs.status import status_of
from peft_core.schemas.dataset import SkippedRecords
from peft_core.schemas.export import ExportReport, Verification
from peft_core.schemas.local_bases import LocalBase, LocalBases
from peft_core.schemas.results import TrainingDataReport
from server.format_results import format_bases, format_export, format_inspection, format_status
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


@pytest.mark.parametrize("count", [2, 5, 6, 30])
def test_every_held_out_file_is_named_in_the_text_or_the_data(count: int) -> None:
    names = [f"file_{n}.py" for n in range(count)]
    result = format_inspection(report_of(names))
    text, data = (part.text for part in result.content if isinstance(part, TextContent))
    shown = json.loads(data)
    assert "left_out" not in shown
    assert shown.get("held_out_files") == (names if count > 5 else None)
    assert all(name in text + data for name in names)


NOT_READ = {"no_code": {".json": 30}, "lfs_pointer": {".sql": 20, ".js": 4}}
ADVICE = "24 files are Git LFS pointers without their contents (a.sql): run `git lfs pull`"


def test_the_answer_of_a_new_job_names_what_is_not_read_however_far_the_job_has_come() -> None:
    source = make_source().model_copy(update={"left_out_by_extension": NOT_READ, "advice": (ADVICE,)})
    job = make_job(request=make_request(found=source))
    status = status_of(job, None, Path("none")).model_copy(update={"step": 7})
    text = format_status(status, is_new=True).content[0]
    assert isinstance(text, TextContent)
    assert "Not read: 30 .json (no code); 20 .sql, 4 .js (lfs pointer)." in text.text
    assert ADVICE in text.text
    assert status.left_out_by_extension == NOT_READ


def test_an_inspection_names_what_is_not_read() -> None:
    report = report_of([]).model_copy(update={"left_out_by_extension": NOT_READ, "advice": [ADVICE]})
    text = format_inspection(report).content[0]
    assert isinstance(text, TextContent)
    assert "Files not read: 30 .json (no code); 20 .sql, 4 .js (lfs pointer)." in text.text
    assert f"{ADVICE}." in text.text


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
    status = status_of(make_job(request=make_request(found=source)), None, Path("none"))
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
        "90 min for 1000 examples\n"
        "1 is not trainable or not examined; `reason` says why.\n"
        "Call inspect_training_data."
    )
