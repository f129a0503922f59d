"""Load a written GGUF file in llama.cpp, in a process of its own, and compare its log-probabilities with PEFT's."""

from __future__ import annotations

from pathlib import Path

from peft_core.errors import DataError, ExportError, StorageError
from peft_core.export.worker.compare import LIMITS, TOP, HeldOutText, Reference, compare_scores
from peft_core.export.worker.job import Job
from peft_core.llamacpp import runtime
from peft_core.llamacpp.worker import score
from peft_core.llamacpp.worker.base_file import base_in_f16, can_write_base
from peft_core.llamacpp.worker.hf_gguf import write_hf_gguf
from peft_core.llamacpp.worker.model_gguf import file_bytes, require_space, write_model_gguf
from peft_core.llamacpp.worker.server import threads_for
from peft_core.schemas.export import Verification
from peft_core.system.child_process import run_json_child
from peft_core.system.packages import install_extra

_SECONDS_PER_PARAMETER = 6e-6  # time limit, a hundred times what the bundled base model takes
_MIN_SECONDS = 600.0


def verify_lora(job: Job, lora: Path) -> Verification:
    """Compare a LoRA file on the base model in F16, with and without it.

    Raises:
        ExportError: llama.cpp refuses the file or computes something else.
    """
    how = (
        f"then export again with overwrite=true. By hand: `llama-perplexity -m BASE-F16.gguf --lora {lora.name} -f CODE.txt` "
        "must give a lower perplexity than without --lora"
    )
    reason = _reason_not_to(job, how)
    if reason is not None:
        return Verification(status="not_verified", reason=reason)
    text, ours = job.results_of_peft()
    try:
        model = base_in_f16(job.base, job.request.base_models_dir, job.say)
    except StorageError as error:
        return Verification(status="not_verified", reason=f"{error.message} Free the space, {how}.")
    job.say("comparing in llama.cpp")
    scores = _scores(job, model, lora, text.documents)
    return compare_scores(text, ours, scores, "f16")


def verify_merged(job: Job, merged: Path, kind: str) -> Verification:
    """Compare a merged model. Its base model without the adapter is measured in F16.

    Rounding to fewer than 8 bits changes the results so much that it would hide a wrong conversion: the same merge is then
    first written and compared in F16.

    Raises:
        ExportError: llama.cpp refuses the file or computes something else.
    """
    how = (
        "then export again with overwrite=true. By hand: `llama-perplexity -m FILE.gguf -f CODE.txt` must give a lower "
        "perplexity than the base model"
    )
    reason = _reason_not_to(job, how)
    if reason is not None:
        return Verification(status="not_verified", reason=reason)
    text, ours = job.results_of_peft()
    if kind not in LIMITS:
        _verify_in_f16(job, text, ours)
    job.say("comparing in llama.cpp")
    scores = _scores(job, merged, None, text.documents)
    try:
        base = base_in_f16(job.base, job.request.base_models_dir, job.say)
    except StorageError:
        job.warnings.append("The gain in llama.cpp was not measured: the base model in F16 does not fit on the disk.")
    else:
        job.say("measuring the base model in llama.cpp")
        without = _scores(job, base, None, text.documents)
        scores = scores.model_copy(update={"without_adapter": without.with_adapter})
    return compare_scores(text, ours, scores, kind)


def _verify_in_f16(job: Job, text: HeldOutText, ours: Reference) -> None:
    job.say("comparing the merge in F16 in llama.cpp")
    temporary = job.directory / "merged-f16.gguf"
    require_space(job.directory, file_bytes(job.base, "f16"), "Comparing the merge in F16")
    write_merged(job, temporary, "f16")
    try:
        compare_scores(text, ours, _scores(job, temporary, None, text.documents), "f16")
    finally:
        temporary.unlink()


def write_merged(job: Job, path: Path, kind: str) -> None:
    """Write the base model with the adapter in its weights as GGUF.

    Raises:
        ExportError: A weight is too large, or the tokenizer cannot be written.
    """
    if job.base.format == "gguf":
        write_model_gguf(job.base, job.lora, path, kind)
    else:
        write_hf_gguf(job.base, job.lora, path, kind)


def _reason_not_to(job: Job, how: str) -> str | None:
    if not runtime.is_installed():
        return f"llama.cpp is not installed here: `{install_extra('llamacpp')}`, {how}."
    if not can_write_base(job.base):
        return (
            f"peft-mcp cannot write a base model of the family {job.base.model_type!r} as GGUF to compare with. By hand: "
            "convert it with llama.cpp's convert_hf_to_gguf.py --outtype f16, and compare its answers with generate's."
        )
    if (missing := job.memory_missing) is not None:
        return f"{missing}. Free the memory, then export again with overwrite=true."
    return None


def _scores(job: Job, model: Path, lora: Path | None, documents: tuple[tuple[int, ...], ...]) -> score.LlamaScores:
    parameters = job.base.shape.parameters
    request = score.LlamaRequest(
        model=model,
        lora=lora,
        documents=documents,
        top=TOP,
        threads=threads_for(job.base),
    )
    try:
        return run_json_child(
            score.__name__,
            request,
            score.LlamaScores,
            timeout_s=_MIN_SECONDS + _SECONDS_PER_PARAMETER * parameters,
            action="The comparison in llama.cpp",
            on_timeout=("Close other programs, and export again",),
        )
    except DataError as error:
        code = {"inspection_failed": "export_not_loadable", "inspection_timeout": "export_timeout"}.get(
            error.code, error.code
        )
        raise ExportError(error.message, code=code, suggestions=error.suggestions) from error
