"""The commands and options of `peft-mcp`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import fill

from peft_core.config import Settings
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.serving import DEFAULT_PORT

DESCRIPTION = """\
Train a LoRA adapter on your own code base, on your own machine, and measure whether it helps.

Without a command, peft-mcp is an MCP stdio server: an MCP client starts it and speaks JSON-RPC on standard input and output.
"""
_INDENT = " " * 6
EXIT_CODES = """\
exit codes:
  0    done
  1    the verdict is worse than --fail-unless demands, or doctor found what prevents training
  2    the request or a setting is not valid, or cannot be carried out
  3    the job failed, or was cancelled or interrupted
  130  Ctrl-C; a job that has been queued continues in the background
"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command and its options. --help and --version end the process with code 0, wrong usage with code 2."""
    parser = argparse.ArgumentParser(
        prog="peft-mcp",
        description=DESCRIPTION,
        epilog=f"{EXIT_CODES}\n{settings_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"peft-mcp {version('peft-mcp')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_status(commands)
    _add_refresh(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_cancel_and_resume(commands)
    adapters = _add(commands, "list", "list the adapters that were trained here")
    adapters.add_argument("project", nargs="?", help="only this project's")
    disk = _add(commands, "disk", "show what is kept on disk, and free what is named")
    disk.add_argument("--free", action="append", metavar="NAME", help="delete this item, as listed; may be repeated")
    doctor = _add(commands, "doctor", "check what training and the clients need, and say what to do")
    doctor.add_argument(
        "--report",
        metavar="FILE",
        help="also write what the checks of this machine's GPU found, to send; it contains no code, path or name",
    )
    serve = commands.add_parser("serve", help="serve the adapters of all projects to editors and scripts until Ctrl-C")
    serve.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="of 127.0.0.1; 0: a free one (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def settings_help() -> str:
    lines = ["settings (environment variables):"]
    for name, field in Settings.model_fields.items():
        default = field.default if field.default is not None else "unset"
        lines.append(f"  CODEBASE_GARDENER_{name.upper()}")
        lines.append(
            fill(
                f"{field.description or ''} Default: {default}.", 100, initial_indent=_INDENT, subsequent_indent=_INDENT
            )
        )
    return "\n".join(lines)


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "train", "train an adapter, and wait for its evaluation")
    parser.add_argument("path", help="a repository, a file of records, or a LanceDB table")
    parser.add_argument(
        "--project", metavar="ID", help="the project's name (default: the name of the directory or file)"
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="optimiser steps, instead of --epochs")
    parser.add_argument("--epochs", type=float, metavar="N", help="passes over the data, instead of --max-steps")
    parser.add_argument(
        "--config",
        metavar="JSON",
        help="further settings of the training, such as '{\"rank\": 8}'; options win over it",
    )
    _add_data_options(parser)
    _add_no_wait(parser)


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "status", "show a project's latest training, or the newest jobs of all projects")
    parser.add_argument("project", nargs="?", help="omit to list the newest jobs")
    parser.add_argument("--job", metavar="ID", help="of this job instead of the latest training")
    parser.add_argument("--wait", action="store_true", help="follow the job until it ends")


def _add_refresh(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "refresh", "bring adapters up to date with their code, and say when to do so by itself")
    parser.add_argument("projects", nargs="*", metavar="PROJECT", help="omit for all projects that were trained here")
    parser.add_argument(
        "--if-due",
        action="store_true",
        help="only those that are due by --retrain-when; they train while the machine is free",
    )
    parser.add_argument(
        "--retrain-when",
        metavar="RULE",
        help="only set when to retrain by itself: never, units=PERCENT (of the code units changed) or commits=N",
    )
    hook = parser.add_mutually_exclusive_group()
    hook.add_argument(
        "--install-hook", action="store_true", help="only add --if-due to git's post-commit hook, after asking"
    )
    hook.add_argument("--remove-hook", action="store_true", help="only remove it from the hook")
    parser.add_argument("--yes", action="store_true", help="do not ask before a hook is changed")
    _add_no_wait(parser)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "evaluate", "measure on any code whether an adapter helps")
    parser.add_argument("adapter", help="a project (its current adapter), or the directory of an adapter")
    parser.add_argument("path", help="code to evaluate on; what the adapter was trained on is left out")
    parser.add_argument(
        "--fail-unless",
        choices=[Verdict.HELPS.value, Verdict.NO_DIFFERENCE.value],
        help="exit with code 1 if the verdict is worse than this",
    )
    _add_unproven_base(parser)
    _add_data_options(parser)
    _add_no_wait(parser)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add(commands, "compare", "measure which of two adapters of one base model to keep")
    for name in ("adapter_a", "adapter_b"):
        parser.add_argument(name, help="a project (its current adapter), or the directory of an adapter")
    parser.add_argument(
        "path",
        nargs="?",
        help="code to compare them on (default: what the newer one was trained on); what either was trained on is left out",
    )
    _add_unproven_base(parser)
    _add_data_options(parser)
    _add_no_wait(parser)


def _add_cancel_and_resume(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, help_ in (
        ("cancel", "stop a job; its last checkpoint is kept"),
        ("resume", "continue a job that ended early from its last checkpoint"),
    ):
        parser = _add(commands, name, help_)
        parser.add_argument("project")
        parser.add_argument("--job", metavar="ID", help="this job instead of the latest training")
    _add_no_wait(parser)  # of resume


def _add_unproven_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accept-unproven-base", action="store_true", help="evaluate although only the shapes fit the base model"
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="MODEL", help="directory, .gguf file, cached hub id or ollama:NAME")
    for name, help_ in (("include", "read only these files"), ("exclude", "do not read these files")):
        parser.add_argument(
            f"--{name}", action="append", metavar="PATTERN", help=f"{help_}; as in .gitignore, may be repeated"
        )


def _add_no_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-wait", action="store_true", help="return when the job is queued")
