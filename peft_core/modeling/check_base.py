"""Check a base model's weights against transformers' class, in a process of its own: a BaseCheckRequest (JSON) on standard
input, a BaseCheckResult or an ErrorInfo on standard output.

To run it by hand: `python -m peft_core.modeling.check_base < request.json`.
"""

from __future__ import annotations

import sys

from peft_core.modeling.load import check_weights
from peft_core.planning.base_check import BaseCheckRequest, BaseCheckResult
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="check of the base model",
    crash_code="inspection_failed",
    log="the log of the server",
    memory_advice=("Close other programs.",),
)


def check(request: BaseCheckRequest) -> BaseCheckResult:
    """Compare names and shapes; no weights are read.

    Raises:
        BaseCheckpointError: see `check_weights`.
    """
    check_weights(request.directory)
    return BaseCheckResult()


if __name__ == "__main__":
    sys.exit(answer_request(BaseCheckRequest, check, TASK))
