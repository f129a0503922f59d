from __future__ import annotations

import gc
import os

import pytest

from peft_core.modeling import environment
from peft_core.modeling.environment import importing_torch


def is_scanned(made: object) -> bool:
    return any(scanned is made for scanned in gc.get_objects())


def test_no_garbage_is_collected_during_the_import_and_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ENVIRONMENT", {"READ_AT_IMPORT": "1"})
    monkeypatch.delenv("READ_AT_IMPORT", raising=False)
    monkeypatch.setenv("RUST_BACKTRACE", "1")
    with importing_torch():
        assert not gc.isenabled()
        assert os.environ.pop("READ_AT_IMPORT") == "1"
        made: list[object] = []
        assert is_scanned(made)
    assert gc.isenabled()
    assert not is_scanned(made)


def test_garbage_is_collected_after_an_import_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ENVIRONMENT", {})
    monkeypatch.setenv("RUST_BACKTRACE", "1")
    with pytest.raises(ImportError), importing_torch():
        raise ImportError
    assert gc.isenabled()
