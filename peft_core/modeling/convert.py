"""Convert a GGUF base model, once, to the Hugging Face directory that training loads. Only child processes may import this.

Configuration and names come from `gguf_model`, which the adapter check uses too; the tokenizer comes from transformers, with
a corrected pre-tokenizer.

The safetensors file is written by hand: `safetensors.serialize_file` needs all tensors in memory at the same time (4 bytes per
parameter), while this module writes blocks of rows. transformers' GGUF loading holds two copies and takes four times as long.
`gguf.quants` dequantises, not `modeling.ggml`, because it also supports the rarer formats (Q2_K, Q3_K, IQ*), which can be
used only through this conversion. For common formats both agree bit for bit (tests/unit/modeling/test_ggml.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo, join_some, unusable
from peft_core.base_models.families import SPLIT_RULES, SplitRule
from peft_core.base_models.fingerprint import fingerprint
from peft_core.base_models.gguf_model import hugging_face_name, permuted_heads
from peft_core.errors import StorageError
from peft_core.schemas.base_model import Base
from peft_core.system import in_use
from peft_core.system.files import fsync_directory, fsync_file, open_regular, read_exactly
from peft_core.system.lock import FileLock

FORMAT = 4  # version of the result; increment it to invalidate cached conversions
BLOCK_BYTES = 4 << 20  # quantised rows that are converted at a time
_SLACK_BYTES = 64 << 20  # tokenizer, configuration, file system
_TEMPORARY = ".converting-"


def ensure_hf_directory(base: Base, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """Return the Hugging Face directory of a base model: its own, or one converted from GGUF and cached in `cache_dir`.

    `report` receives a sentence before each step that takes long. One conversion at a time runs in `cache_dir`; a second
    process waits and then uses the result. This process holds a converted directory (`system.in_use`).

    Raises:
        BaseCheckpointError: The files have changed since they were resolved, or cannot be converted.
        StorageError: There is not enough free disk space for the converted weights.
    """
    if not fingerprint(base.path).same_weights(base.fingerprint):
        raise unusable(base.path, "its files have changed since the request", "Repeat the request")
    if base.format == "huggingface":
        return base.path
    target = cache_dir / conversion_key(base)
    cache_dir.mkdir(parents=True, exist_ok=True)
    in_use.hold(target)
    if target.is_dir():
        return target
    with _conversion_lock(cache_dir, report):
        if target.is_dir():
            return target
        for leftover in cache_dir.glob(f"{_TEMPORARY}*"):  # left by killed processes: a running one holds the lock
            shutil.rmtree(leftover, ignore_errors=True)
        _check_space(cache_dir, base)
        report(f"Converting {base.name} from GGUF, once, to {4 * base.shape.parameters / 1e6:.0f} MB in {cache_dir}")
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=cache_dir))
        try:
            _convert(read_checkpoint(base.path), temporary, base.name)
            if cache_dir / conversion_key(base) != target:
                raise unusable(base.path, "its files have changed while they were converted", "Repeat the request")
            for file in temporary.iterdir():
                fsync_file(file)
            fsync_directory(temporary)
            temporary.rename(target)
            fsync_directory(cache_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def conversion_key(base: Base) -> str:
    """Return the directory name of a conversion; it depends on the content of the file, not on its path.

    It covers the complete header of the GGUF file, including vocabulary and chat template: a file with the weights of another
    model but its own template must not share that model's cache entry.
    """
    content = [
        FORMAT,
        base.fingerprint.architecture,
        base.fingerprint.sample,
        base.size_bytes,
        _hash_of_header(base.path),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _hash_of_header(path: Path) -> str:
    starts = [tensor.start for file, tensor in read_checkpoint(path).stored if file == path]
    end = min(starts, default=path.stat().st_size)  # the first file of a split model may have no tensors
    hashed = hashlib.sha256()
    with open_regular(path, follow_links=True) as descriptor:
        for start in range(0, end, BLOCK_BYTES):
            hashed.update(read_exactly(descriptor, min(BLOCK_BYTES, end - start), start, path))
    return hashed.hexdigest()


@contextmanager
def _conversion_lock(cache_dir: Path, report: Callable[[str], None]) -> Iterator[None]:
    with FileLock(cache_dir / ".lock") as lock:
        if not lock.acquire():
            report("Waiting for another process to convert a base model")
            lock.acquire(timeout_s=math.inf)
        yield


def _check_space(cache_dir: Path, base: Base) -> None:
    needed, free = 4 * base.shape.parameters + _SLACK_BYTES, shutil.disk_usage(cache_dir).free
    if free < needed:
        raise StorageError(
            f"Converting {base.name} needs {needed} bytes in {cache_dir}, but only {free} are free.",
            suggestions=(
                "Free disk space there",
                "Or set CODEBASE_GARDENER_DATA_DIR to a larger disk",
                "Or use the model's Hugging Face directory, which needs no conversion",
            ),
            details={"path": str(cache_dir), "needed_bytes": needed, "free_bytes": free},
        )


def write_tokenizer(path: Path, target: Path) -> None:
    """Write what the conversion of a GGUF file contains besides weights: its tokenizer, and the configuration.

    Raises:
        BaseCheckpointError: The file cannot be used.
    """
    checkpoint = read_checkpoint(path)
    config = _configuration(checkpoint)
    config.save_pretrained(target)
    _generation_config(checkpoint, config).save_pretrained(target)
    _tokenizer(checkpoint, target).save_pretrained(target)


def _configuration(checkpoint: Checkpoint) -> Any:
    settings = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
    return AutoConfig.for_model(checkpoint.config["model_type"], **settings, dtype="float32")


def _convert(checkpoint: Checkpoint, target: Path, name: str) -> None:
    config = _configuration(checkpoint)
    _check_names(checkpoint, config)
    config.save_pretrained(target)
    _add_to_config(target / "config.json", name)
    _generation_config(checkpoint, config).save_pretrained(target)
    with (target / "model.safetensors").open("wb") as file:
        _write_weights(checkpoint, file)
    _tokenizer(checkpoint, target).save_pretrained(target)


def _add_to_config(path: Path, name: str) -> None:
    """Add the model's name, which people see, and the base of the rotary embedding where mlx-lm and transformers 4 read it.

    mlx-lm would silently take 10 000.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["_name_or_path"] = name
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _generation_config(checkpoint: Checkpoint, config: Any) -> GenerationConfig:
    """Return how to generate: a turn of a chat may end with another token than a text."""
    generation = GenerationConfig.from_model_config(config)
    end_of_turn = checkpoint.vocabulary.end_of_turn if checkpoint.vocabulary is not None else None
    if end_of_turn is not None and end_of_turn != config.eos_token_id:
        generation.eos_token_id = [config.eos_token_id, end_of_turn]
    return generation


