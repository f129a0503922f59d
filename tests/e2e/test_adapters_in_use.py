"""Using trained adapters through the real stdio server with the real model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
from mcp.client import Client

from tests.clients import data_of, stdio_server, text_of
from tests.model_files import write_adapter

pytestmark = pytest.mark.model
MODERN = "2026-07-28"
ENGINE = {"legacy": "torch", MODERN: "llamacpp"}  # each is used once; both generate the same text
CODE = {"prompt": 'def parse(text):\n    """Parse a header.', "max_new_tokens": 24}


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, text_of(result)
    return data_of(result)


def worker_of(data_dir: Path) -> psutil.Process:
    """Return the inference worker of this data directory."""
    workers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(data_dir) in part for part in process.info["cmdline"] or ())
        and "peft_core.inference.worker" in process.info["cmdline"]
    ]
    assert len(workers) == 1
    return workers[0]


async def test_an_adapter_is_verified_loaded_used_switched_and_unloaded(trained: Path, era: str) -> None:
    messages: list[str] = []

    async def on_progress(_done: float, _total: float | None, message: str | None) -> None:
        messages.append(message or "")

    async with Client(stdio_server(trained), mode=era) as client:
        # 1. Verification finds its base, named or not.
        checked = await call(client, "verify_adapter_compatibility", adapter_path="wsgiref", scan_weights=True)
        assert (checked["verdict"], checked["compatible"], checked["scanned"]) == ("exact", True, True)
        assert "reasons" not in checked
        checked = await call(client, "verify_adapter_compatibility", adapter_path="wsgiref")
        assert (checked["verdict"], checked["base_model"]) == ("sampled", "SmolLM2-135M-Instruct")

        # 2. Loading proves the effect.
        arguments = {"adapter_path": "wsgiref", "engine": ENGINE[era]}
        result = await client.call_tool("load_adapter", arguments, progress_callback=on_progress)
        loaded = result.structured_content
        assert loaded is not None
        assert (loaded["status"], loaded["how"], loaded["verdict"]) == ("loaded", "cold", "sampled")
        assert loaded["engine"] == ENGINE[era]
        assert loaded["effect"]["unmatched_keys"] == 0
        assert loaded["effect"]["max_logit_change"] > 0.01
        assert "loading SmolLM2-135M-Instruct" in messages

        # 3. The adapter changes the text; the base's text is the same with compare_with_base and use_base.
        both = await call(client, "generate", **CODE, compare_with_base=True)
        assert both["text"] != both["base_text"]
        assert both["adapter_path"] == loaded["adapter_path"]
        assert both["completion_tokens"] > 0
        alone = await call(client, "generate", **CODE, use_base=True)
        assert alone["text"] == both["base_text"]
        assert "adapter_path" not in alone
        question = [{"role": "user", "content": "What does json.dumps return?"}]
        messages.clear()
        result = await client.call_tool(
            "generate", {"messages": question, "max_new_tokens": 40}, progress_callback=on_progress
        )
        assert data_of(result)["applied"]["prompt_format"] == "chat_template"
        assert any("the adapter" in message for message in messages)

        # 4. A second adapter is loaded; after switching back, the first generates as before.
        assert (await call(client, "load_adapter", adapter_path="mime"))["how"] == "warm"
        assert (await call(client, "generate", **CODE))["text"] != both["text"]
        assert (await call(client, "load_adapter", adapter_path="wsgiref"))["how"] == "switched"
        assert (await call(client, "generate", **CODE))["text"] == both["text"]
        listed = await call(client, "list_adapters")
        assert {a["project_id"]: (a["resident"], a["active"]) for a in listed["adapters"]} == {
            "wsgiref": (True, True),
            "mime": (True, False),
        }

        # 5. A failed request leaves nothing in memory.
        assert (await client.call_tool("generate", {"prompt": "word " * 9000})).is_error
        assert (await client.call_tool("generate", {"prefix": "a", "suffix": "b"})).is_error

        # 6. Unloading the last adapter unloads the base too and returns its memory to the operating system.
        unloaded = await call(client, "unload_adapter")
        assert (unloaded["adapter_path"], unloaded["base_unloaded"]) == (loaded["adapter_path"], False)
        unloaded = await call(client, "unload_adapter", adapter_path="mime")
        assert unloaded["base_unloaded"]
        freed = unloaded["memory_before_bytes"] - unloaded["memory_after_bytes"]
        assert freed > 450e6  # of the 538 MB that the base has
        assert abs(worker_of(trained).memory_info().rss - unloaded["memory_after_bytes"]) < 20e6
        result = await client.call_tool("generate", CODE)
        assert result.is_error
        assert "load_adapter" in text_of(result)
        worker = worker_of(trained)
    with anyio.fail_after(5):
        while worker.is_running():  # noqa: ASYNC110 -- there is no event for the end of another process
            await anyio.sleep(0.01)


