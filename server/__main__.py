"""Entry point of `peft-mcp`: the stdio server, or a command if there are arguments."""

from __future__ import annotations

import gc
import sys

from pydantic import ValidationError

from peft_core.config import Settings, remove_blank_variables
from peft_core.system.allocator import limit_retained_memory
from peft_core.system.child_process import make_files_private

HINT = "peft-mcp is an MCP server, and waits for a client on standard input. `peft-mcp --help` lists commands; Ctrl-C ends it."


def main() -> None:
    options = None
    if sys.argv[1:]:
        from server.cli.arguments import parse_arguments  # noqa: PLC0415 -- clients start the server without arguments

        options = parse_arguments(sys.argv[1:])
    remove_blank_variables()
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = f"CODEBASE_GARDENER_{problem['loc'][0]}".upper()
            print(f"peft-mcp: {name} = {problem['input']!r} is not valid: {problem['msg']}", file=sys.stderr)  # noqa: T201 -- stderr, before the server runs
        sys.exit(2)
    make_files_private()
    if options is not None:
        from server.cli.run import run  # noqa: PLC0415 -- as above

        sys.exit(run(options, settings))
    limit_retained_memory()
    from server.app import build_server, exit_when_stdin_closes  # noqa: PLC0415 -- invalid settings are reported without it
    from server.logs import configure_logging  # noqa: PLC0415 -- as above

    configure_logging(settings.log_level)
    if sys.stdin.isatty():
        print(HINT, file=sys.stderr)  # noqa: T201 -- standard output carries the protocol
    server = build_server(settings)
    # A full collection waits until a quarter of all objects is new. Without those of the start, that is soon.
    gc.freeze()
    gc.collect()
    exit_when_stdin_closes(sys.stdin.fileno())
    server.run("stdio")


if __name__ == "__main__":
    main()
