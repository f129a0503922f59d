from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.export.vllm_plan import plan_vllm
from peft_core.schemas.export import ExportOptions


def plan(address: str | None, named: str | None = None, model: str | None = None) -> object:
    settings = Settings(data_dir=Path("/data"), vllm_base_url=named)
    return plan_vllm(ExportOptions(vllm_address=address, model_name=model), settings)


def test_nothing_is_loaded_unless_a_server_is_named() -> None:
    assert plan(None) is None
    with pytest.raises(InvalidArgument, match="vllm_address"):
        plan(None, model="x")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "http://localhost:8000/v1/", "http://[::1]:8000"])
def test_a_server_on_this_machine_may_be_named_by_a_request(address: str) -> None:
    planned = plan(address, model="a/b-c.d:e")
    assert planned.address == address.removesuffix("/v1/")
    assert not planned.sends_key


def test_a_server_elsewhere_must_be_named_by_the_settings() -> None:
    with pytest.raises(InvalidArgument, match="must be on this machine") as refused:
        plan("http://gpu.example:8000", named="http://other.example:8000")
    assert "CODEBASE_GARDENER_VLLM_BASE_URL" in str(refused.value)
    assert plan("http://gpu.example:8000/v1", named="http://gpu.example:8000").sends_key
    assert plan(None, named="http://gpu.example:8000").sends_key


@pytest.mark.parametrize(
    "address",
    ["", "8000", "ftp://127.0.0.1", "http://127.0.0.1:x", "http://u:p@127.0.0.1", "http://127.0.0.1/a?b", "x" * 9999],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        plan(address or " ")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["../x", "a b", "a\n", "", "x" * 121])
def test_a_name_with_other_characters_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="model_name"):
        plan("http://127.0.0.1:8000", model=name)
