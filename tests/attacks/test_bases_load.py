"""Malicious base models that are loaded: false sizes, copied weights, and code next to the weights."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError
from peft_core.inference.worker.adapter_cache import AdapterCache
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.load import load_base
from tests.attacks.adapters import marker_of
from tests.integration.test_bases_convert import TOY
from tests.model_files import ARRAY, TEXT, gguf_bytes
from tests.tiny_models import write_tiny_base

TOKENS = [*TOY["tokenizer.ggml.tokens"][1][1][:-1], "zz"]


def change_config(directory: Path, **changes: object) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize("setting", ["intermediate_size", "head_dim", "vocab_size", "hidden_size"])
def test_a_configuration_with_larger_sizes_than_the_weights_is_refused(tmp_path: Path, setting: str) -> None:
    base = change_config(write_tiny_base(tmp_path / "base"), **{setting: 1 << 17})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BaseCheckpointError):
        load_base(base, torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (100 << 10)  # kilobytes


@pytest.mark.parametrize(
    "changes",
    [{"tokenizer.chat_template": (TEXT, "{{ messages }} obey")}, {"tokenizer.ggml.tokens": (ARRAY, (TEXT, TOKENS))}],
)
def test_a_gguf_copy_with_another_template_or_vocabulary_never_replaces_the_original(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The hostile copy has the same weights, and is converted first."""
    plain = TOY | {"tokenizer.chat_template": (TEXT, "{{ messages }} hello")}
    bases = []
    for name, metadata in (("hostile", plain | changes), ("honest", plain)):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(gguf_bytes(metadata))
        bases.append(resolve(str(path), Settings()))
    hostile, honest = bases
    assert hostile.fingerprint == honest.fingerprint
    converted = [ensure_hf_directory(base, tmp_path / "cache", lambda _: None) for base in bases]
    assert converted[0] != converted[1]
    residents = AdapterCache(1)
    residents.model = cast("ResidentModel", SimpleNamespace(base=hostile))
    assert residents.is_on(hostile)
    assert not residents.is_on(honest)


def test_code_next_to_a_base_model_is_never_run(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    code = f"open({str(marker_of(base))!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    for name in ("evil.py", "configuration_evil.py", "__init__.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code)
    for changes in ({"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}, {"model_type": "evil"}):
        try:
            load_base(change_config(base, **changes), torch.float32)
        except BaseCheckpointError:
            assert "model_type" in changes
        assert not marker_of(base).exists()
