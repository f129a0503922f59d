"""`make demo`: the main workflow end to end, as an MCP client runs it.

It starts the stdio server, trains an adapter on this project's own source, shows the progress that the server streams,
prints the measurements, then loads the adapter and compares its completions with the base model's. At the end it exports the
adapter for llama.cpp, and llama.cpp itself writes with the exported file and without it. All files are written to .demo/ in the
project directory.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult, TextContent
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from peft_core.llamacpp import runtime
from peft_core.llamacpp.worker.server import LlamaServer

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "peft-mcp-demo"
# About 100 functions and classes: minutes on two CPU cores, and enough to see the loss fall. A real run omits the config.
# Each run trains from scratch; without continue_from, a second one would only learn what has changed since the first.
CONFIG = {"max_steps": 24, "held_out_fraction": 0.03, "eval_steps": 12, "continue_from": "none"}
# One chat message, and one piece of code to continue, under a file path as in the training examples.
PROMPTS: list[dict[str, Any]] = [
    {
        "messages": [
            {
                "role": "user",
                "content": "In this project, write a function that raises an error when the rank is larger than 512.",
            }
        ],
        "max_new_tokens": 64,
    },
    {
        "prompt": "# peft_core/manager.py\n\nclass PEFTManager:\n    async def export_adapter(self, adapter_path: str",
        "max_new_tokens": 64,
        "stop": ["\n\n"],
    },
]
console = Console()


async def main() -> int:
    data_dir = ROOT / ".demo"
    command = shutil.which("peft-mcp", path=str(Path(sys.executable).parent)) or "peft-mcp"
    server = StdioServerParameters(command=command, env={**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir)})
    console.print(f"Starting the stdio server: [bold]{command}[/] (data in {data_dir})")
    started_at = time.monotonic()
    async with Client(server) as client:
        console.print(f"Connected after {time.monotonic() - started_at:.1f} s, protocol {client.protocol_version}.")
        arguments = {"project_id": PROJECT, "training_data": str(ROOT), "config": CONFIG}
        started = await client.call_tool("train_adapter", arguments)
        console.print(f"\n[bold]train_adapter[/] returned:\n{text_of(started)}\n")
        if started.is_error:
            return 1
        status = await watch(client, started.structured_content or {})
        if status["status"] != "completed":
            console.print(f"[red]{status['status']}[/]: {status['summary']}")
            return 1
        report(status)
        await use(client)
        command = await export(client)
    return write_in_llama_cpp(command)


async def watch(client: Client, status: Mapping[str, Any]) -> Mapping[str, Any]:
    """Call get_training_status with wait_s until the job ends; the server streams progress into each open call."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("waiting", total=100)

        async def show(done: float, _total: float | None, message: str | None) -> None:
            progress.update(bar, completed=done, description=message or "")

        while status["status"] in ("queued", "in_progress"):
            arguments = {"project_id": PROJECT, "job_id": status["job_id"], "wait_s": 30}
            result = await client.call_tool("get_training_status", arguments, progress_callback=show)
            status = result.structured_content or {}
        progress.update(bar, completed=status["progress_percent"], description=status["status"])
    return status


