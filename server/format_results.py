"""What a tool answers: a line for people, then the data; the same data again as structured content."""

from __future__ import annotations

from base64 import b64encode

from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel

from peft_core.jobs.status import headline
from peft_core.schemas.evaluation import Comparison, Evaluation
from peft_core.schemas.generation import Generation
from peft_core.schemas.results import (
    AdapterList,
    BaseMatch,
    Compatibility,
    Estimate,
    LoadedAdapter,
    Status,
    TrainingDataReport,
    TrainingStatus,
    UnloadedAdapter,
)

_NAMED = 5  # held-out files, in the line for people
TEXTS = frozenset({"text", "base_text"})
VERDICTS = {
    BaseMatch.EXACT: "the very weights it was trained on",
    BaseMatch.SAMPLED: "samples of every tensor of the base are those it was trained on",
    BaseMatch.SAME_FAMILY: "the base it was trained on, in another number format",
    BaseMatch.SHAPE_ONLY: "it fits, and nothing proves that it belongs",
    BaseMatch.INCOMPATIBLE: "it must not be loaded",
}


def answer(result: BaseModel, line: str, *, said: frozenset[str] = frozenset()) -> CallToolResult:
    """`line` first, so that whoever reads along need not read JSON.

    Nulls are left out of the text, and so are the fields `said`, which the line has already; the data has all.
    """
    return CallToolResult(
        content=[
            TextContent(type="text", text=line),
            TextContent(type="text", text=result.model_dump_json(exclude_none=True, exclude=set(said))),
        ],
        structured_content=result.model_dump(mode="json"),
    )


def adapters_answer(found: AdapterList) -> CallToolResult:
    count = f"{len(found.adapters)} adapter{'s'[: len(found.adapters) != 1]}"
    loaded = found.loaded
    held = ", ".join(f"{adapter.adapter_path}{' (active)' * adapter.active}" for adapter in loaded.adapters)
    memory = (
        f" In memory: {loaded.base_model} with {held or 'no adapter'}, {loaded.memory_bytes / 1e6:.0f} MB."
        if loaded.base_model
        else ""
    )
    return answer(found, f"{count}.{memory} {found.next}")


def compatibility_answer(found: Compatibility) -> CallToolResult:
    graver = [reason for reason in found.reasons if reason.severity == "error"] or found.reasons
    why = "".join(f" {reason.message}" for reason in graver[:3])
    more = f" ({len(graver) - 3} more reasons below.)" if len(graver) > 3 else ""
    base = found.base_model or "an unknown base"
    meaning = VERDICTS[found.verdict]
    return answer(
        found,
        f"{found.verdict.upper()} ({meaning}): {found.adapter_path} with {base}.{why}{more} {found.next}",
    )


def loaded_answer(loaded: LoadedAdapter) -> CallToolResult:
    if loaded.status == "fallback":
        return answer(loaded, f"NOT LOADED: {loaded.reason} {loaded.next}")
    effect = f"logits change by up to {loaded.effect.max_logit_change:.2f}" if loaded.effect else "effect unknown"
    gone = f" Taken out of memory: {', '.join(loaded.evicted)}." if loaded.evicted else ""
    return answer(
        loaded,
        f"Loaded {loaded.adapter_path} on {loaded.base_model} in {loaded.elapsed_s:.2f} s ({loaded.how}; verdict "
        f"{loaded.verdict}; {effect}); {loaded.memory_bytes / 1e6:.0f} MB in use.{gone} {loaded.next}",
    )


def unloaded_answer(unloaded: UnloadedAdapter) -> CallToolResult:
    if unloaded.status == "nothing_loaded":
        return answer(unloaded, unloaded.next)
    what = " and ".join(filter(None, [unloaded.adapter_path, "the base model" if unloaded.base_unloaded else None]))
    before, after = unloaded.memory_before_bytes / 1e6, unloaded.memory_after_bytes / 1e6
    return answer(unloaded, f"Unloaded {what}: {before:.0f} MB before, {after:.0f} MB now. {unloaded.next}")


def generation_answer(written: Generation) -> CallToolResult:
    """The text itself, then where it comes from."""
    who = f"{written.base_model} with {written.adapter_path}" if written.adapter_path else f"{written.base_model} alone"
    facts = (
        f"({who}; {written.prompt_tokens} + {written.completion_tokens} tokens, {written.finish_reason}, "
        f"{written.tokens_per_second:.0f} tokens/s)"
    )
    if written.base_text is None or written.adapter_path is None:
        return answer(written, f"{written.text}\n\n{facts}", said=TEXTS)
    return answer(written, f"With the adapter:\n{written.text}\n\nThe base alone:\n{written.base_text}\n\n{facts}")


