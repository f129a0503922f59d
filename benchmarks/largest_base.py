"""Find the largest base that trains within 2 GB: random weights in the shapes of well-known models, as 4-bit GGUF files.

Each is trained for a few steps through the manager, as a user would, with `max_memory_mb` set; the rank is the largest of
16, 8 and 4 that the planner accepts. Values of weights do not matter for memory or speed. The vocabulary is that of the
bundled base, padded to the model's size.

    python benchmarks/largest_base.py [--limit-mb 1992] [--steps 2] [--only 0.5B 1B 1.5B]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from peft_core import PEFTManager
from peft_core.base_models.resolve import bundled_path
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.schemas.results import Status
from peft_core.schemas.training import TrainingConfig

RANKS = (16, 8, 4)
UNITS = 24  # functions in the source, enough for a few steps and a held-out set
SEED = 0


@dataclass(frozen=True)
class Shape:
    """The model that it imitates, and the sizes from its configuration. All of them tie embedding and LM head."""

    like: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "0.5B": Shape("Qwen2.5-0.5B", "qwen2", 896, 4864, 24, 14, 2, 151936),
    "1B": Shape("Llama-3.2-1B", "llama", 2048, 8192, 16, 32, 8, 128256),
    "1.5B": Shape("Qwen2.5-1.5B", "qwen2", 1536, 8960, 28, 12, 2, 151936),
}
Q4, Q6, Q8 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q6_K", "Q8_0"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-mb", type=int, default=1992)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    print("| base | file | rank | estimate | measured peak | tokens/s | plan |\n|---|---|---|---|---|---|---|")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="peft-mcp-benchmark-") as directory:
            print(asyncio.run(trained(SHAPES[name], Path(directory), options)), flush=True)


async def trained(shape: Shape, root: Path, options: argparse.Namespace) -> str:
    """Train once and return a row of the table."""
    base, source = root / f"{shape.like}.gguf", root / "source"
    write_gguf(base, shape)
    write_source(source)
    manager = PEFTManager(Settings(data_dir=root / "data", max_memory_mb=options.limit_mb, default_base_model=None))
    for rank in RANKS:
        config = TrainingConfig(
            base_model=str(base), rank=rank, max_steps=options.steps, device="cpu", allow_little_data=True
        )
        try:
            queued = await manager.train_adapter("largest", str(source), config)
        except InvalidArgument as refusal:
            reason = refusal.message
        else:
            break
    else:
        return f"| {shape.like} | | | | refused: {reason} | | |"
    assert queued.estimate is not None
    async for status in manager.watch_training("largest"):
        last_status = status
    if last_status.status is not Status.COMPLETED or last_status.metrics is None:
        raise SystemExit(f"{shape.like}: {last_status.status.value}: {last_status.error}")
    metrics, plan = last_status.metrics, queued.estimate.basis.rpartition(";")[2].strip()
    peak = metrics.peak_memory_bytes or 0
    return (
        f"| {shape.like} | {base.stat().st_size / 1e9:.2f} GB | {rank} | {queued.estimate.memory_bytes / 1e9:.2f} GB "
        f"| {peak / 1e9:.2f} GB | {metrics.tokens_per_second:.1f} | {plan} |"
    )


def write_source(directory: Path) -> None:
    """Write functions with different bodies, four per file."""
    directory.mkdir()
    for file in range(UNITS // 4):
        functions = [
            f"def part_{file}_{n}(values: list[int], limit: int = {17 * file + n}) -> list[int]:\n"
            f'    """Values above {file * n}, each with its remainder by {n + 2}."""\n'
            f"    found = []\n    for value in values:\n        if value > limit * {file + 3}:\n"
            f"            found.append((value - {n}) % {file + n + 2})\n    return sorted(found)[: {n + 5}]\n"
            for n in range(4)
        ]
        (directory / f"part_{file}.py").write_text("\n\n".join(functions), encoding="utf-8")


def write_gguf(path: Path, shape: Shape) -> None:
    """Write matrices in Q4_0, the embedding in Q6_K (Q8_0 where its rows are not a multiple of 256), and norms of 1."""
    random = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(shape.like)
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    add_vocabulary(writer, shape.vocabulary)

    kv_size = shape.hidden // shape.heads * shape.kv_heads
    matrices = {
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (kv_size, shape.hidden),
        "attn_v": (kv_size, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    add_matrix(writer, "token_embd.weight", (shape.vocabulary, shape.hidden), Q8 if shape.hidden % 256 else Q6, random)
    writer.add_tensor("output_norm.weight", np.ones(shape.hidden, np.float32))
    for layer in range(shape.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(shape.hidden, np.float32))
        for name, size in matrices.items():
            add_matrix(writer, f"blk.{layer}.{name}.weight", size, Q4, random)
        if shape.architecture == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(matrices[name][0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_matrix(
    writer: gguf.GGUFWriter,
    name: str,
    size: tuple[int, int],
    kind: gguf.GGMLQuantizationType,
    random: np.random.Generator,
) -> None:
    """Add random blocks whose scales give weights of about 1/50, as in trained models."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (size[0] * size[1] // per_block, block_bytes), dtype=np.uint8)
    if kind in (Q4, Q8):  # a float16 scale, then 32 numbers: 4 bits with offset 8, or 8 bits
        blocks[:, :2] = np.frombuffer(np.float16(0.005 if kind == Q4 else 0.0003).tobytes(), np.uint8)
    else:  # 6-bit numbers, 16 scales of 8 bits, one float16 scale
        blocks[:, -18:-2] = 1
        blocks[:, -2:] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    writer.add_tensor(name, blocks.reshape(size[0], -1), raw_dtype=kind)


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Add the bundled base's vocabulary, padded with unused tokens."""
    fields = gguf.GGUFReader(bundled_path()).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    tokens, types = value("tokens"), value("token_type")
    unused = size - len(tokens)
    writer.add_tokenizer_model(value("model"))
    writer.add_tokenizer_pre(value("pre"))
    writer.add_token_list([*tokens, *(f"<|unused_{n}|>" for n in range(unused))])
    writer.add_token_types([*types, *[int(gguf.TokenType.UNUSED)] * unused])
    writer.add_token_merges(value("merges"))
    writer.add_bos_token_id(value("bos_token_id"))
    writer.add_eos_token_id(value("eos_token_id"))


if __name__ == "__main__":
    main()
