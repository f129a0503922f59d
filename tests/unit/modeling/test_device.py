from dataclasses import replace

import pytest
import torch

from peft_core.errors import InvalidArgument
from peft_core.modeling.device import Machine, choose, describe, rng_state, set_rng_state

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
    machine: Machine,
    device: str,
    weights: torch.dtype,
    autocast: str,
) -> None:
    plan = choose("auto", machine)
    assert (plan.device, plan.weights, plan.autocast) == (device, weights, autocast)


@pytest.mark.parametrize("machine", [MAC, GPU, PLAIN])
def test_the_cpu_is_always_there_and_computes_in_float32(machine: Machine) -> None:
    plan = choose("cpu", machine)
    assert (plan.device, plan.weights, plan.autocast) == ("cpu", torch.float32, "no")


@pytest.mark.parametrize(
    ("machine", "device"),
    [(MAC, "mps"), (OLD_MAC, "mps"), (GPU, "cuda"), (OLD_GPU, "cuda"), (PLAIN, "cpu")],
)
def test_precision_float32_is_kept_on_every_device(machine: Machine, device: str) -> None:
    plan = choose("auto", machine, "float32")
    assert (plan.device, plan.weights, plan.autocast) == (device, torch.float32, "no")


@pytest.mark.parametrize(("requested", "machine", "there"), [("mps", GPU, "cuda, cpu"), ("cuda", PLAIN, "cpu")])
def test_a_device_that_is_not_there_is_refused_naming_those_that_are(
    requested: str,
    machine: Machine,
    there: str,
) -> None:
    with pytest.raises(InvalidArgument, match=f"config.device = '{requested}'.*this machine has {there}"):
        choose(requested, machine)


@pytest.mark.parametrize(
    ("mps", "cpu", "device"),
    [(2.4e12, 1.1e12, "mps"), (1.1e12, 2.4e12, "cpu"), (2e12, 2e12, "mps")],
)
def test_of_mps_and_cpu_auto_takes_the_faster_and_says_why(mps: float, cpu: float, device: str) -> None:
    plan = choose("auto", replace(MAC, mps_flops=mps, cpu_flops=cpu))
    assert replace(plan, note="") == replace(choose(device, MAC), note="")
    assert plan.note.endswith(f"; MPS {mps / 1e12:.1f} TFLOP/s, CPU {cpu / 1e12:.1f} TFLOP/s")


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_who_names_a_device_gets_it_however_slow(device: str) -> None:
    speeds = {"mps_flops": 1.0, "cpu_flops": 1.0} | {f"{device}_flops": 0.1}
    assert choose(device, replace(MAC, **speeds)) == choose(device, MAC)


def test_float16_is_never_chosen() -> None:
    machines = [Machine(mps=a, mps_bfloat16=a and b, cuda=c, cuda_bfloat16=c and d) for a, b, c, d in _all_flags()]
    assert all(choose("auto", machine).weights != torch.float16 for machine in machines)


def test_this_machine_can_be_described() -> None:
    assert choose("auto", describe()).device in {"mps", "cuda", "cpu"}


def test_random_numbers_go_on_where_they_were() -> None:
    cpu = torch.device("cpu")
    state = rng_state(cpu)
    first = torch.rand(3)
    set_rng_state(cpu, state)
    assert torch.equal(first, torch.rand(3))


def _all_flags() -> list[list[bool]]:
    return [[bool(n >> bit & 1) for bit in range(4)] for n in range(16)]