def inspection_answer(report: TrainingDataReport) -> CallToolResult:
    """A page for people; the samples as they are, for escaped line ends make code unreadable."""
    left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.left_out.items())
    secrets = f" {report.secrets_removed} lines with credentials are blanked." if report.secrets_removed else ""
    unread = f" {report.unread_files} more files were not looked at." if report.unread_files else ""
    held_out = ", ".join(report.held_out_files[:_NAMED]) + (" …" if len(report.held_out_files) > _NAMED else "")
    said = {"samples", "left_out"} | ({"held_out_files"} if len(report.held_out_files) <= _NAMED else set())
    lines = [
        f"{report.training_data}, {report.files} files.{unread}",
        f"To train on: {report.train_examples} examples, about {report.train_tokens} tokens.",
        f"To measure on: {report.held_out_examples} examples, about {report.held_out_tokens} tokens.",
        f"Held out: {held_out}.",
        f"Left out: {left_out or 'nothing'}.{secrets}",
        f"Base: {report.base_model} on {report.device}. {estimate_line(report.estimate)}",
        *(
            f"\nSample: {sample.path}:{sample.start_line}-{sample.end_line} ({sample.kind}, about {sample.tokens} tokens)\n"
            f"--- given ---\n{sample.given.rstrip()}\n--- learned ---\n{sample.learned.rstrip()}"
            for sample in report.samples
        ),
        f"\n{report.next}",
    ]
    return answer(report, "\n".join(lines), said=frozenset(said))


def estimate_line(estimate: Estimate) -> str:
    time = f"about {max(1, round(estimate.seconds / 60))} min" if estimate.seconds else "unknown time"
    steps = f"{estimate.steps} steps, " if estimate.steps else ""
    chosen = f" {estimate.chosen}" if estimate.chosen else ""
    memory = f"{estimate.memory_bytes / 1e9:.1f} GB of memory"
    return f"Estimate: {steps}{time}, {memory} ({estimate.basis}).{chosen}"


def status_answer(status: TrainingStatus, picture: bytes | None = None) -> CallToolResult:
    """`picture`: a PNG of the loss curve, behind the text."""
    parts = [f"{status.project_id}: {headline(status)}."]
    if status.training_data and not status.status.is_final and status.step == 0:
        what = "Training data" if status.kind == "training" else "Measured on"
        parts.append(f"{what}: {status.training_data}. Base: {status.base_model} on {status.device}.")
        if status.estimate:
            parts.append(estimate_line(status.estimate))
    if status.evaluation and status.status is Status.COMPLETED:
        parts.append(evaluation_line(status.evaluation))
        if status.report_path:
            parts.append(f"Report: {status.report_path}.")
    result = answer(status, " ".join([*parts, status.next]))
    if picture is not None:
        image = ImageContent(type="image", data=b64encode(picture).decode(), mime_type="image/png")
        result.content.append(image)
    return result


def evaluation_line(evaluation: Evaluation) -> str:
    """What was measured, in one sentence, and what the verdict does not say; its reason has the loss."""
    parts = [
        f"{name} {100 * one.base:.1f} -> {100 * one.adapter:.1f} %{_interval(one, percent=True)}"
        for name, one in (("next lines exact", evaluation.next_line), ("edit similarity", evaluation.edit_similarity))
        if one is not None
    ]
    if evaluation.general_loss is not None:
        general = evaluation.general_loss
        parts.append(f"loss on general code {general.base:.3f} -> {general.adapter:.3f}{_interval(general)}")
    reason = evaluation.reason[:1].upper() + evaluation.reason[1:]
    caveats = "".join(f" {caveat}" for caveat in evaluation.caveats)
    return f"{reason}; {', '.join(parts)}; {evaluation.files} files, {evaluation.examples} examples.{caveats}"


def _interval(one: Comparison, *, percent: bool = False) -> str:
    if one.low is None or one.high is None:
        return ""
    return f" ({100 * one.low:+.1f} to {100 * one.high:+.1f})" if percent else f" ({one.low:+.3f} to {one.high:+.3f})"