def _check_names(checkpoint: Checkpoint, config: Any) -> None:
    """Check that the file has exactly the parameters of the model that transformers builds from the configuration."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if expected != dict(checkpoint.shapes):
        differences = [f"{name} {shape}" for name, shape in sorted(expected.items() ^ checkpoint.shapes.items())]
        raise unusable(
            checkpoint.path,
            f"its tensors are not those of {config.architectures[0]}: {join_some(differences)}",
            "Use the model's Hugging Face directory",
        )


def _write_weights(checkpoint: Checkpoint, file: BinaryIO) -> None:
    """Write every tensor in float32 to one safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    tensors = [(path, tensor, name) for path, tensor in checkpoint.stored if (name := hugging_face_name(tensor.name))]
    for _, tensor, name in tensors:
        end = position + 4 * int(np.prod(tensor.shape))
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for path, tensor, _ in tensors:
        file.writelines(block.data for block in _rows(path, tensor, permuted_heads(checkpoint.config, tensor.name)))


def _rows(path: Path, tensor: TensorInfo, heads: int | None) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Yield the rows of a tensor in float32, in blocks, in Hugging Face's order."""
    kind = GGMLQuantizationType[tensor.dtype]
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    stored = np.fromfile(path, np.uint8, count=tensor.size, offset=tensor.start).reshape(rows, -1)
    if heads is not None:
        if len(tensor.shape) == 1:
            stored = stored.reshape(tensor.shape[0], -1)
        stored = stored[_row_order(len(stored), heads)]
    step = max(1, BLOCK_BYTES // max(stored.shape[1], 1))
    for start in range(0, len(stored), step):
        try:
            block = dequantize(stored[start : start + step], kind)
        except NotImplementedError as error:
            advice = "Use a GGUF file of another quantisation, such as Q8_0 or F16"
            raise unusable(path, f"its quantisation {tensor.dtype} is not supported", advice) from error
        yield np.ascontiguousarray(block, dtype=np.float32)


def _row_order(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Return the GGUF row index of each row of q or k; GGUF interleaves the two halves of each head."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)


def _tokenizer(checkpoint: Checkpoint, target: Path) -> PreTrainedTokenizerFast:
    # Load through a link in an empty directory: the original directory may contain tokenizer files of another model.
    link = target / "source.gguf"
    link.symlink_to(checkpoint.path.absolute())
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            target, gguf_file=link.name, local_files_only=True
        )
    finally:
        link.unlink()
    if len(tokenizer) > checkpoint.shape.vocab_size:
        raise unusable(
            checkpoint.path,
            f"its tokenizer has {len(tokenizer)} tokens, but its embedding has {checkpoint.shape.vocab_size} rows",
        )
    vocabulary = checkpoint.vocabulary
    if vocabulary is None:
        return tokenizer
    if vocabulary.split_rule is not None:
        _set_split(tokenizer.backend_tokenizer, SPLIT_RULES[vocabulary.split_rule])
    elif not vocabulary.adds_space:
        _add_no_space(tokenizer.backend_tokenizer)
    tokenizer.add_bos_token = vocabulary.adds_bos  # type: ignore[misc]  # mypy does not see the setter
    tokenizer.add_eos_token = False  # type: ignore[misc]  # examples get their own
    tokenizer.update_post_processor()
    return tokenizer


def _set_split(tokenizer: Tokenizer, rule: SplitRule) -> None:
    """Make the tokenizer split text by the rule with which its vocabulary was learned.

    transformers (5.23) knows the rules of Llama 3 and Qwen2, and uses GPT-2's for every other. For SmolLM2 that gives
    other tokens wherever several spaces precede a digit: in 15 % of Python files, up to 28 % more tokens in tables.
    """
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns
    ]
    if rule.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2_pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule.whole_words_first:
        tokenizer.model.ignore_merges = True


def _add_no_space(tokenizer: Tokenizer) -> None:
    """Let a SentencePiece tokenizer put no space before a text: transformers (5.23) reads the setting, but does not use it."""
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