def report(status: Mapping[str, Any]) -> None:
    metrics, dataset = status["metrics"], status["dataset"]
    table = Table(title=f"\n{status['base_model']} on {status['device']}: held-out files", title_justify="left")
    for column in ("", "base", "adapter"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("held-out loss (nats per token)", f"{metrics['base_loss']:.3f}", f"{metrics['adapter_loss']:.3f}")
    table.add_row("held-out perplexity", f"{metrics['base_perplexity']:.2f}", f"{metrics['adapter_perplexity']:.2f}")
    console.print(table)
    facts = Table(show_header=False, box=None)
    facts.add_row(
        "trained on",
        f"{metrics['tokens']} tokens, {status['step']} steps ({dataset['train_examples']} examples in the training set)",
    )
    facts.add_row("held out", f"{dataset['held_out_examples']} examples, {dataset['held_out_tokens']} tokens")
    facts.add_row(
        "left out", ", ".join(f"{count} {why}" for why, count in dataset.get("left_out", {}).items()) or "nothing"
    )
    facts.add_row("wall time", f"{metrics['wall_s']:.0f} s")
    facts.add_row("speed", f"{metrics['tokens_per_second']:.0f} tokens/s")
    facts.add_row("peak memory", f"{metrics['peak_memory_bytes'] / 1e9:.2f} GB")
    facts.add_row("adapter", f"{metrics['adapter_bytes'] / 1e6:.1f} MB")
    console.print(facts)
    console.print(f" {status['adapter_path']}", soft_wrap=True)


async def call_until_done(client: Client, tool: str, arguments: Mapping[str, Any]) -> CallToolResult:
    """Call a tool, and again while it answers that it is still at work."""
    while True:
        result = await client.call_tool(tool, dict(arguments))
        if (result.structured_content or {}).get("status") != "working":
            return result
        console.print(text_of(result))


async def use(client: Client) -> None:
    """Load the adapter and compare its completions with those of the base model."""
    loaded = await call_until_done(client, "load_adapter", {"adapter_path": PROJECT})
    console.print(f"\n[bold]load_adapter[/] returned:\n{text_of(loaded)}", soft_wrap=True)
    console.print("\n[bold]generate[/], with and without the adapter (greedy, so the same every time):")
    for prompt in PROMPTS:
        result = await client.call_tool("generate", {**prompt, "compare_with_base": True})
        generation = (result.meta or {})["peft-mcp/result"]  # the text is beside it
        title = prompt.get("prompt") or prompt["messages"][0]["content"]
        table = Table(title="\n" + escape(title), title_justify="left")
        table.add_column(f"{generation['base_model']}", ratio=1)
        table.add_column("with the adapter", ratio=1)
        table.add_row(escape(generation["base_text"].strip()), escape(generation["text"].strip()))
        console.print(table)
    unloaded = await client.call_tool("unload_adapter", {})
    console.print(f"\n[bold]unload_adapter[/] returned:\n{text_of(unloaded)}", soft_wrap=True)


async def export(client: Client) -> list[str]:
    """Export the adapter as a LoRA file for llama.cpp, and return the command that the answer gives to use it."""
    arguments = {"adapter_path": PROJECT, "to": "gguf-lora", "overwrite": True}
    exported = await call_until_done(client, "export_adapter", arguments)
    console.print(f"\n[bold]export_adapter[/] returned:\n{escape(text_of(exported))}", soft_wrap=True)
    return [] if exported.is_error else shlex.split((exported.structured_content or {})["usage"][0])


def write_in_llama_cpp(command: list[str]) -> int:
    """Let llama.cpp continue a text without the exported file and with it, in this process. Return the exit status.

    Args:
        command: `llama-server -m BASE --lora FILE ...`, as the answer of export_adapter gives it.
    """
    if not command:
        return 1
    if not runtime.is_installed():
        console.print("\nllama.cpp is not installed here (the extra llamacpp), so the exported file is not used in it.")
        return 0
    base, file = (Path(command[command.index(option) + 1]) for option in ("-m", "--lora"))
    llama = LlamaServer(base, [file], context=512, threads=1)
    question = {"prompt": PROMPTS[1]["prompt"], "max_tokens": 64, "temperature": 0, "stop": ["\n\n"]}
    texts = [llama.complete(question, adapter)["choices"][0]["text"].strip() for adapter in (None, 0)]
    console.print(
        f"\n[bold]{runtime.runtime_name()}[/] with the exported file:\n {escape(' '.join(command))}", soft_wrap=True
    )
    table = Table(title="\n" + escape(question["prompt"]), title_justify="left")
    table.add_column(base.stem, ratio=1)
    table.add_column("with the exported file", ratio=1)
    table.add_row(*map(escape, texts))
    console.print(table)
    return 0


def text_of(result: CallToolResult) -> str:
    return next((part.text for part in result.content if isinstance(part, TextContent)), "")


if __name__ == "__main__":
    sys.exit(anyio.run(main))
