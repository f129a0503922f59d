"""The main job through the real stdio server: real repository, real model, real adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client import Client

from peft_core import PEFTManager, Settings
from tests.clients import data_of, stdio_server, text_of
from tests.e2e.main_job import SHORT, MainJob

pytestmark = pytest.mark.model
MODERN = "2026-07-28"
LONG = {**SHORT, "max_steps": 10_000}

Status = dict[str, Any]


async def call(client: Client, tool: str, **arguments: Any) -> Status:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, text_of(result)
    return data_of(result)


async def wait_for(
    client: Client, condition: Callable[[Status], object], project: str, job: str | None = None
) -> Status:
    deadline = time.monotonic() + 300
    while True:
        status = await call(client, "get_training_status", project_id=project, job_id=job, wait_s=0)
        if condition(status):
            return status
        assert status["status"] in ("queued", "in_progress"), status
        assert time.monotonic() < deadline, status
        await anyio.sleep(0.2)


async def wait_for_end(client: Client, project: str, job: str | None = None) -> Status:
    """Wait in the server, which takes less of the processor than many calls do."""
    deadline = time.monotonic() + 300
    while True:
        status = await call(client, "get_training_status", project_id=project, job_id=job, wait_s=30)
        if status["status"] not in ("queued", "in_progress"):
            return status
        assert time.monotonic() < deadline, status


async def test_training_on_a_repository_gives_an_adapter_and_a_correct_report(main_job: MainJob) -> None:
    observed = main_job.observed
    # 1. The answer comes immediately and says what will be done.
    started = observed.started
    assert observed.answered_in_s < 30  # a second on an idle machine; benchmarks/ measures it
    assert started["status"] == "queued"
    assert started["base_model"] == "SmolLM2-135M-Instruct"
    assert started["estimate"]["steps"] == started["total_steps"] == 3
    assert started["estimate"]["memory_bytes"] > 5e8
    assert "python" in started["training_data"]
    assert "get_training_status" in started["next"]

    # 2. Subscribers are notified of changes; waiting calls receive progress.
    assert observed.updates
    for notifications in filter(None, observed.progress):
        times, values, messages = zip(*notifications, strict=True)
        assert list(values) == sorted(set(values))  # strictly increasing
        assert len(times) <= times[-1] - times[0] + 2  # one per second
        assert all(len(message) <= 200 for message in messages)
    messages = [message for notifications in observed.progress for _, _, message in notifications]
    assert any("step" in message and "tokens/s" in message for message in messages)

    # 3. The result is complete and consistent.
    status = observed.ended
    assert status["status"] == "completed", status["summary"]
    metrics, dataset = status["metrics"], status["dataset"]
    assert 0.5 < metrics["base_loss"] < 5
    assert 0.5 < metrics["adapter_loss"] < 5
    assert metrics["adapter_loss"] != metrics["base_loss"]
    assert metrics["tokens"] > 100
    assert 3e8 < metrics["peak_memory_bytes"] < 2e9
    assert dataset["held_out_examples"] >= 1
    assert status["step"] == status["total_steps"] == 3
    directory = Path(status["adapter_path"])
    assert metrics["adapter_bytes"] == (directory / "adapter_model.safetensors").stat().st_size < 50e6
    assert {path.name for path in directory.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "adapter_manifest.json",
        "README.md",
        "trained_on.bin",
        "snapshot.json.gz",
        "report.html",
    }
    for name in ("adapter_config.json", "adapter_manifest.json", "README.md", "report.html"):
        text = (directory / name).read_text()
        assert str(main_job.data) not in text
        assert str(main_job.repository) not in text

    evaluation = status["evaluation"]
    assert evaluation["verdict"] in ("helps", "no_difference", "harms")
    assert evaluation["loss"]["change"] == pytest.approx(metrics["adapter_loss"] - metrics["base_loss"], abs=1e-5)
    assert evaluation["general_tokens"] > 1000
    assert status["report_path"] == str(directory / "report.html")
    assert observed.second["metrics"]["adapter_loss"] < observed.second["metrics"]["base_loss"]  # its files are alike

    # 4. The adapter is found by its project id and in the list.
    assert observed.info["adapter_path"] == str(directory)
    assert observed.info["manifest"]["metrics"]["adapter_loss"] == metrics["adapter_loss"]
    (listed,) = observed.listed
    assert listed["current"]
    async with PEFTManager(Settings(data_dir=main_job.data)) as manager:
        staleness = (await manager.get_adapter_info("wsgiref", compare_for_s=60)).staleness
    assert staleness is not None
    assert staleness.text.startswith("Up to date: none of its ")
    assert observed.resource["status"] == "completed"

    assert_loads_with_plain_peft(main_job.data, directory)


def assert_loads_with_plain_peft(data_dir: Path, directory: Path) -> None:
    """Load the adapter with plain PEFT in a process of its own, as any other tool would."""
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
ids = torch.arange(100, 130)[None]
with torch.no_grad():
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, sys.argv[2])(ids).logits
assert torch.isfinite(after).all()
print((before - after).abs().max().item())
"""
    (base,) = (path for path in (data_dir / "base_models").iterdir() if (path / "config.json").is_file())
    command = [sys.executable, "-W", "ignore", "-c", script, str(base), str(directory)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert float(output.stdout) > 1e-3


async def test_a_job_survives_its_client_and_server_and_other_servers_can_cancel_it(
    data_dir: Path, stdlib_repository: Path, tiny_base: str
) -> None:
    short, long = ({**config, "base_model": tiny_base} for config in (SHORT, LONG))
    request = {"training_data": str(stdlib_repository), "config": long}
    # The client starts the job and closes at once.
    async with Client(stdio_server(data_dir), mode=MODERN) as client:
        running = (await call(client, "train_adapter", project_id="std", **request))["job_id"]

    # Two servers on the same data directory, of both protocol eras, see it running.
    async with (
        Client(stdio_server(data_dir), mode="legacy") as first,
        Client(stdio_server(data_dir), mode=MODERN) as second,
    ):
        status = await wait_for(first, lambda s: s["step"] >= 1, "std")
        assert (status["job_id"], status["status"], status["phase"]) == (running, "in_progress", "training")
        assert status["loss"] > 0
        assert (await call(second, "get_training_status", project_id="std", wait_s=0))["step"] >= 1

        # One training runs at a time; the others are queued in order and can be cancelled.
        waiting = await call(second, "train_adapter", project_id="other", **request)
        last = await call(first, "train_adapter", project_id="third", **{**request, "config": short})
        assert (waiting["queue_position"], last["queue_position"]) == (2, 3)
        cancelled = await call(first, "cancel_training", project_id="other")
        assert cancelled["status"] == "cancelled"
        again = await first.call_tool("cancel_training", {"project_id": "other"})
        assert again.is_error
        assert "it is cancelled" in text_of(again)
        assert (await call(second, "get_training_status", project_id="third", wait_s=0))["queue_position"] == 2

        # Cancelling the running one frees the queue; it can be resumed from its checkpoint.
        await call(second, "cancel_training", project_id="std", job_id=running)
        status = await wait_for_end(first, "std")
        assert status["status"] == "cancelled"
        assert "resume_training" in status["next"]
        status = await wait_for_end(second, "third")
        assert status["status"] == "completed", status["summary"]


async def test_a_cancelled_training_resumes_from_its_checkpoint_and_completes(
    data_dir: Path, stdlib_repository: Path, tiny_base: str
) -> None:
    steps = 400
    async with Client(stdio_server(data_dir), mode="legacy") as client:
        config = {**SHORT, "max_steps": steps, "base_model": tiny_base}
        request = {"project_id": "std", "training_data": str(stdlib_repository), "config": config}
        job = (await call(client, "train_adapter", **request))["job_id"]
        await wait_for(client, lambda s: s["step"] >= 2, "std")
        await call(client, "cancel_training", project_id="std")
        status = await wait_for_end(client, "std")
        assert status["status"] == "cancelled"
        reached = status["step"]
        assert 2 <= reached < steps

        resumed = await call(client, "resume_training", job_id=job)
        assert resumed["status"] == "queued"
        status = await wait_for_end(client, "std")
        assert status["status"] == "completed", status["summary"]
        assert status["step"] == steps


async def test_no_progress_notification_follows_the_answer(
    data_dir: Path, stdlib_repository: Path, tiny_base: str
) -> None:
    """Read the raw protocol, because the SDK's client would not show a notification that comes too late."""
    server = await anyio.open_process(
        [sys.executable, "-m", "server"], env=stdio_server(data_dir).env, stderr=subprocess.DEVNULL
    )
    assert server.stdin
    assert server.stdout
    lines: list[dict[str, Any]] = []
    received = anyio.Condition()

    async def read() -> None:
        buffer = b""
        assert server.stdout
        async for chunk in server.stdout:
            buffer += chunk
            *complete, buffer = buffer.split(b"\n")
            async with received:
                lines.extend(json.loads(line) for line in complete)
                received.notify_all()

    async def wait_for_line(condition: Callable[[dict[str, Any]], bool]) -> None:
        with anyio.fail_after(120):
            async with received:
                while not any(condition(line) for line in lines):
                    await received.wait()

    def message(number: int | None, method: str, params: dict[str, Any]) -> bytes:
        numbered = {} if number is None else {"id": number}
        return json.dumps({"jsonrpc": "2.0", **numbered, "method": method, "params": params}).encode() + b"\n"

    def tool(number: int, name: str, **arguments: Any) -> bytes:
        params = {"name": name, "arguments": arguments, "_meta": {"progressToken": f"token-{number}"}}
        return message(number, "tools/call", params)

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        client = {"name": "raw", "version": "0"}
        handshake = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
        await server.stdin.send(message(0, "initialize", handshake))
        await server.stdin.send(message(None, "notifications/initialized", {}))
        config = {**LONG, "max_steps": 1_000_000, "base_model": tiny_base}
        train = {"project_id": "std", "training_data": str(stdlib_repository), "config": config, "wait_s": 4}
        await server.stdin.send(tool(1, "train_adapter", **train))
        await wait_for_line(lambda line: line.get("method") == "notifications/progress")
        for number in (2, 3):
            await server.stdin.send(tool(number, "get_training_status", project_id="std", wait_s=5))
        # This call lasts much longer than the others, so that late progress notifications would have time to arrive.
        await server.stdin.send(tool(9, "get_training_status", project_id="std", wait_s=12))
        await wait_for_line(lambda line: line.get("id") == 9)
        await server.stdin.send(tool(10, "cancel_training", project_id="std"))
        await server.stdin.aclose()
        await server.wait()
        group.cancel_scope.cancel()

    answered: set[str] = set()
    progressed: set[str] = set()
    for line in lines:
        if "id" in line:
            answered.add(f"token-{line['id']}")
        elif line["method"] == "notifications/progress":
            assert line["params"]["progressToken"] not in answered
            progressed.add(line["params"]["progressToken"])
    assert progressed == {"token-1", "token-2", "token-3", "token-9"}


def test_the_python_example_trains_and_prints_what_was_measured(
    data_dir: Path, stdlib_repository: Path, tiny_base: str
) -> None:
    example = Path(__file__).parents[2] / "examples" / "python_api.py"
    environment = {
        **os.environ,
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
        "CODEBASE_GARDENER_DEFAULT_BASE_MODEL": tiny_base,
    }
    source = stdlib_repository / "wsgiref"
    output = subprocess.run(
        [sys.executable, str(example), str(source)], env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    assert "100.0 %  completed  step 3" in output.stdout
    assert "adapter_perplexity=" in output.stdout
    assert f"loaded on {Path(tiny_base).name}: unmatched_keys=0" in output.stdout
    assert "--- base model" in output.stdout
