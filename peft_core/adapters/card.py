"""The model card of an adapter (its README.md, which the Hub displays), generated offline from the manifest alone."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_core.adapters.manifest import Manifest
from peft_core.base_models.hub_cache import parse_hub_ref
from peft_core.schemas.counts import counted
from peft_core.schemas.evaluation import Comparison, Evaluation


def render_card(manifest: Manifest) -> str:
    """Return a Hub model card: Markdown with a metadata block. It names no file of the training data and no local path."""
    data = ModelCardData(
        base_model=hub_id(manifest.base.name),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "code", "peft-mcp"],
        model_name=f"{manifest.project_id} on {manifest.base.name}",
        eval_results=_eval_results(manifest),
    )
    sections = (_summary, _measured_effect, _usage, _data, _training)
    body = "\n\n".join(section(manifest) for section in sections)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    return f"{card.content}\n"


def hub_id(name: str) -> str | None:
    """Return a base model's name if it can be a hub id: the Hub rejects a card with any other base_model, such as Ollama's."""
    return name if parse_hub_ref(name) is not None else None


def _eval_results(manifest: Manifest) -> list[EvalResult] | None:
    measured = {"perplexity": manifest.metrics.adapter_perplexity, "loss": manifest.metrics.adapter_loss}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"held-out files of {manifest.project_id}",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in measured.items()
        if value is not None
    ]
    return results or None


def _summary(manifest: Manifest) -> str:
    return (
        f"# {manifest.project_id}: a LoRA adapter for {manifest.base.name}\n\n"
        f"This adapter specialises {manifest.base.name} ({manifest.base.model_type}, "
        f"{manifest.base.shape.parameters / 1e6:.0f}M parameters) in the code of one project. "
        "It was trained with peft-mcp on one machine; the training data never left that machine."
    )


def _measured_effect(manifest: Manifest) -> str:
    metrics, held_out = manifest.metrics, counted(manifest.data.summary.held_out_examples, "held-out example")
    return (
        "## Measured effect\n\n"
        f"Measured on {held_out}, from files that were not trained on:\n\n"
        "| | loss (nats per token) | perplexity |\n|---|---|---|\n"
        f"| base model | {_number(metrics.base_loss)} | {_number(metrics.base_perplexity)} |\n"
        f"| with this adapter | {_number(metrics.adapter_loss)} | {_number(metrics.adapter_perplexity)} |"
        f"{_evaluation(manifest.evaluation)}"
    )


def _evaluation(evaluation: Evaluation | None) -> str:
    """Return the verdict and a table of all comparisons with their confidence intervals; empty if there is no evaluation."""
    if evaluation is None:
        return ""
    comparisons = {
        "loss": evaluation.loss,
        "next line exact": evaluation.next_line,
        "edit similarity": evaluation.edit_similarity,
        **{metric.in_words: share for metric, share in evaluation.in_file.items()},
        "loss on general code": evaluation.general_loss,
    }
    rows = [
        f"| {name} | {_number(compared.base)} | {_number(compared.adapter)} | {compared.change:+.3f} | {_interval(compared)} |"
        for name, compared in comparisons.items()
        if compared is not None
    ]
    caveats = "".join(f" {caveat}" for caveat in evaluation.caveats)
    return (
        f"\n\nVerdict: **{evaluation.verdict}**, as {evaluation.reason}.{caveats}\n\n"
        "| | base model | with this adapter | change | 95 % confidence interval |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + (f"\n\n{evaluation.catch_up.in_words}" if evaluation.catch_up is not None else "")
        + (f"\n\n{evaluation.memorisation.in_words}" if evaluation.memorisation is not None else "")
        + f"\n\nThe intervals come from a paired bootstrap over {evaluation.resampled}, for general code over its functions "
        f"({counted(evaluation.files, 'file')}, {counted(evaluation.examples, 'example')}, "
        f"{counted(evaluation.lines, 'line')}, {counted(evaluation.prompts, 'prompt')})."
    )


def _interval(compared: Comparison) -> str:
    if compared.low is None or compared.high is None:
        return "too little data"
    return f"{compared.low:+.3f} to {compared.high:+.3f}"


def _usage(manifest: Manifest) -> str:
    return (
        "## Use\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = "path/to/{manifest.base.name}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(base)\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "path/to/this/adapter")\n'
        "```\n\n"
        "Use it only with this base model: it loads without a warning on any model of the same shape, but degrades its output."
    )


def _data(manifest: Manifest) -> str:
    summary = manifest.data.summary
    languages = ", ".join(
        f"{language} {count}" for language, count in sorted(manifest.data.languages.items(), key=lambda item: -item[1])
    )
    lines = [
        f"- trained on {manifest.trained_on}",
        f"- held out: {counted(summary.held_out_examples, 'example')}, {summary.held_out_tokens} tokens",
        f"- files by language: {languages or 'unknown'}",
        f"- secrets removed: {summary.secrets_removed}",
    ]
    if manifest.data.repository_commit is not None:
        changes = ", with uncommitted changes" if manifest.data.repository_dirty else ""
        lines.append(f"- repository commit: {manifest.data.repository_commit}{changes}")
    for repository in manifest.data.repositories:
        changes = ", with uncommitted changes" if repository.dirty else ""
        lines.append(f"- commit of {repository.name}: {repository.commit or 'unknown'}{changes}")
    return "## Data\n\n" + "\n".join(lines)


def _training(manifest: Manifest) -> str:
    run, config = manifest.run, manifest.run.config
    scaling = "alpha/sqrt(rank)" if config.use_rslora else "alpha/rank"
    rates = "{:g} for A and {:g} for B".format(*config.rates)
    lines = [
        f"- LoRA rank {config.rank}, alpha {config.lora_alpha:g}, scaled by {scaling}; dropout {config.dropout:g}",
        f"- modules: {', '.join(run.target_modules)}",
        f"- {counted(run.steps, 'step')} of {counted(config.batch_size, 'example')}, at most {config.max_length} tokens each",
        f"- AdamW, learning rate {rates}",
        f"- {config.lr_scheduler} schedule after {config.warmup_ratio:.0%} warm-up; seed {config.seed}",
        f"- device: {run.device}; frozen weights in {run.weights_dtype}",
    ]
    if run.device_check:
        lines.append(f"- {run.device_check}")
    if run.continued_from is not None:
        lines.append(
            f"- continued from {run.continued_from}; {manifest.data.summary.replayed_examples} of the prepared examples were "
            "known to it, the others are new or have changed"
        )
    lines += [
        f"- at step {event.step} {event.reason}: rolled back to step {event.back_to_step}, and continued "
        f"with 1/{1 / event.factor:g} of the learning rate"
        for event in run.rate_lowered
    ]
    lines += [f"- memory ran out at step {event.step}: {event.measure} from then on" for event in run.memory_saved]
    if run.weights_in_words:
        lines.append(f"- the weights are {run.weights_in_words}")
    if manifest.metrics.wall_s is not None:
        lines.append(f"- total time: {manifest.metrics.wall_s:.0f} s")
    environment = ", ".join(f"{name} {version}" for name, version in manifest.environment.items())
    return "## Training\n\n" + "\n".join(lines) + f"\n\nVersions: {environment}."


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
