from dataclasses import replace

import pytest
import torch

from peft_core.errors import InvalidArgument
from peft_core.modeling import mps
from peft_core.modeling.device import Machine, choose, describe, rng_state, set_rng_state, timed, without
from peft_core.modeling.mps import flops

MAC = Machine(mps=True, mps_bfloat16=True)
OLD_MAC = Machine(mps=True)
GPU = Machine(cuda=True, cuda_bfloat16=True)
OLD_GPU = Machine(cuda=True)
PLAIN = Machine()


@pytest.mark.parametrize(
    ("machine", "device", "weights", "autocast"),
    [
        (MAC, "mps", torch.bfloat16, "no"),
        (OLD_MAC, "mps", torch.float32, "no"),
        (GPU, "cuda", torch.bfloat16, "bf16"),
        (OLD_GPU, "cuda", torch.float32, "no"),
        (PLAIN, "cpu", torch.float32, "no"),
        (Machine(mps=True, mps_bfloat16=True, cuda=True, cuda_bfloat16=True), "mps", torch.bfloat16, "no"),
    ],
)
def test_auto_takes_mps_then_cuda_then_the_cpu(
    machine: Machine, device: str, weights: torch.dtype, autocast: str
) -> None:
    plan = choose("auto", machine)
    assert (plan.device, plan.weights, plan.autocast) == (device, weights, autocast)


@pytest.mark.parametrize("machine", [MAC, GPU, PLAIN])
def test_the_cpu_is_always_available_and_computes_in_float32(machine: Machine) -> None:
    plan = choose("cpu", machine)
    assert (plan.device, plan.weights, plan.autocast) == ("cpu", torch.float32, "no")


@pytest.mark.parametrize(
    ("machine", "device"), [(MAC, "mps"), (OLD_MAC, "mps"), (GPU, "cuda"), (OLD_GPU, "cuda"), (PLAIN, "cpu")]
)
def test_precision_float32_applies_to_every_device(machine: Machine, device: str) -> None:
    plan = choose("auto", machine, "float32")
    assert (plan.device, plan.weights, plan.autocast) == (device, torch.float32, "no")


@pytest.mark.parametrize(("requested", "machine", "available"), [("mps", GPU, "cuda, cpu"), ("cuda", PLAIN, "cpu")])
def test_an_unavailable_device_is_refused_with_the_available_ones(
    requested: str, machine: Machine, available: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"config.device = '{requested}'.*this machine has {available}"):
        choose(requested, machine)


@pytest.mark.parametrize(
    ("mps", "cpu", "device"), [(2.4e12, 1.1e12, "mps"), (1.1e12, 2.4e12, "cpu"), (2e12, 2e12, "mps")]
)
def test_auto_takes_the_faster_of_mps_and_cpu_and_notes_the_speeds(mps: float, cpu: float, device: str) -> None:
    plan = choose("auto", replace(MAC, mps_flops=mps, cpu_flops=cpu))
    assert replace(plan, note="") == replace(choose(device, MAC), note="")
    assert plan.note.endswith(f"; MPS {mps / 1e12:.1f} TFLOP/s, CPU {cpu / 1e12:.1f} TFLOP/s")


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_a_requested_device_is_used_even_if_it_is_slower(device: str) -> None:
    speeds = {"mps_flops": 1.0, "cpu_flops": 1.0} | {f"{device}_flops": 0.1}
    assert choose(device, replace(MAC, **speeds)) == choose(device, MAC)


def test_float16_is_never_chosen() -> None:
    machines = [Machine(mps=a, mps_bfloat16=a and b, cuda=c, cuda_bfloat16=c and d) for a, b, c, d in _all_flags()]
    assert all(choose("auto", machine).weights != torch.float16 for machine in machines)


def test_choosing_for_this_machine_gives_a_known_device() -> None:
    assert choose("auto", describe()).device in {"mps", "cuda", "cpu"}


def test_set_rng_state_restores_the_random_sequence() -> None:
    cpu = torch.device("cpu")
    state = rng_state(cpu)
    first = torch.rand(3)
    set_rng_state(cpu, state)
    assert torch.equal(first, torch.rand(3))


def test_timing_the_cpu_counts_batches_and_respects_its_limit() -> None:
    times = iter(range(1000))
    # The clock advances by 1 per call: warm-up ends at 1, the limit is passed at 4, the end is read at 5: 3 batches in 4 s.
    counted = flops("cpu", torch.float32, at_most_s=3.5, clock=lambda: float(next(times)))
    assert counted == pytest.approx(2 * 512 * 576 * 1536 * 8 * 3 / 4)
    assert 1e8 < flops("cpu", torch.float32, at_most_s=0.05) < 1e15


def test_mps_and_cpu_are_timed_in_their_own_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(device: str, dtype: torch.dtype) -> float:
        asked.append((device, dtype))
        return {"mps": 2.4e12, "cpu": 1.1e12}[device]

    monkeypatch.setattr(mps, "flops", pretend)
    machine = timed("auto", MAC)
    assert asked == [("mps", torch.bfloat16), ("cpu", torch.float32)]
    assert (machine.mps_flops, machine.cpu_flops) == (2.4e12, 1.1e12)
    timed("auto", MAC, "float32")
    assert asked[2:] == [("mps", torch.float32), ("cpu", torch.float32)]


@pytest.mark.parametrize(
    ("requested", "machine"),
    [("mps", MAC), ("cpu", MAC), ("auto", Machine()), ("auto", Machine(cuda=True, cuda_bfloat16=True))],
)
def test_nothing_is_timed_without_a_choice_between_mps_and_cpu(
    requested: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "flops", lambda *_: pytest.fail("timed"))
    assert timed(requested, machine) is machine


def _all_flags() -> list[list[bool]]:
    return [[bool(n >> bit & 1) for bit in range(4)] for n in range(16)]


def test_auto_does_not_take_a_distrusted_device_but_a_request_for_it_does() -> None:
    both = replace(MAC, cuda=True, cuda_bfloat16=True)
    assert choose("auto", without(both, "auto", {"mps"})).device == "cuda"
    assert choose("auto", without(both, "auto", {"mps", "cuda"})).device == "cpu"
    assert choose("mps", without(both, "mps", {"mps"})).device == "mps"
    assert without(both, "auto", set()) == both
