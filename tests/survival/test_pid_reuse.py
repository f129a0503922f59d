"""Other processes that got the pids of a job's dead processes are neither taken for the job's nor touched."""

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
from tests.survival.kill_points import SMALL_WORKER, point_named
from tests.survival.scenario import STATUS_DEADLINE_S, Kill, Scenario, state, until

pytestmark = pytest.mark.survival

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")  # the next process gets the one after it
FIRST_STEP = point_named(SMALL_WORKER, "the first step is about to start")
TRIES = 200  # another process may get the pid first


@contextmanager
def stranger(pid: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start an unrelated process with this pid."""
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
        pytest.fail(f"could not get pid {pid}")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_reaped(pid: int) -> None:
    """Wait until the pid is free: the job service reaps its runner, and init reaps orphans."""
    until(lambda: state(pid) == "gone", f"{pid} to be reaped")


def test_a_reused_pid_does_not_make_a_dead_job_look_alive(scenario: Scenario) -> None:
    """Kill runner and worker: while the worker lives, the runner's pid names their session and is not reused."""
    mark = scenario.arm(FIRST_STEP, "SIGSTOP")
    child = scenario.reach(Kill(FIRST_STEP, "worker", "SIGSTOP"), mark)
    scenario.disarm()
    dead = [psutil.Process(child).ppid(), child]
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    for pid in dead:
        wait_until_reaped(pid)
    with ExitStack() as strangers:
        others = [strangers.enter_context(stranger(pid)) for pid in dead]
        until(lambda: scenario.status().status.is_final, "the true status", STATUS_DEADLINE_S)
        assert scenario.status().status is Status.INTERRUPTED
        scenario.check()
        scenario.finish()
        scenario.expect_queue_continues()
        scenario.expect_no_processes()
        assert [other.poll() for other in others] == [None, None]  # both are still running
