"""However a server is ended, it and its inference worker are gone within seconds; the training continues."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from peft_core.system.cleanup import LEFT_BEHIND_INSPECTION_S
from tests.survival.kill_points import SMALL_WORKER, point_named
from tests.survival.scenario import STATUS_DEADLINE_S, Kill, Scenario, gone, until
from tests.survival.wire import Server, server

pytestmark = pytest.mark.survival

ROUNDS = int(os.environ.get("PEFT_SURVIVAL_LEAVINGS", "3"))  # how often each way is tried
WAYS = ["end of input", "SIGTERM", "SIGINT", "SIGKILL"]
GONE_WITHIN_S = 2.0
FIRST_STEP = point_named(SMALL_WORKER, "the first step is about to start")


def stop(running: Server, way: str) -> float:
    """End the server; return the seconds until it is gone."""
    began = time.monotonic()
    if way == "end of input":
        running.hang_up()
    else:
        running.process.send_signal(signal.Signals[way])
    running.process.wait(timeout=20)
    return time.monotonic() - began


@pytest.mark.parametrize("way", WAYS)
def test_an_ended_server_is_gone_in_two_seconds_and_the_training_continues(scenario: Scenario, way: str) -> None:
    mark = scenario.arm(FIRST_STEP, "SIGSTOP")
    child = scenario.reach(Kill(FIRST_STEP, "server", way), mark)
    for _ in range(ROUNDS):
        with server(scenario.paths.root, cwd=scenario.root) as running:
            assert (
                running.call("get_training_status", project_id="small", wait_s=0)["structuredContent"]["status"]
                == "in_progress"
            )
            running.send(
                "tools/call", {"name": "get_training_status", "arguments": {"project_id": "small", "wait_s": 45}}
            )
            running.send("tools/call", {"name": "load_adapter", "arguments": {"adapter_path": "earlier"}})
            server_process = psutil.Process(running.process.pid)
            until(server_process.children, "the inference worker")
            started = server_process.children(recursive=True)
            assert stop(running, way) < GONE_WITHIN_S
            until(
                lambda pids=[process.pid for process in started]: all(map(gone, pids)),
                "the inference worker to end",
                STATUS_DEADLINE_S,
            )
        assert not gone(child)
    scenario.disarm()
    os.kill(child, signal.SIGCONT)
    scenario.finish()
    scenario.expect_queue_continues()
    scenario.expect_no_processes()


def test_a_long_running_call_does_not_delay_the_end_of_the_server(scenario: Scenario, tmp_path: Path) -> None:
    source = tmp_path / "endless.jsonl"
    with source.open("w") as file:
        file.writelines(f'{{"text": "def add_{n}(a, b):\\n    return a + {n} * b\\n"}}\n' for n in range(400_000))
    with server(scenario.paths.root, cwd=scenario.root) as running:
        arguments = {
            "project_id": "big",
            "training_data": str(source),
            "config": {"base_model": str(scenario.base), **scenario.config},
        }
        running.send("tools/call", {"name": "train_adapter", "arguments": arguments})
        until(lambda: source.name in opened(running.process.pid), "the server to read the source")
        assert stop(running, "end of input") < GONE_WITHIN_S


def test_an_inspection_ends_with_its_server_and_the_next_server_removes_its_files(scenario: Scenario) -> None:
    point = point_named(SMALL_WORKER, "the data are spooled")
    mark = scenario.arm(point, "hang")
    lines = scenario.source.read_text().splitlines()
    config = {"base_model": str(scenario.base), "max_length": 128, "allow_little_data": True}
    arguments = {"records": [json.loads(line) for line in lines], "config": config}
    with server(scenario.paths.root, cwd=scenario.root) as running:
        running.send("tools/call", {"name": "inspect_training_data", "arguments": arguments})
        until(mark.exists, "the inspection to read the data")
        inspecting = int(mark.read_text())
        assert inspecting != running.process.pid
        (scratch,) = scenario.paths.inspections.iterdir()
        assert list(scratch.rglob("*.jsonl"))  # the records and the examples made of them
        assert stop(running, "SIGTERM") < GONE_WITHIN_S
    until(lambda: gone(inspecting), "the inspecting process to end", STATUS_DEADLINE_S)
    scenario.disarm()
    os.utime(scratch, (0, time.time() - LEFT_BEHIND_INSPECTION_S - 60))
    with server(scenario.paths.root, cwd=scenario.root) as next_:
        answer = next_.call("inspect_training_data", **arguments)
        assert re.search(r"Training set: [1-9]\d* examples", answer["content"][0]["text"])
    assert list(scenario.paths.inspections.iterdir()) == []


def opened(pid: int) -> list[str]:
    return [Path(file.path).name for file in psutil.Process(pid).open_files()]
