"""Frozen matrices, in memory and mapped from tiny files of both formats. O rows, I columns."""

from __future__ import annotations

import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo
from peft_core.base_models.gguf_model import hugging_face_name, permuted_heads, read_gguf_model
from peft_core.errors import BaseCheckpointError, HeaderError
from peft_core.modeling.convert import _rows
from peft_core.modeling.ggml import PLAIN, bytes_per_row
from peft_core.modeling.quantised import QuantisedMatrix, open_stored
from tests.model_files import GGUF_SHAPES, SHAPES, gguf_bytes, weights, write_model
from tests.unit.modeling.test_ggml import assert_same_bits

Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def as_tensors(values: dict[str, list[float]], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values[name], dtype=dtype).view(shape) for name, shape in SHAPES.items()}


def random_gguf(path: Path) -> Checkpoint:
    """Write the tiny model with Q8_0 matrices of random bytes, so that no two rows are alike."""
    path.write_bytes(gguf_bytes(quantised=True))
    checkpoint = read_gguf_model(path)
    content, generator = bytearray(path.read_bytes()), np.random.default_rng(0)
    for _, tensor in checkpoint.stored:
        content[tensor.start : tensor.start + tensor.size] = generator.bytes(tensor.size)
    path.write_bytes(content)
    return checkpoint


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # random scales are infinite too
def test_a_gguf_file_opens_with_the_weights_of_its_conversion(tmp_path: Path) -> None:
    checkpoint = random_gguf(tmp_path / "m.gguf")
    stored = open_stored(checkpoint)
    assert {name: matrix.shape for name, matrix in stored.matrices.items()} | {
        name: tuple(vector.shape) for name, vector in stored.vectors.items()
    } == SHAPES
    assert {matrix.kind for matrix in stored.matrices.values()} == {"Q8_0"}
    for path, tensor in checkpoint.stored:
        name = hugging_face_name(tensor.name) or ""
        converted = np.concatenate(list(_rows(path, tensor, permuted_heads(checkpoint.config, tensor.name))))
        found = stored.matrices[name].dequantise_all() if name in stored.matrices else stored.vectors[name]
        assert_same_bits(found, torch.from_numpy(converted).view(found.shape))


def test_rows_of_q_and_k_are_restored_to_hugging_face_order(tmp_path: Path) -> None:
    values = weights()
    expected = as_tensors(values)
    for name, matrix_OI in expected.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads is not None:  # `permute` in llama.cpp's convert_hf_to_gguf.py
            rows, columns = matrix_OI.shape
            mixed = matrix_OI.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            values[name] = mixed.flatten().tolist()
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(values=values))
    stored = open_stored(read_gguf_model(tmp_path / "m.gguf"))
    for name, matrix in stored.matrices.items():
        assert_same_bits(matrix.dequantise_all(), expected[name])


