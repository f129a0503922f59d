"""Entry point of `peft-mcp`: the stdio server."""

from __future__ import annotations

import sys

from pydantic import ValidationError

from peft_core.config import Settings
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


def parse_arguments() -> None:
    """Answer --help and --version, and refuse every other argument."""
    import argparse  # noqa: PLC0415 -- clients start the server without arguments, and never need it
    from importlib.metadata import version  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="peft-mcp",
        description=DESCRIPTION,
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-mcp {version('peft-mcp')}")
    parser.parse_args()


def main() -> None:
    if sys.argv[1:]:
        parse_arguments()
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            name = f"CODEBASE_GARDENER_{problem['loc'][0]}".upper()
            print(f"peft-mcp: {name} = {problem['input']!r} is not valid: {problem['msg']}", file=sys.stderr)  # noqa: T201 -- stderr, before the server runs
        sys.exit(2)
    from server.app import build_server, exit_when_stdin_closes  # noqa: PLC0415 -- invalid settings are reported without it

    make_files_private()
    server = build_server(settings)
    exit_when_stdin_closes(sys.stdin.fileno())
    server.run("stdio")


if __name__ == "__main__":
    main()
