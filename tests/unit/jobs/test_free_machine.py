"""When a job that started by itself begins and when it is paused, from measurements that the tests describe."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.jobs.free_machine import BUSY_S, FreeMachine, Limits
from peft_core.system.machine_use import MachineUse

LIMITS = Limits(max_load=0.5, on_battery=False, quiet_s=60.0)
FREE = MachineUse(load=0.0)


def quiet(machine: FreeMachine, until: float = 60.0) -> FreeMachine:
    for at in range(0, int(until), 5):
        machine.why_wait(FREE, float(at))
    return machine


def test_a_job_begins_once_the_machine_has_been_free_for_a_while() -> None:
    machine = FreeMachine(LIMITS)
    assert machine.why_wait(FREE, 0.0) == "the machine must have been free for 60 s"
    assert machine.why_wait(FREE, 59.0)
    assert machine.why_wait(FREE, 60.0) == ""


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (MachineUse(load=0.26), "other programs use more than 25 % of the processors"),
        (MachineUse(load=None), "the load of the machine is being measured"),
        (MachineUse(load=0.0, on_battery=True), "the machine runs on its battery"),
        (MachineUse(load=0.0, model_idle_s=0.0), "a loaded model is in use"),
        (MachineUse(load=0.0, model_idle_s=59.0), "a loaded model is in use"),
        (MachineUse(load=0.0, available_bytes=10**9), "it needs about 1.5 GB of memory, which other programs use"),
    ],
)
def test_each_other_use_of_the_machine_delays_a_job_and_starts_the_wait_again(use: MachineUse, reason: str) -> None:
    machine = quiet(FreeMachine(LIMITS))
    assert machine.why_wait(use, 60.0, needed_bytes=1_500_000_000) == reason
    assert machine.why_wait(FREE, 61.0) == "the machine must have been free for 60 s"
    assert machine.why_wait(FREE, 121.0) == ""


def test_a_running_job_is_paused_by_a_lasting_load_only() -> None:
    machine = FreeMachine(LIMITS)
    busy = MachineUse(load=0.51)
    assert machine.why_pause(busy, 0.0) == ""
    assert machine.why_pause(FREE, BUSY_S - 1) == ""
    assert machine.why_pause(busy, BUSY_S) == ""
    assert machine.why_pause(busy, 2 * BUSY_S - 1) == ""
    assert machine.why_pause(busy, 2 * BUSY_S) == "other programs use more than 50 % of the processors"


@pytest.mark.parametrize("use", [MachineUse(load=0.0, on_battery=True), MachineUse(load=0.0, model_idle_s=1.0)])
def test_a_running_job_makes_way_immediately_for_a_person_and_on_battery(use: MachineUse) -> None:
    assert FreeMachine(LIMITS).why_pause(use, 0.0)


def test_a_load_between_the_two_limits_neither_pauses_a_job_nor_lets_one_begin() -> None:
    machine, use = FreeMachine(LIMITS), MachineUse(load=0.4)
    assert [machine.why_pause(use, float(at)) for at in range(0, 300, 5)] == [""] * 60
    assert all(machine.why_wait(use, float(at)) for at in range(300, 600, 5))


def test_the_limits_are_settings() -> None:
    machine = FreeMachine(Limits(max_load=1.0, on_battery=True, quiet_s=0.0))
    for load in (None, 0.5, 1.0):
        assert machine.why_wait(MachineUse(load=load, on_battery=True), 0.0) == ""
    assert machine.why_pause(MachineUse(load=1.0, on_battery=True), 1e6) == ""


USES = st.builds(
    MachineUse,
    load=st.none() | st.floats(0, 1),
    on_battery=st.booleans(),
    model_idle_s=st.sampled_from([None, 0.0, 30.0, 1e9]),
)


@given(st.lists(st.tuples(USES, st.floats(0.1, 120)), max_size=60))
def test_a_job_never_alternates_faster_than_the_machine_must_have_been_free(
    seen: list[tuple[MachineUse, float]],
) -> None:
    machine, running, now = FreeMachine(LIMITS), False, 0.0
    starts, free_since = [], None
    for use, later in seen:
        now += later
        if running:
            running = not machine.why_pause(use, now)
            free_since = None
            continue
        free = use.load is not None and use.load <= 0.25 and not use.on_battery and (use.model_idle_s or 61) > 60
        free_since = (now if free_since is None else free_since) if free else None
        running = not machine.why_wait(use, now)
        if running:
            assert free_since is not None
            assert now - free_since >= LIMITS.quiet_s
            starts.append(now)
    assert all(later - earlier >= LIMITS.quiet_s for earlier, later in pairwise(starts))
