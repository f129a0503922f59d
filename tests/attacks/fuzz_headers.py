"""Coverage-guided fuzzing of the parsers that read untrusted files without torch.

`make fuzz`, or by hand:

    python tests/attacks/fuzz_headers.py {gguf|safetensors|adapter_config} CORPUS [libFuzzer's options, -max_total_time=600]

The corpus is seeded with valid files. A finding is any exception except `PeftMcpError`, more than a second, or more memory
than `-rss_limit_mb` allows. Needs `pip install atheris` (Linux).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
with atheris.instrument_imports(include=["peft_core.base_models", "peft_core.adapters", "json"]):
    from peft_core.adapters.files import read_adapter
    from peft_core.adapters.tensor_check import check_tensors
    from peft_core.base_models.gguf_model import read_gguf_model
    from peft_core.base_models.safetensors import ADAPTER_LIMITS, parse_header
    from peft_core.errors import PeftMcpError
from tests.model_files import adapter_shapes, gguf_bytes, model_shapes, safetensors_bytes

SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-"))
ADAPTER = SCRATCH / "adapter"
VALID_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


def gguf(data: bytes) -> None:
    path = SCRATCH / "x.gguf"
    path.write_bytes(data)
    checkpoint = read_gguf_model(path)
    assert all(tensor.start + tensor.size <= len(data) for _, tensor in checkpoint.stored)


def safetensors(data: bytes) -> None:
    header = parse_header(data, Path("x.safetensors"), limits=ADAPTER_LIMITS)
    assert all(tensor.start + tensor.size <= len(data) for tensor in header.tensors.values())
    check_tensors(header.tensors, None, None)


def adapter_config(data: bytes) -> None:
    ADAPTER.mkdir(exist_ok=True)
    (ADAPTER / "adapter_config.json").write_bytes(data)
    files = read_adapter(ADAPTER)
    if files.settings is not None:
        assert 1 <= files.settings.rank <= 512


SEEDS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "gguf": (gguf, [gguf_bytes(), gguf_bytes(version=2), gguf_bytes(quantised=True)]),
    "safetensors": (
        safetensors,
        [safetensors_bytes(adapter_shapes(rank=1)), safetensors_bytes(model_shapes(layers=1))],
    ),
    "adapter_config": (
        adapter_config,
        [json.dumps(VALID_CONFIG | more).encode() for more in ({}, {"rank_pattern": {"q_proj": 8}}, {"init": "x"})],
    ),
}


def main() -> None:
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target, seeds = SEEDS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def fuzz(data: bytes) -> None:
        try:
            target(data)
        except PeftMcpError as error:
            assert len(str(error)) < 5_000, "a message as long as the file"  # noqa: PT017 - a fuzzer's finding

    options = [
        "-timeout=1",
        "-rss_limit_mb=768",
        "-malloc_limit_mb=256",
        "-max_len=65536",
        f"-artifact_prefix={corpus}/../",
    ]
    atheris.Setup([sys.argv[0], *options, *sys.argv[3:], str(corpus)], fuzz)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
