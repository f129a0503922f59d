"""The endpoint's process: reads `EndpointOptions` from standard input, writes its `EndpointState` or an `ErrorInfo`, serves.

python -m peft_core.endpoint < options.json
"""

from __future__ import annotations

import os
import signal
import sys

from peft_core.endpoint.run import run
from peft_core.errors import PeftMcpError
from peft_core.schemas.results import ErrorInfo
from peft_core.serving.service import EndpointOptions
from peft_core.system import logs
from peft_core.system.child_process import make_files_private, redirect_stdout


def main() -> int:
    make_files_private()
    output = redirect_stdout()
    options = EndpointOptions.model_validate_json(sys.stdin.buffer.read())
    logs.configure(options.settings.log_level)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal of the client was closed

    def announce(line: str) -> None:
        os.write(output, f"{line}\n".encode())
        os.close(output)

    try:
        run(options, lambda state: announce(state.model_dump_json()))
    except PeftMcpError as error:
        announce(ErrorInfo.from_error(error).model_dump_json())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
