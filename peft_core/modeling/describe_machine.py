"""Say what torch can compute on here, in a process of its own: a MachineRequest (JSON) on standard input, a MachineAnswer or
an ErrorInfo on standard output.

To run it by hand: `echo '{}' | python -m peft_core.modeling.describe_machine`.
"""

from __future__ import annotations

import sys

import accelerate
import peft
import torch
import transformers

from peft_core.modeling.device import choose, describe
from peft_core.schemas.machine import MachineAnswer, MachineRequest
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="check of torch",
    crash_code="inspection_failed",
    log="standard error",
    memory_advice=("Close other programs.",),
)


def answer(_: MachineRequest) -> MachineAnswer:
    plan = choose("auto", describe())
    return MachineAnswer(
        torch=torch.__version__,
        libraries={module.__name__: module.__version__ for module in (transformers, peft, accelerate)},
        device=plan.device,
        device_name=torch.cuda.get_device_name() if plan.device == "cuda" else "",
        device_memory_bytes=torch.cuda.get_device_properties(0).total_memory if plan.device == "cuda" else 0,
        arithmetic=plan.note,
    )


if __name__ == "__main__":
    sys.exit(answer_request(MachineRequest, answer, TASK))
