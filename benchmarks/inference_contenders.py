"""The contenders of `inference.py`: our manager in either engine, plain PEFT, and plain llama.cpp.

Each computes in a process of its own, whose CPU time and memory are read from outside.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import anyio
import psutil
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core import PEFTManager, Settings
from peft_core.schemas.generation import Engine

PEFT = """
import gc, json, sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
threads = torch.get_num_threads()
model = None

def load(path):
    global model
    if model is None:
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
        model = PeftModel.from_pretrained(base, path, adapter_name=name(path))
        model.eval()
    else:
        model.load_adapter(path, adapter_name=name(path))
        model.set_adapter(name(path))

def switch(path):
    model.set_adapter(name(path))

def unload(path):
    global model
    model.delete_adapter(name(path))
    if not model.peft_config:
        model = None
        gc.collect()

def generate(prompt, tokens, one_thread):
    torch.set_num_threads(1 if one_thread else threads)
    given = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**given, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1]:])

def name(path):
    return path.rpartition("/")[2]

verbs = {"load": load, "switch": switch, "unload": unload, "generate": generate}
for line in sys.stdin:
    verb, arguments = json.loads(line)
    print(json.dumps(verbs[verb](**arguments)), flush=True)
"""
LLAMA_CPP = """
import json, secrets, sys

import xllamacpp

def load(base, adapters):
    global server
    params = xllamacpp.CommonParams()
    params.model.path = base
    loras = []
    for path in adapters:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = path, 1.0
        loras.append(lora)
    params.lora_adapters = loras
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 8192, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.port, params.hostnames, params.api_keys = 0, ["127.0.0.1"], [secrets.token_urlsafe(32)]
    params.warmup = params.ui = False
    params.offline, params.verbosity = True, 1
    server = xllamacpp.Server(params)

def generate(prompt, tokens, adapter):
    answer = server.handle_completions({
        "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "lora": [{"id": number, "scale": float(number == adapter)} for number in range(2)],
    })
    return answer["choices"][0]["text"]

verbs = {"load": load, "generate": generate}
for line in sys.stdin:
    verb, arguments = json.loads(line)
    print(json.dumps(verbs[verb](**arguments)), flush=True)
"""


class Writer(Protocol):
    """Generates text greedily with the adapter that was loaded or selected last."""

    async def generate(self, prompt: str, tokens: int) -> str: ...

    def process(self) -> psutil.Process: ...

    async def aclose(self) -> None: ...


def cpu_s(writer: Writer) -> float:
    times = writer.process().cpu_times()
    return float(times.user + times.system)


def memory_mb(writer: Writer) -> float:
    return float(writer.process().memory_info().rss / 1e6)


class Ours:
    """Our manager with its inference worker. It is given the base by a new link each time, so that no cache knows it."""

    def __init__(self, data_dir: Path, base: Path, engine: Engine) -> None:
        # Two managers run at the same time, so each has its data directory for locks and logs of its own.
        data_dir.mkdir(exist_ok=True)
        if not (converted := data_dir / "base_models").exists():
            converted.symlink_to(data_dir.parent / "base_models")
        self._manager = PEFTManager(Settings(data_dir=data_dir, engine=engine, log_level="WARNING"))
        self._base = str(base)
        self._engine = engine
        self._worker: psutil.Process | None = None

    async def load(self, adapter: Path) -> None:
        before = set() if self._worker else set(psutil.Process().children())
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert (loaded.status, loaded.engine) == ("loaded", self._engine), loaded.reason or loaded.engine_reason
        if self._worker is None:
            started = set(psutil.Process().children()) - before
            self._worker = next(child for child in started if "peft_core.inference.worker" in child.cmdline())

    async def switch(self, adapter: Path) -> None:
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert loaded.how == "switched"

    async def unload(self, adapter: Path) -> None:
        await self._manager.unload_adapter(str(adapter))

    async def generate(self, prompt: str, tokens: int) -> str:
        generated = await self._manager.generate({"prompt": prompt, "max_new_tokens": tokens})
        assert generated.completion_tokens == tokens, "the answer ended early: choose another prompt"
        return generated.text

    async def verify(self, adapter: Path, base: Path) -> None:
        checked = await self._manager.verify_adapter_compatibility(str(adapter), str(base))
        assert not any(reason.severity == "error" for reason in checked.reasons), checked.reasons

    def process(self) -> psutil.Process:
        assert self._worker is not None
        return self._worker

    async def aclose(self) -> None:
        await self._manager.aclose()


class Program:
    """A Python program that answers JSON lines."""

    def __init__(self, code: str, *arguments: str) -> None:
        self._command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        self._process: Process | None = None
        self._lines: BufferedByteReceiveStream | None = None

    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    async def aclose(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.aclose()

    async def request(self, verb: str, **arguments: Any) -> Any:
        process = self._process or await self._start()
        assert process.stdin is not None
        assert self._lines is not None
        await process.stdin.send(json.dumps([verb, arguments]).encode() + b"\n")
        return json.loads(await self._lines.receive_until(b"\n", 1 << 20))

    async def _start(self) -> Process:
        self._process = await anyio.open_process(self._command, stderr=None, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert self._process.stdout is not None
        self._lines = BufferedByteReceiveStream(self._process.stdout)
        return self._process


class PlainPeft(Program):
    def __init__(self, base: Path) -> None:
        super().__init__(PEFT, str(base))
        self.one_thread = False

    async def load(self, adapter: Path) -> None:
        await self.request("load", path=str(adapter))

    async def switch(self, adapter: Path) -> None:
        await self.request("switch", path=str(adapter))

    async def unload(self, adapter: Path) -> None:
        await self.request("unload", path=str(adapter))

    async def generate(self, prompt: str, tokens: int) -> str:
        return str(await self.request("generate", prompt=prompt, tokens=tokens, one_thread=self.one_thread))


class PlainLlamaCpp(Program):
    """llama.cpp as the package `xllamacpp` contains it, with the same files as ours, on one thread."""

    def __init__(self) -> None:
        super().__init__(LLAMA_CPP)

    async def load_all(self, base: Path, adapters: list[Path]) -> None:
        await self.request("load", base=str(base), adapters=[str(path) for path in adapters])

    async def generate(self, prompt: str, tokens: int) -> str:
        """Generate with the adapter that was given last, as the others have it selected."""
        return str(await self.request("generate", prompt=prompt, tokens=tokens, adapter=1))
