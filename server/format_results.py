"""Tool results. Some clients show their model the structured content only, others the texts: each is complete on its own.

The structured content begins with `summary`, the sentence that people read, and has no nulls and no empty values. The texts
are that sentence with the next step, and the data as JSON. What a model reads as text, such as generated code, is text alone.
"""

from __future__ import annotations

import json
import math
import time
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel

from peft_core.adapters.info import AdapterInfo
from peft_core.errors import sanitize
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import describe_by_extension
from peft_core.schemas.export import ExportReport
from peft_core.schemas.generation import Engine, Generation
from peft_core.schemas.local_bases import LocalBase, LocalBases
from peft_core.schemas.project import Refreshed
from peft_core.schemas.recommendation import BaseRecommendation
from peft_core.schemas.results import (
    AdapterList,
    AdapterSummary,
    BaseMatch,
    Compatibility,
    DataSample,
    DeletedAdapter,
    LoadedAdapter,
    TrainingDataReport,
    TrainingStatus,
    UnloadedAdapter,
)
from peft_core.schemas.retrieval import Retrieved
from peft_core.schemas.serving import Serving
from peft_core.schemas.staleness import Staleness
from peft_core.schemas.storage import DiskUsage, size_in_words
from peft_core.schemas.study import StudyPlan
from peft_core.system.durations import age_since, rough_duration
from server.links import link_to_export, links_of_status
from server.recommendation_text import recommendation_lines
from server.status_text import estimate_text, for_client, summarise, summarise_refresh

RESULT_IN_META = "peft-mcp/result"
MAX_NAMED_FILES = 20  # held-out files that the text names
MAX_NAMED_BASES = 20
MAX_NAMED_ADAPTERS = 10
# What a status repeats of the request, and what does not change while the job runs.
REQUESTED = frozenset({"created_at", "updated_at", "training_data", "left_out_by_extension", "estimate"})
CHOSEN = frozenset({"dataset", "base_model", "device", "cluster", "log_path", "evaluation", "comparison", "metrics"})
MAX_REASONS = 3
MATCH_WORDS = {
    BaseMatch.EXACT: "this is the base model it was trained on",
    BaseMatch.SAMPLED: "samples of every tensor equal those of the base model it was trained on",
    BaseMatch.SAME_FAMILY: "the base model it was trained on, in another number format",
    BaseMatch.SHAPE_ONLY: "the shapes fit, but nothing proves that it belongs to this base model",
    BaseMatch.INCOMPATIBLE: "do not load it",
}


def tool_result(
    result: BaseModel,
    summary: str,
    *,
    unchanged: frozenset[str] = frozenset(),
    in_summary: frozenset[str] = frozenset(),
    ending: str = " ",
) -> CallToolResult:
    """Return `summary` and the data of `result` without the fields `unchanged`, which an earlier result has given.

    The JSON text leaves out the fields `in_summary` as well. `ending` separates the summary from the next step.
    """
    data: dict[str, Any] = compact(result.model_dump(mode="json", exclude={"summary", *unchanged}))
    step: str = data.get("next", "")
    if "next_step" in data:
        data["next_step"].pop("reason", None)  # `next` has it
    beside_text = {key: value for key, value in data.items() if key not in {"next", "next_step", *in_summary}}
    return CallToolResult(
        content=[
            TextContent(type="text", text=f"{summary}{ending}{step}".rstrip() if step else summary),
            TextContent(type="text", text=json.dumps(beside_text, ensure_ascii=False, separators=(",", ":"))),
        ],
        structured_content={"summary": summary, **data},
    )


def text_result(result: BaseModel, *texts: str) -> CallToolResult:
    """Return `texts` without structured content, which some clients pass on in their place. The data is in `_meta`."""
    return CallToolResult(
        content=[TextContent(type="text", text=text) for text in texts],
        _meta={RESULT_IN_META: compact(result.model_dump(mode="json"))},
    )


def compact(value: Any) -> Any:
    """Return JSON data without nulls, empty texts, empty lists and empty objects, at any depth.

    A number that is not finite, such as the loss of a run that diverged, is null: JSON has none.
    """
    if isinstance(value, Mapping):
        pairs = ((key, compact(item)) for key, item in value.items())
        return {key: item for key, item in pairs if not _is_empty(item)}
    if isinstance(value, list):
        return [compact(item) for item in value]
    return value


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, str | list | Mapping) and not value)


# -- adapters --------------------------------------------------------------------------------------------------------


