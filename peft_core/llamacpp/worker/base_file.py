"""The base model as one GGUF file in F16, in which llama.cpp computes what PEFT computes in float32."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path

from peft_core.llamacpp.worker.gguf_vocabulary import read_vocabulary
from peft_core.llamacpp.worker.hf_gguf import can_write, write_hf_gguf
from peft_core.llamacpp.worker.model_gguf import file_bytes, is_exact, require_space, write_model_gguf
from peft_core.modeling.convert import conversion_key
from peft_core.schemas.base_model import Base
from peft_core.system import in_use


def can_write_base(base: Base, *, for_text: bool = False) -> bool:
    """Return whether `base_in_f16` can write this base model; `for_text`: with its own tokenizer, so as to generate text."""
    return base.format == "gguf" or (can_write(base) and not (for_text and read_vocabulary(base) is None))


def base_in_f16(base: Base, cache: Path, say: Callable[[str], None]) -> Path:
    """Return the base model's own file if it is not quantised, otherwise one that is written once beside the converted bases.

    This process holds such a file (`system.in_use`).

    Args:
        base: A base model for which `can_write_base` is true.
        cache: The directory of converted base models.
        say: Reports that the file is being written, which takes seconds to minutes.

    Raises:
        StorageError: There is no space for it.
        BaseCheckpointError: Its quantisation is not supported.
    """
    if is_exact(base):
        return base.path
    target = cache / f"{_key(base)}.f16.gguf"
    cache.mkdir(parents=True, exist_ok=True)
    in_use.hold(target)
    if target.is_file():
        return target
    require_space(cache, file_bytes(base, "f16"), f"Writing {base.name} in F16 for llama.cpp")
    say(f"writing {base.name} in F16 for llama.cpp, once")
    temporary = cache / f".{target.name}.{secrets.token_hex(4)}"
    try:
        if base.format == "gguf":
            write_model_gguf(base, None, temporary, "f16")
        else:
            write_hf_gguf(base, None, temporary, "f16")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _key(base: Base) -> str:
    if base.format == "gguf":
        return conversion_key(base)
    content = [base.fingerprint.architecture, base.fingerprint.sample, base.size_bytes]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