def test_a_bias_of_q_is_reordered_like_its_matrix(tmp_path: Path) -> None:
    bias = torch.arange(32.0)
    rows = {"q": 32, "k": 16, "v": 16, "output": 32}
    biases = {f"blk.{layer}.attn_{name}.bias": (size,) for layer in range(2) for name, size in rows.items()}
    shapes = {**GGUF_SHAPES, **biases}
    values = weights(shapes={hugging_face_name(name) or "": shape for name, shape in shapes.items()})
    name = "model.layers.0.self_attn.q_proj.bias"
    values[name] = bias.view(4, 2, 4).swapaxes(1, 2).flatten().tolist()
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(shapes=shapes, values=values))
    assert_same_bits(open_stored(read_gguf_model(tmp_path / "m.gguf")).vectors[name], bias)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_hugging_face_directory_opens_in_its_own_type(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    directory = write_model(tmp_path / "m", shards=shards, dtype=kind, values=weights())
    stored = open_stored(read_checkpoint(directory))
    expected = as_tensors(weights(), dtype)
    assert stored.matrices.keys() | stored.vectors.keys() == SHAPES.keys()
    for name, matrix in stored.matrices.items():
        assert matrix.kind == kind
        assert matrix.nbytes == expected[name].nbytes
        assert_same_bits(matrix.dequantise_all(), expected[name].float())
    for name, vector in stored.vectors.items():
        assert_same_bits(vector, expected[name].float())


def test_float64_weights_are_opened_as_float32(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", dtype="F64", fill=63)
    stored = open_stored(read_checkpoint(directory))
    value = struct.unpack("<d", bytes([63] * 8))[0]
    assert_same_bits(stored.matrices[Q].dequantise_all(), torch.full((32, 32), value))
    assert_same_bits(stored.vectors["model.norm.weight"], torch.full((32,), value))
    assert {matrix.kind for matrix in stored.matrices.values()} == {"F32"}
    assert {vector.dtype for vector in stored.vectors.values()} == {torch.float32}


def test_row_ranges_and_selected_rows_equal_the_full_matrix(tmp_path: Path) -> None:
    stored = open_stored(random_gguf(tmp_path / "m.gguf"))
    for name in (Q, K, EMBEDDING):
        matrix = stored.matrices[name]
        whole = matrix.dequantise_all()
        rows = len(whole)
        indices = torch.tensor([0, rows - 1, 5, 5, 1, 9])
        assert_same_bits(matrix.select(indices), whole[indices])
        assert_same_bits(matrix.rows(3, 11), whole[3:11])
        assert_same_bits(matrix.rows(rows - 3, rows + 100), whole[rows - 3 :])
        assert matrix.rows(4, 4).shape == (0, 32)


def test_stored_float32_is_never_copied(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_bytes())
    matrix = open_stored(read_gguf_model(tmp_path / "m.gguf")).matrices[EMBEDDING]
    assert matrix.dequantise_all().data_ptr() == matrix.storage.data_ptr()
    assert matrix.rows(1, 3).data_ptr() == matrix.storage[1].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_tensor_shares_the_weights(dtype: torch.dtype) -> None:
    weights_OI = torch.randn(6, 10).to(dtype)
    matrix = QuantisedMatrix.from_tensor(weights_OI)
    assert matrix.shape == (6, 10)
    assert matrix.nbytes == weights_OI.nbytes
    assert matrix.storage.data_ptr() == weights_OI.data_ptr()
    assert_same_bits(matrix.dequantise_all(), weights_OI.float())
    assert_same_bits(QuantisedMatrix.from_tensor(weights_OI.T).dequantise_all(), weights_OI.T.float())


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1"])
def test_concurrent_products_equal_those_of_the_full_weights(kind: str) -> None:
    """Each thread dequantises into its own buffer, and reuses it for the next matrix."""
    torch.manual_seed(0)
    matrices = []
    for rows in (5000, 2000, 4500, 100):  # some of more than is unpacked at once
        blocks = torch.randint(0, 256, (rows, bytes_per_row(kind, 512)), dtype=torch.uint8)
        if kind != "Q4_1":
            blocks = torch.randn(rows, 512).to(PLAIN[kind]).view(torch.uint8)
        else:  # small scales and offsets; others may be infinite
            blocks.view(rows, -1, 20)[..., :4] = torch.rand(rows, 16, 2).half().view(torch.uint8)
        matrices.append(QuantisedMatrix(blocks, kind, 512))
    x_TI = torch.randn(3, 512)
    with ThreadPoolExecutor(4) as threads:
        products = list(threads.map(lambda matrix: matrix.matmul(x_TI), matrices * 5))
        gradients = list(threads.map(QuantisedMatrix.matmul_t, matrices * 5, products))
    for matrix, product, gradient in zip(matrices * 5, products, gradients, strict=True):
        assert torch.allclose(product, x_TI @ matrix.dequantise_all().T, rtol=1e-4, atol=1e-3)
        assert torch.allclose(gradient, product @ matrix.dequantise_all(), rtol=1e-4, atol=1.0)


def test_products_work_outside_inference_mode_after_one_inside() -> None:
    matrix, x_TI = QuantisedMatrix.from_tensor(torch.randn(6, 10).bfloat16()), torch.randn(2, 10)
    with ThreadPoolExecutor(1) as thread:  # a new thread, whose buffer is still empty
        inside, outside = (
            thread.submit(torch.inference_mode(mode)(matrix.matmul), x_TI).result() for mode in (True, False)
        )
    assert torch.equal(inside, outside)


def test_integer_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a matrix of float32"):
        QuantisedMatrix.from_tensor(torch.zeros(2, 2, dtype=torch.int64))


def test_vectors_do_not_keep_the_mapped_file_alive(tmp_path: Path) -> None:
    stored = open_stored(read_checkpoint(write_model(tmp_path / "m", values=weights())))
    for vector in stored.vectors.values():
        assert vector.untyped_storage().nbytes() == vector.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_products_leave_the_mapped_pages_clean(tmp_path: Path) -> None:
    stored = open_stored(random_gguf(tmp_path / "m.gguf"))
    for matrix in stored.matrices.values():
        matrix.dequantise_all()
    maps = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
    mapping = maps.partition(str(tmp_path / "m.gguf"))[2].partition("VmFlags")[0]
    assert "Rss:" in mapping
    assert {int(line.split()[1]) for line in mapping.splitlines() if "Dirty" in line or "Anonymous:" in line} == {0}


def test_all_unsupported_formats_are_named_together(tmp_path: Path) -> None:
    checkpoint = random_gguf(tmp_path / "m.gguf")
    unsupported = tuple(
        (path, replace(tensor, dtype="IQ2_XS") if "attn_v" in tensor.name else tensor)
        for path, tensor in checkpoint.stored
    )
    expected = r"blk\.0\.attn_v\.weight \(IQ2_XS\), blk\.1\.attn_v\.weight \(IQ2_XS\)\. Use a GGUF file"
    with pytest.raises(BaseCheckpointError, match=expected):
        open_stored(replace(checkpoint, stored=unsupported))


def test_weights_with_three_axes_are_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_model(tmp_path / "m"))
    experts = TensorInfo("model.experts.weight", "F32", (2, 3, 4), start=0, size=96)
    checkpoint = replace(
        checkpoint,
        shapes={**checkpoint.shapes, experts.name: experts.shape},
        stored=(*checkpoint.stored, (checkpoint.stored[0][0], experts)),
    )
    with pytest.raises(BaseCheckpointError, match=r"neither matrices nor vectors: model\.experts\.weight \(2, 3, 4\)"):
        open_stored(checkpoint)


def test_a_file_that_shrank_is_refused_before_it_causes_sigbus(tmp_path: Path) -> None:
    checkpoint = random_gguf(tmp_path / "m.gguf")
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.truncate(checkpoint.size_bytes // 2)
    with pytest.raises(HeaderError, match="it has changed"):
        open_stored(checkpoint)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    checkpoint = random_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(HeaderError, match="cannot be mapped"):
        open_stored(checkpoint)


def test_unaligned_bf16_weights_are_copied() -> None:
    weights_OI = torch.randn(6, 4).bfloat16()
    raw = torch.cat([torch.zeros(1, dtype=torch.uint8), weights_OI.view(torch.uint8).flatten()])
    stored = QuantisedMatrix(raw[1:].view(6, -1), "BF16", 4)
    x_TI = torch.randn(3, 4)
    assert torch.equal(stored.to_bf16().matmul(x_TI), (x_TI.bfloat16() @ weights_OI.T).float())
