"""Entry point of `peft-mcp`: the stdio server."""

from __future__ import annotations

import logging
import sys

from pydantic import ValidationError

from peft_core.config import Settings, remove_blank_variables
from peft_core.system.child_process import make_files_private

DESCRIPTION = """\
MCP stdio server: train a LoRA adapter on your own code base, on your own machine, and measure whether it helps.

An MCP client starts it (see examples/ for the configuration of Kiro, Claude Code, Cursor and VS Code) and speaks JSON-RPC
on standard input and output. Started by hand, it waits for a client.
"""


def settings_help() -> str:
    lines = ["settings (environment variables):"]
    for name, field in Settings.model_fields.items():
        default = field.default if field.default is not None else "unset"
        lines.append(f"  CODEBASE_GARDENER_{name.upper():<22} {field.description or ''} Default: {default}.")
    return "\n".join(lines)


def parse_arguments() -> int | None:
    """Answer --help and --version, and refuse unknown arguments. Return the port to serve adapters at, if that is asked for."""
    import argparse  # noqa: PLC0415 -- clients start the server without arguments, and never need it
    from importlib.metadata import version  # noqa: PLC0415

    from peft_core.schemas.serving import DEFAULT_PORT  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="peft-mcp",
        description=DESCRIPTION,
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-mcp {version('peft-mcp')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve the adapters of all projects to editors and scripts until Ctrl-C")
    serve.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="of 127.0.0.1; 0: a free one (default: %(default)s)"
    )
    options = parser.parse_args()
    return options.port if options.command == "serve" else None


def serve(settings: Settings, port: int) -> int:
    """Run the endpoint in the foreground, and print how to use it; return the exit code."""
    from peft_core.endpoint.run import run  # noqa: PLC0415 -- the stdio server does not need it
    from peft_core.errors import PeftMcpError  # noqa: PLC0415
    from peft_core.schemas.serving import EndpointState  # noqa: PLC0415
    from peft_core.serving.service import EndpointOptions  # noqa: PLC0415

    def announce(state: EndpointState) -> None:
        print(f"peft-mcp serves at {state.address}; Ctrl-C ends it.", file=sys.stderr)  # noqa: T201 -- no protocol here
        print(f"The token is in {settings.paths.serving_token}.", file=sys.stderr)  # noqa: T201

    try:
        run(EndpointOptions(settings=settings, port=port), announce)
    except PeftMcpError as error:
        print(f"peft-mcp: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def main() -> None:
    port = parse_arguments() if sys.argv[1:] else None
    remove_blank_variables()
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = f"CODEBASE_GARDENER_{problem['loc'][0]}".upper()
            print(f"peft-mcp: {name} = {problem['input']!r} is not valid: {problem['msg']}", file=sys.stderr)  # noqa: T201 -- stderr, before the server runs
        sys.exit(2)
    make_files_private()
    if port is not None:
        sys.exit(serve(settings, port))
    from server.app import build_server, exit_when_stdin_closes  # noqa: PLC0415 -- invalid settings are reported without it

    # Before the SDK does it with rich, which breaks each message into lines of 80 columns for clients' log files.
    logging.basicConfig(stream=sys.stderr, level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s")
    server = build_server(settings)
    exit_when_stdin_closes(sys.stdin.fileno())
    server.run("stdio")


if __name__ == "__main__":
    main()
