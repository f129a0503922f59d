"""Plan the loading of an exported adapter into a running vLLM: which server, and under which name."""

from __future__ import annotations

import re

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.export.request import VllmPlan
from peft_core.schemas.export import ExportOptions
from peft_core.system.addresses import is_on_this_machine
from peft_core.vllm import vllm_address

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,119}", re.ASCII)


def plan_vllm(options: ExportOptions, settings: Settings) -> VllmPlan | None:
    """Return the plan; None if no server is named, neither in the request nor in the settings.

    Raises:
        InvalidArgument: The address is none, or of another machine that the settings do not name; the name cannot be used.
    """
    chosen = options.vllm_address or settings.vllm_base_url
    if chosen is None:
        if options.model_name is not None:
            raise InvalidArgument(
                "model_name", options.model_name, "without vllm_address there is no model to name; omit it"
            )
        return None
    address = vllm_address(chosen)
    if address is None:
        raise InvalidArgument("vllm_address", chosen, "must be an address such as http://127.0.0.1:8000")
    named = settings.vllm_base_url is not None and address == vllm_address(settings.vllm_base_url)
    if not named and not is_on_this_machine(address):
        raise InvalidArgument(
            "vllm_address",
            chosen,
            "must be on this machine, because what the adapter has learned does not leave it",
            suggestions=["Set CODEBASE_GARDENER_VLLM_BASE_URL to allow another machine"],
        )
    if options.model_name is not None and not _NAME.fullmatch(options.model_name):
        raise InvalidArgument(
            "model_name", options.model_name, "must have up to 120 letters, digits and '.', '_', '-', ':', '/'"
        )
    return VllmPlan(address=address, model=options.model_name, sends_key=named)
