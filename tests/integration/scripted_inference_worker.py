"""An inference worker that follows a script: it exits on its second request, as if its idle time had just passed.

A request for the adapter "endless" starts and never ends; one for "doomed" starts, and the next message makes the worker exit;
one for "babbling" is answered with a line that does not end.
"""

from __future__ import annotations

import signal
import sys

from peft_core.inference.protocol import IDLE_EXIT, TO_WORKER, Load, Progress, Request, Response
from peft_core.schemas.results import MemoryState, UnloadedAdapter

answered = False
for line in sys.stdin:
    request = TO_WORKER.validate_json(line)
    if not isinstance(request, Request):
        continue
    if answered:
        sys.exit(IDLE_EXIT)
    adapter = request.request.adapter_path.name if isinstance(request.request, Load) else ""
    if adapter == "babbling":
        sys.stdout.write("x" * 1000)
        sys.stdout.flush()
        signal.pause()
    if adapter in ("endless", "doomed"):
        sys.stdout.write(Progress(id=request.id, done=0, total=None, message="begun").model_dump_json() + "\n")
        sys.stdout.flush()
        if adapter == "doomed" and sys.stdin.readline():
            sys.exit(1)
        signal.pause()
    answered = True
    answer = UnloadedAdapter(
        status="nothing_loaded",
        adapter_path=None,
        base_unloaded=False,
        resident=MemoryState(),
        memory_before_bytes=request.id,
        memory_after_bytes=0,
        elapsed_s=0,
    )
    sys.stdout.write(
        Response(id=request.id, answer=answer.model_dump(), resident=MemoryState()).model_dump_json() + "\n"
    )
    sys.stdout.flush()
