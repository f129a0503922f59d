"""An inference host that goes to sleep on every second request it gets, as one whose time is just up."""

from __future__ import annotations

import sys

from peft_core.inference.protocol import IDLE_EXIT, TO_HOST, Answered, Ask
from peft_core.results import Resident, UnloadedAdapter

answered = False
for line in sys.stdin:
    ask = TO_HOST.validate_json(line)
    if not isinstance(ask, Ask):
        continue
    if answered:
        sys.exit(IDLE_EXIT)
    answered = True
    answer = UnloadedAdapter(
        status="nothing_loaded",
        adapter_path=None,
        base_unloaded=False,
        resident=Resident(),
        memory_before_bytes=ask.id,
        memory_after_bytes=0,
        elapsed_s=0,
    )
    sys.stdout.write(Answered(id=ask.id, answer=answer.model_dump(), resident=Resident()).model_dump_json() + "\n")
    sys.stdout.flush()
