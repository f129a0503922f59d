"""However the server is left, it is gone within two seconds, and its inference process too; the training goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from peft_core.system.cleanup import LEFT_BEHIND_INSPECTION_S
from tests.survival.life import TRUE_WITHIN_S, Kill, Life, gone, until
from tests.survival.points import SMALL_CHILD, Point
from tests.survival.wire import Server, server

pytestmark = pytest.mark.survival

ROUNDS = int(os.environ.get("PEFT_SURVIVAL_LEAVINGS", "3"))  # of each way
WAYS = ["end of input", "SIGTERM", "SIGINT", "SIGKILL"]
ASKED = {"project_id": "small"}
GONE_WITHIN_S = 2.0
FIRST_STEP = next(point for point in SMALL_CHILD if point.what == "before the first step")


def leave(left: Server, way: str) -> float:
    """Seconds until the server is gone."""
    began = time.monotonic()
    if way == "end of input":
        left.hang_up()
    else:
        left.process.send_signal(signal.Signals[way])
    left.process.wait(timeout=20)
    return time.monotonic() - began


@pytest.mark.parametrize("way", WAYS)
def test_the_server_is_gone_and_the_training_goes_on(life: Life, way: str) -> None:
    mark = life.arm(FIRST_STEP, "SIGSTOP")
    child = life.reach(Kill(FIRST_STEP, "server", way), mark)
    for _ in range(ROUNDS):
        with server(life.paths.root, cwd=life.root) as left:
            assert (
                left.call("get_training_status", project_id="small", wait_s=0)["structuredContent"]["status"]
                == "in_progress"
            )
            left.send("tools/call", {"name": "get_training_status", "arguments": {"project_id": "small", "wait_s": 45}})
            left.send("tools/call", {"name": "load_adapter", "arguments": {"adapter_path": "earlier"}})
            server_process = psutil.Process(left.process.pid)
            until(server_process.children, "the inference process")
            started = server_process.children(recursive=True)
            assert leave(left, way) < GONE_WITHIN_S
            until(
                lambda pids=[process.pid for process in started]: all(map(gone, pids)),
                "it to be gone",
                TRUE_WITHIN_S,
            )
        assert not gone(child)
    life.disarm()
    os.kill(child, signal.SIGCONT)
    life.finish()
    life.expect_the_queue_goes_on()
    life.expect_nobody()


def test_a_call_in_the_middle_of_long_work_holds_nobody_up(life: Life, tmp_path: Path) -> None:
    pipe = tmp_path / "endless.jsonl"
    with pipe.open("w") as file:
        file.writelines(f'{{"text": "def add_{n}(a, b):\\n    return a + {n} * b\\n"}}\n' for n in range(400_000))
    with server(life.paths.root, cwd=life.root) as left:
        arguments = {
            "project_id": "big",
            "training_data": str(pipe),
            "config": {"base_model": str(life.base), **life.config},
        }
        left.send("tools/call", {"name": "train_adapter", "arguments": arguments})
        until(lambda: pipe.name in opened(left.process.pid), "it to read")
        assert leave(left, "end of input") < GONE_WITHIN_S


def test_a_look_at_data_ends_with_the_server_and_what_it_left_is_removed_by_the_next(life: Life) -> None:
    point = Point("child", "peft_core.data.prepare", "DatasetBuilder.fill", "after", "data spooled for an inspection")
    mark = life.arm(point, "hang")
    lines = life.source.read_text().splitlines()
    config = {"base_model": str(life.base), "max_length": 128, "allow_little_data": True}
    asked = {"training_data": [json.loads(line) for line in lines], "config": config}
    with server(life.paths.root, cwd=life.root) as left:
        left.send("tools/call", {"name": "inspect_training_data", "arguments": asked})
        until(mark.exists, "the look at the data")
        looking = int(mark.read_text())
        assert looking != left.process.pid
        (scratch,) = life.paths.inspections.iterdir()
        assert list(scratch.rglob("*.jsonl"))  # the records, and what was made of them
        assert leave(left, "SIGTERM") < GONE_WITHIN_S
    until(lambda: gone(looking), "the process that looks to be gone", TRUE_WITHIN_S)
    life.disarm()
    os.utime(scratch, (0, time.time() - LEFT_BEHIND_INSPECTION_S - 60))
    with server(life.paths.root, cwd=life.root) as next_:
        answer = next_.call("inspect_training_data", **asked)
        assert answer["structuredContent"]["train_examples"] > 0
    assert list(life.paths.inspections.iterdir()) == []


def opened(pid: int) -> list[str]:
    return [Path(file.path).name for file in psutil.Process(pid).open_files()]
