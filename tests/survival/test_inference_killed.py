"""The inference worker is killed during load, generate and unload; what the server reports afterwards must be true."""

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

from tests.survival.kill_points import INFERENCE_WORKER
from tests.survival.scenario import MEMORY, STATUS_DEADLINE_S, TIMEOUT_S, Kill, Scenario, gone, until
from tests.survival.test_kill_matrix import ROUNDS, SEED, shuffled
from tests.survival.wire import Server, server
from tests.tiny_models import write_byte_level_tokenizer, write_tiny_adapter, write_tiny_base

pytestmark = pytest.mark.survival

TOOL_OF = {point: point.tool for point in INFERENCE_WORKER if point.tool is not None}
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@dataclass
class Inference:
    """A server, an adapter for it, and the text that the adapter generates undisturbed."""

    scenario: Scenario
    server: Server
    adapter: str
    text: str = ""
    engine: str = "torch"  # both generate the same text

    def call(self, tool: str) -> dict[str, Any]:
        arguments: dict[str, dict[str, Any]] = {
            "load_adapter": {
                "adapter_path": self.adapter,
                "base_model": str(self.scenario.base),
                "engine": self.engine,
            },
            "generate": {"prompt": "def f", "max_new_tokens": 12},
        }
        return self.server.call(tool, **arguments.get(tool, {}))

    def loaded(self) -> dict[str, Any]:
        """Return what the server reports to be in memory."""
        loaded: dict[str, Any] = self.server.call("list_adapters")["structuredContent"]["loaded"]
        return {"base_model": None, "adapters": [], **loaded}  # the answer leaves out what is empty

    def workers(self) -> list[int]:
        children = psutil.Process(self.server.process.pid).children(recursive=True)
        return [child.pid for child in children if not gone(child.pid)]

    def load_and_generate(self) -> str:
        loaded = self.call("load_adapter")
        assert loaded.get("structuredContent", {}).get("status") == "loaded", loaded
        generated = self.call("generate")
        assert not generated.get("isError"), generated
        return str(generated["content"][0]["text"])

    def end_worker(self) -> None:
        """End the worker, so that the next load starts one that knows the kill point."""
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
            until(lambda ended=pid: gone(ended), "the worker to end")
        until(lambda: not self.loaded()["adapters"], "the server to report it", STATUS_DEADLINE_S)

    def kill(self, kill: Kill) -> str:
        """Kill the worker during a call; return the text of the call's answer."""
        self.end_worker()
        self.engine = "llamacpp" if kill.point.module.endswith("llama_model") else "torch"
        mark = self.scenario.arm(kill.point, kill.method)
        tool = TOOL_OF[kill.point]
        for before in ("load_adapter", "generate", "unload_adapter"):
            if before == tool:
                break
            self.call(before)
        answer = self.call(tool)
        answered = time.time()
        self.scenario.disarm()
        assert mark.exists(), f"the point was never reached: {kill}; {answer}"
        if kill.method == MEMORY:
            self.expect_consistent_without_memory(answer)
        else:
            self.expect_reported_death(kill, answer, answered - mark.stat().st_mtime)
        return text_of(answer)

    def expect_reported_death(self, kill: Kill, answer: dict[str, Any], took_s: float) -> None:
        assert took_s < STATUS_DEADLINE_S, (kill, took_s)
        assert answer["isError"], answer
        assert f"died during this call ({TOOL_OF[kill.point].partition('_')[0]})" in text_of(answer)
        assert kill.method in text_of(answer)
        assert "load_adapter again" in text_of(answer)
        assert self.loaded()["adapters"] == []
        assert self.loaded()["base_model"] is None
        assert self.workers() == []

    def expect_consistent_without_memory(self, answer: dict[str, Any]) -> None:
        """Allow success, an error or death; once it has memory again, an adapter that is loaded must generate as before."""
        if answer.get("isError"):
            assert "out of memory" in text_of(answer) or "died during this call" in text_of(answer), answer
        loaded, workers = self.loaded(), self.workers()
        assert workers or not loaded["adapters"]
        for pid in workers:
            resource.prlimit(pid, resource.RLIMIT_AS, UNLIMITED)
        if any(adapter["active"] for adapter in loaded["adapters"]):
            generated = self.call("generate")
            assert generated["content"][0]["text"] == self.text, generated


def text_of(answer: dict[str, Any]) -> str:
    return " ".join(part.get("text", "") for part in answer.get("content", []))


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_tiny_base(tmp_path_factory.mktemp("tiny-base"))
    write_byte_level_tokenizer(base)  # one that llama.cpp has, too
    return base


@pytest.fixture(scope="module")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", tiny_base, seed=1)


@pytest.mark.timeout(1800)
def test_a_killed_inference_worker_is_reported_and_can_be_replaced(
    tmp_path: Path, source: Path, tiny_base: Path, tiny_adapter: Path
) -> None:
    scenario = Scenario(tmp_path, source, tiny_base)
    kills: list[Kill] = []
    for method in ("SIGKILL", "SIGTERM", MEMORY):
        of_method = shuffled([Kill(point, "inference worker", method) for point in TOOL_OF], f"inference {method}")
        kills += of_method[:1] if ROUNDS < 1 else of_method  # few, because each starts torch
    print(f"PEFT_SURVIVAL_SEED={SEED}")
    with server(scenario.paths.root, cwd=tmp_path) as started:
        inference = Inference(scenario, started, str(tiny_adapter))
        inference.text = inference.load_and_generate()
        for number, kill in enumerate(kills, 1):
            print(f"{number:3} of {len(kills)}: {kill}", flush=True)
            answer = inference.kill(kill)
            print(f"      {answer[:160]}", flush=True)
            assert inference.load_and_generate() == inference.text
        workers = inference.workers()
    until(lambda: all(gone(pid) for pid in workers), "the worker to end with its server", TIMEOUT_S)
    scenario.expect_no_processes()
