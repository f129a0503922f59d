"""The bundled model's own file against its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from peft_core.bases import resolve
from peft_core.bases.convert import materialise
from peft_core.bases.gguf_model import read_gguf_model
from peft_core.bases.resolve import bundled_path
from peft_core.compute.stored import open_stored
from peft_core.config import Settings

pytestmark = pytest.mark.model


def test_the_bundled_file_holds_bit_for_bit_the_weights_of_its_conversion(converted_bases: Path) -> None:
    converted = materialise(resolve("bundled", Settings()), converted_bases, lambda _: None)
    matrices, vectors = open_stored(read_gguf_model(bundled_path()))
    assert {matrix.kind for matrix in matrices.values()} == {"Q4_1", "Q8_0"}
    with safe_open(converted / "model.safetensors", "pt") as file:
        assert matrices.keys() | vectors.keys() == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found = matrices[name].whole() if name in matrices else vectors[name]
            assert torch.equal(found.view(torch.int32), file.get_tensor(name).view(torch.int32)), name
