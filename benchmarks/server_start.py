"""Compare our server with a bare mcp server, alternating: time to the first reply, idle memory, and a call that reads.

The targets: within 150 ms and 10 MB of the bare server; a status call with p50 < 5 ms. The exit code is 1 if one is missed.

    python benchmarks/server_start.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

BARE = """
from mcp.server import MCPServer
server = MCPServer("bare")

@server.tool()
async def status(project_id: str) -> str:
    "A bare tool."
    return "not_started"

server.run("stdio")
"""
CALLS = 200


@dataclass
class Measurements:
    start_s: list[float]
    idle_mb: list[float]
    call_ms: list[float]


async def measure(server: StdioServerParameters, tool: str, into: Measurements) -> None:
    began = time.perf_counter()
    async with Client(server, mode="legacy") as client:
        into.start_s.append(time.perf_counter() - began)  # the handshake was answered
        await client.list_tools()
        arguments: dict[str, Any] = {"project_id": "none"} | ({"wait_s": 0} if tool != "status" else {})
        for _ in range(CALLS):
            began = time.perf_counter()
            result = await client.call_tool(tool, arguments)
            into.call_ms.append((time.perf_counter() - began) * 1e3)
            assert not result.is_error
        into.idle_mb.append(resident_mb(newest_child()))


def newest_child() -> int:
    output = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True
    )
    # ps itself is the newest child, but it has ended by now.
    return max(int(pid) for pid in output.stdout.split() if Path(f"/proc/{pid}").exists() or sys.platform == "darwin")


def resident_mb(pid: int) -> float:
    output = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(output.stdout) / 1024


async def main(repeats: int) -> int:
    with tempfile.TemporaryDirectory() as data_dir:
        environment = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": data_dir}
        servers = {
            "bare mcp": (StdioServerParameters(command=sys.executable, args=["-c", BARE]), "status"),
            "peft-mcp": (
                StdioServerParameters(command=sys.executable, args=["-m", "server"], env=environment),
                "get_training_status",
            ),
        }
        for server, tool in servers.values():  # one warm-up each: byte code and disk caches
            await measure(server, tool, Measurements([], [], []))
        results = {name: Measurements([], [], []) for name in servers}
        for _ in range(repeats):
            for name, (server, tool) in servers.items():
                await measure(server, tool, results[name])
    bare, ours = results["bare mcp"], results["peft-mcp"]
    print(f"{repeats} alternating starts, medians (min-max)\n")
    print(f"{'':<10} {'start to first reply':>24} {'idle memory':>14} {'status call p50':>16} {'p99':>9}")
    for name, m in results.items():
        start = f"{median(m.start_s):.3f} s ({min(m.start_s):.2f}-{max(m.start_s):.2f})"
        p99 = sorted(m.call_ms)[int(len(m.call_ms) * 0.99)]
        print(f"{name:<10} {start:>24} {median(m.idle_mb):>11.1f} MB {median(m.call_ms):>13.2f} ms {p99:>6.1f} ms")
    extra_ms = median(o - b for o, b in zip(ours.start_s, bare.start_s, strict=True)) * 1e3
    extra_mb = median(ours.idle_mb) - median(bare.idle_mb)
    call_ms = median(ours.call_ms)
    print(
        f"\npeft-mcp - bare: {extra_ms:+.0f} ms (target 150), {extra_mb:+.1f} MB (target 10); "
        f"status call {call_ms:.2f} ms (target 5)"
    )
    return int(extra_ms > 150 or extra_mb > 10 or call_ms > 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    sys.exit(anyio.run(main, parser.parse_args().repeats))
