"""Entry point of the export worker: an ExportRequest (JSON) on standard input, an ExportReport or an ErrorInfo out.

By hand: `python -m peft_core.export.worker < request.json`.
"""

from __future__ import annotations

import sys

from peft_core.export.request import ExportProgress, ExportRequest
from peft_core.modeling.environment import importing_torch
from peft_core.schemas.export import ExportReport
from peft_core.system import logs
from peft_core.system.child_process import JsonLineWriter, answer_with_progress
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="export",
    crash_code="export_failed",
    log="logs/export.log in the data directory",
    memory_advice=("Close other programs, or call unload_adapter.",),
)


def answer(request: ExportRequest, write: JsonLineWriter) -> ExportReport:
    with importing_torch():
        from peft_core.export.worker.run import export  # noqa: PLC0415 -- torch; an error can already be reported

    return export(request, lambda done, total, message: write(ExportProgress(done=done, total=total, message=message)))


if __name__ == "__main__":
    logs.configure("INFO")
    sys.exit(answer_with_progress(ExportRequest, answer, TASK))
