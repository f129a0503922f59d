"""`python -m peft_core.training [TASK_FILE]`, the documented command for launchers: another name for `peft_core.worker`."""

from __future__ import annotations

import sys

from peft_core.worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
