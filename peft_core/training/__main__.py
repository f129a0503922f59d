"""`python -m peft_core.training [TASK_FILE]`: another name for `python -m peft_core.worker`, the documented command."""

from __future__ import annotations

import sys

from peft_core.worker.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
