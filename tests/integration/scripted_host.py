"""An inference host that goes to sleep on every second request it gets, as one whose time is just up.

One for an adapter named "endless" begins, and never comes back, whatever it is told; one for "doomed" begins, and dies of
the next word; one for "babbling" is answered with a line that does not end.
"""

from __future__ import annotations

import signal
import sys

from peft_core.inference.protocol import IDLE_EXIT, TO_HOST, Load, Progress, Request, Response
from peft_core.schemas.results import MemoryState, UnloadedAdapter

answered = False
for line in sys.stdin:
    ask = TO_HOST.validate_json(line)
    if not isinstance(ask, Request):
        continue
    if answered:
        sys.exit(IDLE_EXIT)
    what = ask.request.adapter_path.name if isinstance(ask.request, Load) else ""
    if what == "babbling":
        sys.stdout.write("x" * 1000)
        sys.stdout.flush()
        signal.pause()
    if what in ("endless", "doomed"):
        sys.stdout.write(Progress(id=ask.id, done=0, total=None, message="begun").model_dump_json() + "\n")
        sys.stdout.flush()
        if what == "doomed" and sys.stdin.readline():
            sys.exit(1)
        signal.pause()
    answered = True
    answer = UnloadedAdapter(
        status="nothing_loaded",
        adapter_path=None,
        base_unloaded=False,
        resident=MemoryState(),
        memory_before_bytes=ask.id,
        memory_after_bytes=0,
        elapsed_s=0,
    )
    sys.stdout.write(Response(id=ask.id, answer=answer.model_dump(), resident=MemoryState()).model_dump_json() + "\n")
    sys.stdout.flush()
