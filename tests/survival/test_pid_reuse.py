"""The pids of a job's dead processes belong to others now: nobody takes those for the job's, and nobody touches them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from peft_core.schemas.results import Status
from tests.survival.life import TRUE_WITHIN_S, Kill, Life, state, until
from tests.survival.points import SMALL_CHILD

pytestmark = pytest.mark.survival

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # the next process gets the one after it
FIRST_STEP = next(point for point in SMALL_CHILD if point.what == "before the first step")
TRIES = 200  # something else on the machine may be faster


@contextmanager
def stranger(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else that has this pid."""
    for _ in range(TRIES):
        try:
            LAST_PID.write_text(str(pid - 1))
        except OSError:
            pytest.skip("only root on Linux can choose a pid")
        process = subprocess.Popen(["sleep", "600"], cwd="/", start_new_session=True)
        if process.pid == pid:
            break
        process.kill()
        process.wait()
    else:
        pytest.fail(f"pid {pid} was not to be had")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def bury(pid: int) -> None:
    """Wait until the system has its pid to give: the job service reaps its runner, the first process what is orphaned."""
    until(lambda: state(pid) == "gone", f"{pid} to be reaped")


def test_a_pid_that_belongs_to_another_process_now_makes_no_dead_job_look_alive(life: Life) -> None:
    """Of both together: while its child lives, the runner's pid names their session, and the system gives it to nobody."""
    mark = life.arm(FIRST_STEP, "SIGSTOP")
    child = life.reach(Kill(FIRST_STEP, "child", "SIGSTOP"), mark)
    life.disarm()
    dead = [psutil.Process(child).ppid(), child]
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    for pid in dead:
        bury(pid)
    with ExitStack() as strangers:
        others = [strangers.enter_context(stranger(pid)) for pid in dead]
        until(lambda: life.status().status.is_final, "the true status", TRUE_WITHIN_S)
        assert life.status().status is Status.INTERRUPTED
        life.check()
        life.finish()
        life.expect_the_queue_goes_on()
        life.expect_nobody()
        assert [other.poll() for other in others] == [None, None]  # they were left alone