def format_adapters(listed: AdapterList, *, now: float | None = None) -> CallToolResult:
    """Name the adapters with verdict and age. `now`: seconds since the epoch; the clock's unless a test sets it."""
    now = time.time() if now is None else now
    count = len(listed.adapters)
    named = [_adapter_line(adapter, now) for adapter in listed.adapters[:MAX_NAMED_ADAPTERS]]
    if count > MAX_NAMED_ADAPTERS:
        named.append(f"{count - MAX_NAMED_ADAPTERS} more")
    names = f": {'; '.join(named)}" if named else ""
    loaded, memory = listed.loaded, ""
    if loaded.base_model:
        resident = [f"{adapter.adapter_path}{' (active)' * adapter.active}" for adapter in loaded.adapters]
        memory = (
            f" In memory: {loaded.base_model} with {', '.join(resident) or 'no adapter'}, {_mb(loaded.memory_bytes)}."
        )
    left = listed.not_compared
    were = "was not compared with its" if left == 1 else "were not compared with their"
    open_question = f" {left} of them {were} code in time; get_adapter_info does it." if left else ""
    return tool_result(listed, f"{counted(count, 'adapter')}{names}.{memory}{open_question}")


def _adapter_line(adapter: AdapterSummary, now: float) -> str:
    """Return for instance "web/20261127-101500-3f2a1b (current, helps, 2 days old)"."""
    age = age_since(adapter.created_at, now)
    facts = [
        "current" if adapter.current else "",
        adapter.verdict.replace("_", " ") if adapter.verdict else "not evaluated",
        f"{age} old" if age else "",
        "active" if adapter.active else "in memory" if adapter.resident else "",
        adapter.staleness.in_brief if adapter.staleness else "",
    ]
    return f"{adapter.project_id}/{adapter.adapter_id} ({', '.join(filter(None, facts))})"


def _with_staleness(sentence: str, staleness: Staleness | None) -> str:
    return sentence if staleness is None else f"{sentence} {staleness.text}"


def format_adapter_info(info: AdapterInfo) -> CallToolResult:
    what = f"{info.adapter_path}: rank {info.rank}, {info.adapter_bytes / 1e6:.1f} MB."
    return tool_result(info, _with_staleness(what, info.staleness))


def format_deleted(deleted: DeletedAdapter) -> CallToolResult:
    freed = f"{deleted.freed_bytes / 1e6:.1f} MB freed"
    return tool_result(deleted, f"Deleted {deleted.adapter_id}: {freed}.")


def format_compatibility(checked: Compatibility) -> CallToolResult:
    reasons = [reason for reason in checked.reasons if reason.severity == "error"] or checked.reasons
    why = "".join(f" {reason.message}" for reason in reasons[:MAX_REASONS])
    more = f" ({len(reasons) - MAX_REASONS} more reasons below.)" if len(reasons) > MAX_REASONS else ""
    verdict = f"{checked.verdict.upper()} ({MATCH_WORDS[checked.verdict]})"
    base = checked.base_model or "an unknown base model"
    return tool_result(checked, f"{verdict}: {checked.adapter_path} with {base}.{why}{more}")


ENGINES: dict[Engine, str] = {"torch": "torch", "llamacpp": "llama.cpp"}


def format_loaded(loaded: LoadedAdapter) -> CallToolResult:
    if loaded.status == "fallback":
        return tool_result(loaded, f"NOT LOADED: {loaded.reason}")
    effect = f"outputs change by up to {loaded.effect.max_logit_change:.2f}" if loaded.effect else "effect unknown"
    engine = f" Computed in {ENGINES[loaded.engine]}: {loaded.engine_reason}." if loaded.engine else ""
    evicted = f" Evicted from memory: {', '.join(loaded.evicted)}." if loaded.evicted else ""
    what = (
        f"Loaded {loaded.adapter_path} on {loaded.base_model} in {loaded.elapsed_s:.2f} s ({loaded.how}; base match "
        f"{loaded.verdict}; {effect}); {_mb(loaded.memory_bytes)} in use.{engine}{evicted}"
    )
    return tool_result(loaded, _with_staleness(what, loaded.staleness))


def format_unloaded(unloaded: UnloadedAdapter) -> CallToolResult:
    if unloaded.status == "nothing_loaded":
        return tool_result(unloaded, "Nothing was loaded.")
    what = " and ".join(filter(None, [unloaded.adapter_path, "the base model" if unloaded.base_unloaded else None]))
    memory = f"{_mb(unloaded.memory_before_bytes)} before, {_mb(unloaded.memory_after_bytes)} after"
    return tool_result(unloaded, f"Unloaded {what}: {memory}.")


def format_generation(generation: Generation) -> CallToolResult:
    """Show the generated text itself, then the model that wrote it."""
    adapter = f"with {generation.adapter_path}" if generation.adapter_path else "without adapter"
    engine = f" in {ENGINES[generation.engine]}" if generation.engine else ""
    facts = (
        f"({generation.base_model} {adapter}{engine}; {generation.prompt_tokens} + {generation.completion_tokens} tokens, "
        f"{generation.finish_reason}, {generation.tokens_per_second:.0f} tokens/s)"
    )
    if generation.retrieved is not None:
        facts = f"{facts}\n{_retrieved_text(generation.retrieved)}"
    if generation.base_text is None or generation.adapter_path is None:
        return text_result(generation, generation.text, facts)
    return text_result(
        generation, f"With the adapter:\n{generation.text}", f"Base model:\n{generation.base_text}", facts
    )


