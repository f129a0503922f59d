"""Bases whose configuration asks for more than their weights hold, where a model is built of them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from peft_core.compute.base import load_base
from peft_core.errors import BaseModelError
from tests.attacks.adapters import marker_of
from tests.toys import write_toy_base


def spoil(directory: Path, **changes: object) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


@pytest.mark.parametrize("setting", ["intermediate_size", "head_dim", "vocab_size", "hidden_size"])
def test_a_configuration_that_describes_more_than_the_weights_hold_is_refused(tmp_path: Path, setting: str) -> None:
    base = spoil(write_toy_base(tmp_path / "base"), **{setting: 1 << 17})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BaseModelError):
        load_base(base, torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (100 << 10)  # kilobytes


def test_code_that_lies_beside_a_base_is_never_run(tmp_path: Path) -> None:
    base = write_toy_base(tmp_path / "base")
    code = f"open({str(marker_of(base))!r}, 'w')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    for name in ("evil.py", "configuration_evil.py", "__init__.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code)
    for changes in ({"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}, {"model_type": "evil"}):
        try:
            load_base(spoil(base, **changes), torch.float32)
        except BaseModelError:
            assert "model_type" in changes
        assert not marker_of(base).exists()
