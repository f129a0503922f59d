"""The inference process is killed at points of a load, of an answer and of an unload: what the server says then is so."""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.survival.life import MEMORY, PATIENCE_S, TRUE_WITHIN_S, Kill, Life, gone, until
from tests.survival.points import HOST
from tests.survival.test_kill_matrix import ROUNDS, SEED, shuffled
from tests.survival.wire import Server, server
from tests.tiny_models import write_tiny_adapter, write_tiny_base

pytestmark = pytest.mark.survival

TOOL_OF = {point: tool for tool, points in HOST.items() for point in points}
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@dataclass
class Inference:
    """A server, an adapter for it, and what the adapter writes when nothing has happened."""

    life: Life
    server: Server
    adapter: str
    text: str = ""

    def call(self, tool: str) -> dict[str, Any]:
        arguments: dict[str, dict[str, Any]] = {
            "load_adapter": {"adapter_path": self.adapter, "base_model": str(self.life.base)},
            "generate": {"prompt": "def f", "max_new_tokens": 12},
        }
        return self.server.call(tool, **arguments.get(tool, {}))

    def loaded(self) -> dict[str, Any]:
        """What the server says is in memory."""
        return dict(self.server.call("list_adapters")["structuredContent"]["loaded"])

    def hosts(self) -> list[int]:
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return [child.pid for child in children if not gone(child.pid)]

    def load_and_write(self) -> str:
        loaded = self.call("load_adapter")
        assert loaded.get("structuredContent", {}).get("status") == "loaded", loaded
        written = self.call("generate")
        assert not written.get("isError"), written
        return str(written["structuredContent"]["text"])

    def end_host(self) -> None:
        """The next load starts a fresh one, which comes by the point."""
        for pid in self.hosts():
            os.kill(pid, signal.SIGKILL)
            until(lambda ended=pid: gone(ended), "the host to end")
        until(lambda: not self.loaded()["adapters"], "the server to say so", TRUE_WITHIN_S)

    def suffer(self, kill: Kill) -> str:
        """The words with which the call under way ended."""
        self.end_host()
        mark = self.life.arm(kill.point, kill.way)
        tool = TOOL_OF[kill.point]
        for before in ("load_adapter", "generate", "unload_adapter"):
            if before == tool:
                break
            self.call(before)
        answer = self.call(tool)
        said = time.time()
        self.life.disarm()
        assert mark.exists(), f"the point was never reached: {kill}; {answer}"
        if kill.way == MEMORY:
            self.expect_truth_without_memory(answer)
        else:
            self.expect_truth_of_death(kill, answer, said - mark.stat().st_mtime)
        return words(answer)

    def expect_truth_of_death(self, kill: Kill, answer: dict[str, Any], took_s: float) -> None:
        assert took_s < TRUE_WITHIN_S, (kill, took_s)
        assert answer["isError"], answer
        assert f"died during this call ({TOOL_OF[kill.point].partition('_')[0]})" in words(answer)
        assert kill.way in words(answer)
        assert "load_adapter again" in words(answer)
        assert self.loaded()["adapters"] == []
        assert self.loaded()["base_model"] is None
        assert self.hosts() == []

    def expect_truth_without_memory(self, answer: dict[str, Any]) -> None:
        """It got by, said so, or died; once it has memory again, what is said to be loaded answers as it always did."""
        if answer.get("isError"):
            assert "out of memory" in words(answer) or "died during this call" in words(answer), answer
        loaded, hosts = self.loaded(), self.hosts()
        assert hosts or not loaded["adapters"]
        for pid in hosts:
            resource.prlimit(pid, resource.RLIMIT_AS, UNLIMITED)
        if any(adapter["active"] for adapter in loaded["adapters"]):
            written = self.call("generate")
            assert written["structuredContent"]["text"] == self.text, written


def words(answer: dict[str, Any]) -> str:
    return " ".join(part.get("text", "") for part in answer.get("content", []))


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="module")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", tiny_base, seed=1)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", MEMORY])
def test_the_inference_process_is_killed(
    tmp_path: Path,
    source: Path,
    tiny_base: Path,
    toy_adapter: Path,
    way: str,
) -> None:
    life = Life(tmp_path, source, tiny_base)
    kills = shuffled([Kill(point, "host", way) for point in TOOL_OF], f"host {way}")
    if ROUNDS < 1:
        kills = kills[:1]  # each starts torch twice
    print(f"PEFT_SURVIVAL_SEED={SEED}")
    with server(life.paths.root, cwd=tmp_path) as started:
        inference = Inference(life, started, str(tiny_adapter))
        inference.text = inference.load_and_write()
        for number, kill in enumerate(kills, 1):
            print(f"{number:3} of {len(kills)}: {kill}", flush=True)
            said = inference.suffer(kill)
            print(f"      {said[:160]}", flush=True)
            assert inference.load_and_write() == inference.text
        left = inference.hosts()
    until(lambda: all(gone(pid) for pid in left), "the host to end with its server", PATIENCE_S)
    life.expect_nobody()