def _retrieved_text(retrieved: Retrieved) -> str:
    units = ", ".join(f"{unit.path}:{unit.start_line}-{unit.end_line}" for unit in retrieved.units)
    used = f"Code before the prompt ({retrieved.tokens} tokens, best of {retrieved.searched_units} units): {units}."
    return " ".join(filter(None, [used if units else "No code before the prompt.", retrieved.note]))


def format_export(report: ExportReport) -> CallToolResult:
    usage = "\n".join(f"- {line}" for line in report.usage)
    warnings = "".join(f"\nWarning: {warning}" for warning in report.warnings)
    result = tool_result(
        report,
        f"{report.summary}\n{report.directory}\nUse it:\n{usage}{warnings}",
        in_summary=frozenset({"usage", "warnings"}),
        ending="\n",
    )
    result.content.append(link_to_export(report))
    return result


def format_serving(serving: Serving) -> CallToolResult:
    names = "\n".join(f"- {model.name}" for model in serving.models)
    usage = "\n".join(f"- {line}" for line in serving.usage)
    return tool_result(
        serving,
        f"{serving.summary}\nModels:\n{names}\nThe token is in {serving.token_path}.\nUse it:\n{usage}",
        in_summary=frozenset({"usage"}),
        ending="\n",
    )


def format_disk_usage(usage: DiskUsage) -> CallToolResult:
    """Show a line for each item."""
    result = tool_result(usage, usage.summary, in_summary=frozenset({"items", "freed", "kept"}))
    lines = [
        f"- {item.name}: {size_in_words(item.bytes)}. {item.description} "
        f"{f'Kept: {item.reason}' if item.reason else f'If freed: {item.lost}'}"
        for item in usage.items
    ]
    if usage.omitted_items:
        lines.append(f"- and {counted(usage.omitted_items, 'smaller one')}")
    result.content.insert(1, TextContent(type="text", text="\n".join(lines)))
    return result


def format_bases(listed: LocalBases) -> CallToolResult:
    """Show a line for each trainable base model, and count the others."""
    trainable = [base for base in listed.base_models if base.trainable]
    others = len(listed.base_models) - len(trainable)
    lines = [f"- {_base_line(base)}" for base in trainable[:MAX_NAMED_BASES]]
    rest = len(trainable) - MAX_NAMED_BASES
    if rest > 0:
        lines.append(f"- and {rest} more")
    if others:
        lines.append(f"{others} {'is' if others == 1 else 'are'} not trainable or not examined; `reason` says why.")
    if listed.omitted:
        lines.append(f"Not listed: {counted(listed.omitted, 'further model')}.")
    count = len(listed.base_models)
    head = f"{counted(count, 'base model')} on this machine, {len(trainable)} trainable on {listed.device}"
    return tool_result(listed, "\n".join([f"{head}:" if lines else f"{head}.", *lines]), ending="\n")


def _base_line(base: LocalBase) -> str:
    facts = [
        f"{(base.parameters or 0) / 1e6:.0f}M parameters",
        base.quantisation,
        f"{(base.size_bytes or 0) / 1e6:.0f} MB",
        *(["fill-in-the-middle"] if base.fill_in_the_middle else []),
        *(["chat"] if base.chat_template else []),
        *([f"training takes {base.memory_bytes / 1e9:.1f} GB"] if base.memory_bytes else []),
    ]
    if base.seconds_per_1000_examples:
        facts.append(f"about {rough_duration(base.seconds_per_1000_examples)} for 1000 examples")
    return f"{base.base_model}: {', '.join(facts)}"


def format_recommendation(recommended: BaseRecommendation) -> CallToolResult:
    """Show a line for each recommended base model, then what cannot be trained, and what to download."""
    lines = recommendation_lines(recommended)
    return tool_result(recommended, "\n".join(lines), in_summary=frozenset({"note"}), ending="\n")


def _sample_text(sample: DataSample) -> str:
    if sample.kind == "record" and sample.text:  # its learned parts may be anywhere
        return f"--- what is between \u27e6 and \u27e7 is learned ---\n{sample.text.rstrip()}"
    return f"--- context ---\n{sample.given.rstrip()}\n--- learned ---\n{sample.learned.rstrip()}"


# -- training --------------------------------------------------------------------------------------------------------


