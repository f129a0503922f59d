"""Write each target into the job's directory, and verify it."""

from __future__ import annotations

import shlex

from peft_core.adapters.manifest import CARD_NAME
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.huggingface import read_json
from peft_core.base_models.layouts import TIED, is_tied
from peft_core.export.worker import editors
from peft_core.export.worker.directories import write_for_hub, write_mlx, write_normalised
from peft_core.export.worker.job import Job, Written
from peft_core.export.worker.merged_directory import write_merged_directory
from peft_core.export.worker.verify_llamacpp import verify_lora, verify_merged, write_merged
from peft_core.export.worker.verify_peft import verify_directory, verify_merged_directory
from peft_core.llamacpp.worker.gguf_lora import llama_cpp_format, write_gguf_lora
from peft_core.llamacpp.worker.model_gguf import file_bytes, require_space

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank accepts
VLLM_RUNNING = (
    "A running vLLM loads it (started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True): export with "
    "vllm_address=http://127.0.0.1:8000"
)
MLX_TRAP = (
    "mlx-lm reads rope_theta at the top of the base model's config.json only, and otherwise takes 10000: add it there if it is "
    "in rope_parameters"
)
# Measured on the bundled base model: the part of an adapter's gain that is lost by merging into each format.
LOST = {
    "q8_0": "1 %",
    "q6_k": "2 %",
    "q5_k_m": "5 to 32 %",
    "q5_1": "several per cent",
    "q5_0": "several per cent",
    "q4_k_m": "9 to 11 %",
    "q4_1": "59 %",
    "q4_0": "32 %",
}


def _warn_of_own_head(job: Job) -> None:
    """Warn of a base model whose configuration says that its output head is the embedding, although it has one of its own."""
    if is_tied(read_json(job.hf_directory / "config.json")) and not read_checkpoint(job.base.path).config[TIED]:
        job.warnings.append(
            f"The config.json of {job.base.name} says that its output head is the embedding, but its weights have a head of "
            f'its own, which vLLM and mlx-lm then do not load: set "{TIED}": false there before you serve it.'
        )


def write_gguf_lora_target(job: Job) -> Written:
    """A LoRA file beside the base model: small, switched on and off at will, and loses nothing on a quantised base model."""
    path = job.directory / f"{job.name}-lora-{job.request.format}.gguf"
    require_space(
        job.directory, 8 * sum(pair.a_RI.size + pair.b_OR.size for pair in job.lora.pairs.values()), "The export"
    )
    write_gguf_lora(job.lora, job.base, path, job.request.format)
    base, file = job.base_gguf, job.final(path.name)
    instructions = f"`FROM {job.base_gguf_path}` and `ADAPTER {job.request.directory / path.name}`"
    return Written(
        form=f"a LoRA file for llama.cpp ({job.request.format.upper()})",
        verification=verify_lora(job, path),
        usage=[
            f"llama-server -m {base} --lora {file} --host 127.0.0.1",
            f"Ollama up to 0.34.0: a Modelfile with {instructions}; later versions take a merged model",
            f"The base model must be {job.base.name}: llama.cpp does not check it",
        ],
    )


def write_merged_target(job: Job) -> Written:
    """The base model with the adapter in its weights: every runtime takes it."""
    kind = job.request.format
    if kind == "huggingface":
        weights = write_merged_directory(job)
        return Written(
            form=f"a merged Hugging Face model ({weights})",
            verification=verify_merged_directory(job, weights),
            usage=[
                f"vllm serve {job.final()} --served-model-name {job.name}",
                f"transformers: AutoModelForCausalLM.from_pretrained({str(job.request.directory)!r})",
                f"Other GGUF types: `convert_hf_to_gguf.py {job.final()}` and `llama-quantize` of llama.cpp",
            ],
        )
    path = job.directory / f"{job.name}-{kind}.gguf"
    llama_cpp_format(job.base)
    require_space(job.directory, file_bytes(job.base, kind), "The export")
    write_merged(job, path, kind)
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
            f"llama-server -m {job.final(path.name)} --host 127.0.0.1",
            f"Ollama: a Modelfile with `FROM {job.request.directory / path.name}`, then `ollama create NAME -f Modelfile`",
            f"LM Studio: `lms import {job.final(path.name)}`",
        ],
    )


def write_vllm_target(job: Job) -> Written:
    """PEFT's format, normalised so that vLLM, SGLang and other servers read the same out of it."""
    write_normalised(job)
    _warn_of_own_head(job)
    base, name_and_path = shlex.quote(str(job.hf_directory)), f"{job.name}={job.final()}"
    rank = next(size for size in VLLM_RANKS if size >= job.lora.rank)
    return Written(
        form="a normalised PEFT directory for vLLM and other servers",
        verification=verify_directory(job),
        usage=[
            f"vllm serve {base} --served-model-name base --enable-lora --max-lora-rank {rank} --lora-modules {name_and_path}",
            f'then ask for "model": "{job.name}"',
            *([] if job.request.vllm is not None else [VLLM_RUNNING]),
            f"SGLang: --enable-lora --max-lora-rank {rank} --lora-target-modules all --lora-paths {name_and_path}",
        ],
    )


def write_mlx_target(job: Job) -> Written:
    write_mlx(job)
    _warn_of_own_head(job)
    base = shlex.quote(str(job.hf_directory))
    return Written(
        form="an adapter for mlx-lm",
        verification=verify_directory(job),
        usage=[
            f"mlx_lm.server --model {base} --adapter-path {job.final()}",
            f"For LM Studio: mlx_lm.fuse --model {base} --adapter-path {job.final()} --save-path FUSED",
            *([] if "rope_theta" in read_json(job.hf_directory / "config.json") else [MLX_TRAP]),
        ],
    )


def write_hub_target(job: Job) -> Written:
    """PEFT's format and a model card, for publishing."""
    write_for_hub(job)
    return Written(
        form="a directory for the Hub",
        verification=verify_directory(job),
        usage=[
            f"hf upload USER/NAME {job.final()}",
            f"Read {CARD_NAME} first: it names the project and the repository's commit, but no files and no code",
        ],
    )


def write_editors_target(job: Job) -> Written:
    """A LoRA file, and settings of editors that complete code with it."""
    marks, name = editors.fill_in_the_middle_of(job), editors.model_name(job)
    written = write_gguf_lora_target(job)
    editors.write_editor_settings(job.directory, name, marks)
    file = job.final(f"{job.name}-lora-{job.request.format}.gguf")
    start = f"llama-server -m {job.base_gguf} --lora {file} --alias {name} --host 127.0.0.1 --port {editors.PORT}"
    return Written(
        form="a LoRA file with settings for llama.vscode, llama.vim, Continue and Zed",
        verification=written.verification,
        usage=[
            f"{start} -c 2048 -b 512",
            f"then copy the settings of your editor from {job.final()}",
            *written.usage[2:],
        ],
    )
