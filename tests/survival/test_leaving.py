"""However the server is left, it is gone within two seconds, and its inference process too; the training goes on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.survival.life import Kill, Life, gone, until
from tests.survival.points import SMALL_CHILD
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
            started = psutil.Process(left.process.pid).children(recursive=True)
            assert leave(left, way) < GONE_WITHIN_S
            assert all(gone(process.pid) for process in started)
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


def opened(pid: int) -> list[str]:
    return [Path(file.path).name for file in psutil.Process(pid).open_files()]