async def test_an_adapter_of_another_base_is_not_loaded_and_the_base_generates(trained: Path, tmp_path: Path) -> None:
    wrong = write_adapter(tmp_path / "tiny")
    async with Client(stdio_server(trained), mode=MODERN) as client:
        arguments = {"adapter_path": str(wrong), "base_model": "bundled", "accept_unproven_base": True}
        result = await client.call_tool("load_adapter", arguments)
        assert text_of(result).startswith("NOT LOADED: ")
        assert result.structured_content is not None
        assert result.structured_content["status"] == "fallback"
        assert result.structured_content["verdict"] == "incompatible"
        assert {reason["code"] for reason in result.structured_content["reasons"]} >= {"layer_count", "shape"}
        generated = await call(client, "generate", **CODE)
        assert "adapter_path" not in generated
        too_long = await client.call_tool("generate", {"prompt": "word " * 9000})
        assert too_long.is_error
        assert "8192 tokens" in text_of(too_long)
        assert (await client.call_tool("generate", {"prefix": "a", "suffix": "b"})).is_error


async def test_the_server_still_serves_after_a_cancelled_call_and_a_killed_worker(trained: Path, era: str) -> None:
    async with Client(stdio_server(trained), mode=era) as client:
        await call(client, "load_adapter", adapter_path="wsgiref")
        expected = await call(client, "generate", **CODE)

        with anyio.CancelScope() as scope:

            async def leave(_done: float, _total: float | None, _message: str | None) -> None:
                scope.cancel()

            await client.call_tool("generate", {**CODE, "max_new_tokens": 4000}, progress_callback=leave)
        assert scope.cancelled_caught
        with anyio.fail_after(30):  # 4000 tokens would take minutes
            assert (await call(client, "generate", **CODE))["text"] == expected["text"]

        errors: list[str] = []

        async def generate_long() -> None:
            result = await client.call_tool("generate", {**CODE, "max_new_tokens": 4000})
            assert result.is_error
            errors.append(text_of(result))

        worker = worker_of(trained)
        worker.suspend()  # so that the call is still running when the worker dies
        async with anyio.create_task_group() as group:
            group.start_soon(generate_long)
            await call(
                client, "get_training_status", project_id="wsgiref", wait_s=0
            )  # answered while the model is busy
            os.kill(worker.pid, signal.SIGKILL)
        assert "died during this call (generate): it was killed by SIGKILL" in errors[0]
        assert "host_died" in errors[0]
        assert (await call(client, "list_adapters"))["loaded"].get("adapters") is None
        assert (await call(client, "load_adapter", adapter_path="wsgiref"))["how"] == "cold"
        assert (await call(client, "generate", **CODE))["text"] == expected["text"]


async def test_an_adapter_that_was_altered_after_publishing_is_refused(trained: Path, tmp_path: Path) -> None:
    published = (trained / "projects" / "wsgiref" / "lora" / "current").resolve()
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in published.iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    config = json.loads((altered / "adapter_config.json").read_text())
    (altered / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 8 * config["lora_alpha"]}))
    async with Client(stdio_server(trained), mode=MODERN) as client:
        checked = await call(client, "verify_adapter_compatibility", adapter_path=str(altered))
        assert [reason["code"] for reason in checked["reasons"]] == ["altered"]