def format_inspection(report: TrainingDataReport) -> CallToolResult:
    """Show one page of text. Samples appear verbatim: code with escaped line breaks is hard to read."""
    left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in report.left_out.items())
    not_read = describe_by_extension(report.left_out_by_extension)
    blanked, unread = report.secrets_removed, report.unread_files
    secrets = (
        f" {counted(blanked, 'line')} with credentials {'is' if blanked == 1 else 'are'} blanked." if blanked else ""
    )
    not_sampled = f" {counted(unread, 'more file')} {'was' if unread == 1 else 'were'} not read." if unread else ""
    more = len(report.held_out_files) - MAX_NAMED_FILES
    names = ", ".join(report.held_out_files[:MAX_NAMED_FILES]) + (f" and {more} more" if more > 0 else "")
    held_out = f", from {names}" if names else ""
    code = report.files if report.records is None else report.code_files
    counts = [(code, "file"), (report.records, "record")]
    size = " and ".join(counted(count, noun) for count, noun in counts if count is not None)
    places = ", ".join([report.training_data, *report.config.more_sources])
    lines = [
        f"{places}, {size}.{not_sampled}",
        *([report.counted] if report.counted else []),
        f"Training set: {counted(report.train_examples, 'example')}, about {report.train_tokens} tokens.",
        f"Held-out set: {counted(report.held_out_examples, 'example')}, about {report.held_out_tokens} tokens{held_out}.",
        f"Left out: {left_out or 'nothing'}.{secrets}",
        *([f"Files not read: {not_read}."] if not_read else []),
        *([report.study.in_words] if report.study is not None else []),
        *(f"{advice}." for advice in report.advice),
        *([f"Not used: {', '.join(report.unused_keys)}."] if report.unused_keys else []),
        *(
            f"Skipped {each.count} ({each.reason.replace('_', ' ')}; {', '.join(each.first)}): {each.example}"
            for each in report.skipped
        ),
        f"Base model: {report.base_model} on {report.device}. {estimate_text(report.estimate)}",
        *(
            f"\nSample: {_place(sample)} ({sample.kind}, about {sample.tokens} tokens)\n" + _sample_text(sample)
            for sample in report.samples
        ),
        f"\n{report.next}",
    ]
    return text_result(report, "\n".join(lines))


def format_study_plan(plan: StudyPlan) -> CallToolResult:
    """Name what is worth writing about, with the reasons; the data have signatures, callers and excerpts."""
    compared = f", compared with {plan.compared_with}" if plan.compared_with else ""
    count = plan.unread_files
    were_not = "was not" if count == 1 else "were not"
    unread = f" {counted(count, 'file')} {were_not} read: in time, or for their syntax." if count else ""
    most = (
        f"The {len(plan.targets)} of {plan.definitions} APIs of {sanitize(plan.source)} that are most worth study items"
    )
    lines = [
        f"{most}{compared}, the first most.{unread}",
        *(f"- {each.study} ({each.path}:{each.start_line}): {', '.join(each.reasons)}" for each in plan.targets),
        *(["Used together:"] if plan.pairs else []),
        *(
            f"- {pair.first} and {pair.second}, in {counted(pair.together, 'function')}, such as {pair.where}"
            for pair in plan.pairs
        ),
        f"How to write them: {plan.record_format} For example: {json.dumps(plan.example, ensure_ascii=False)}",
    ]
    return tool_result(plan, "\n".join(lines), in_summary=frozenset({"record_format", "example"}), ending="\n")


def _place(sample: DataSample) -> str:
    return f"{sample.path}:{sample.start_line}-{sample.end_line}" if sample.start_line else sample.path


def format_status(
    status: TrainingStatus, picture: bytes | None = None, *, is_new: bool = False, preface: str = ""
) -> CallToolResult:
    """Show the state of a job. `picture` is the loss curve as PNG, added after the text.

    `is_new`: whether this answers the request of the job, so that the data are described however far it has come. `preface`: a
    sentence before the summary.
    """
    status = for_client(status)
    unchanged = frozenset() if is_new else REQUESTED if status.status.is_final else REQUESTED | CHOSEN
    summary = f"{preface} {summarise(status, is_new=is_new)}".lstrip()
    result = tool_result(status, summary, unchanged=unchanged, in_summary=frozenset({"better_base"}))
    if picture is not None:
        image = ImageContent(type="image", data=b64encode(picture).decode(), mime_type="image/png")
        result.content.append(image)
    result.content.extend(links_of_status(status))
    return result


def format_refreshed(refreshed: Refreshed) -> CallToolResult:
    """Show the training that a user asked for as its job; otherwise, why there is none, or the one that starts by itself."""
    job = refreshed.job
    if job is not None and not job.only_while_free:
        preface = f"{refreshed.reason}." if refreshed.outcome == "already_training" else ""
        return format_status(job, is_new=True, preface=preface)
    return tool_result(refreshed, summarise_refresh(refreshed), in_summary=frozenset({"reason"}))


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
