"""Write each target into the job's directory, and verify it."""

from __future__ import annotations

from peft_core.export.worker.gguf_lora import llama_cpp_format, write_gguf_lora
from peft_core.export.worker.hf_gguf import write_hf_gguf
from peft_core.export.worker.job import Job, Written
from peft_core.export.worker.model_gguf import file_bytes, require_space, write_model_gguf
from peft_core.export.worker.verify_llamacpp import verify_lora, verify_merged

# Measured on the bundled base model: the part of an adapter's gain that is lost by merging into each format.
LOST = {"q8_0": "1 %", "q5_1": "several per cent", "q5_0": "several per cent", "q4_1": "59 %", "q4_0": "32 %"}


def write_gguf_lora_target(job: Job) -> Written:
    """A LoRA file beside the base model: small, switched on and off at will, and loses nothing on a quantised base model."""
    path = job.directory / f"{job.name}-lora-{job.request.format}.gguf"
    require_space(
        job.directory, 8 * sum(pair.a_RI.size + pair.b_OR.size for pair in job.lora.pairs.values()), "The export"
    )
    write_gguf_lora(job.lora, job.base, path, job.request.format)
    base = str(job.base.path) if job.base.format == "gguf" else "BASE.gguf"
    return Written(
        form=f"a LoRA file for llama.cpp ({job.request.format.upper()})",
        verification=verify_lora(job, path),
        usage=[
            f"llama-server -m {base} --lora {path} --host 127.0.0.1",
            f"Ollama up to 0.34.0: a Modelfile with `FROM {base}` and `ADAPTER {path}`; later versions take a merged model",
            f"BASE must be {job.base.name}: llama.cpp does not check it",
        ],
    )


def write_merged_target(job: Job) -> Written:
    """The base model with the adapter in its weights: every runtime takes it."""
    kind = job.request.format
    path = job.directory / f"{job.name}-{kind}.gguf"
    llama_cpp_format(job.base)
    require_space(job.directory, file_bytes(job.base, kind), "The export")
    if job.base.format == "gguf":
        write_model_gguf(job.base, job.lora, path, kind)
    else:
        write_hf_gguf(job.base, job.lora, path, kind)
    verification = verify_merged(job, path, kind)
    if kind in LOST:
        kept = f"; of this one, {100 * verification.kept:.0f} % was kept here" if verification.kept is not None else ""
        advice = (
            ""
            if kind == "q8_0"
            else " A LoRA file beside the quantised base model (to='gguf-lora') loses almost nothing."
        )
        lost = f"of the gain of a 135M model, {LOST[kind]} was lost{kept}"
        job.warnings.append(f"Merging into {kind.upper()} rounds a part of the update away: {lost}.{advice}")
    return Written(
        form=f"a merged model ({kind.upper()} GGUF)",
        verification=verification,
        usage=[
            f"llama-server -m {path} --host 127.0.0.1",
            f"Ollama: a Modelfile with `FROM {path}`, then `ollama create NAME -f Modelfile`",
            f"LM Studio: `lms import {path}`",
        ],
    )
