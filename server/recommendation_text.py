"""Which base model is recommended, in words: for the tool's answer, and for `peft-mcp doctor`."""

from __future__ import annotations

from peft_core.errors import sanitize
from peft_core.schemas.counts import counted
from peft_core.schemas.recommendation import BaseRecommendation, DownloadableBase, RecommendedBase
from peft_core.system.durations import rough_duration


def recommendation_lines(recommended: BaseRecommendation) -> list[str]:
    """Return the answer in lines, the recommended base models first."""
    bases = recommended.candidates
    basis = bases[0].basis if len({base.basis for base in bases}) == 1 else ""
    lines = [f"Base models on this machine that a training on {recommended.device} can use, the best for code first:"]
    lines += [f"{number}. {candidate_line(base, with_basis=not basis)}" for number, base in enumerate(bases, 1)]
    if not bases:
        lines = [f"No base model on this machine can be trained on {recommended.device}."]
    estimated_for = f"{recommended.estimated_for}{f' ({basis})' if basis else ''}"
    lines.append(f"Time is estimated for {estimated_for}. Quality on your code was not measured.")
    if recommended.download is not None:
        lines.append(download_sentence(recommended.download))
    if recommended.note:
        lines.append(f"{recommended.note}.")
    if recommended.unusable:
        lines.append("Cannot be trained here:")
        lines += [f"- {sanitize(base.base_model)}: {base.reason}." for base in recommended.unusable]
    if recommended.omitted:
        lines.append(f"- and {recommended.omitted} more; list_base_models says why.")
    if recommended.not_examined:
        lines.append(f"{recommended.not_examined} more were not examined in time; call recommend_base again.")
    return lines


def candidate_line(base: RecommendedBase, *, with_basis: bool = True) -> str:
    """Return for instance "ollama:coder:0.5b: a model for code, ...; 494M parameters in Q8_0, about 1 h for 225 steps, ..."."""
    facts = [
        f"{base.parameters / 1e6:.0f}M parameters{f' in {base.quantisation}' if base.quantisation else ''}",
        f"{_time(base.seconds)} for {counted(base.steps, 'step')}",
        f"{base.memory_bytes / 1e9:.1f} GB of memory{f' ({base.basis})' if with_basis else ''}",
    ]
    copies = f" Also here as {', '.join(map(sanitize, base.same_model))}." if base.same_model else ""
    name = f" ({sanitize(base.name)})" if base.source in ("bundled", "default") and base.name else ""
    return f"{sanitize(base.base_model)}{name}: {base.reason}; {', '.join(facts)}.{copies}"


def download_sentence(base: DownloadableBase) -> str:
    return (
        f"Worth downloading: {base.base_model} ({base.licence}, {base.download_bytes / 1e9:.1f} GB): {base.reason}; "
        f"{_time(base.seconds)} and {base.memory_bytes / 1e9:.1f} GB of memory. Download it with `{base.command}`."
    )


def _time(seconds: float | None) -> str:
    return f"about {rough_duration(seconds)}" if seconds is not None else "unknown time"
