"""Using adapters: our `PEFTManager`, whose model lives in a child process, against plain PEFT in a child of its own.

The bundled base in float32 on the same files, the same two adapters (rank 16, all linear layers), the same prompt. Both
children are alive at once and are asked in turn, so that what else runs on the machine disturbs both. Times are those
of who asks, from the question to the answer: for a cold load that is the start of Python, its imports, tokenizer, base
and adapter. A load of ours also verifies the file, and computes a text to prove the effect; plain PEFT does neither, and
reads its memory-mapped base only when it first writes. Memory is resident memory (VmRSS) of the child, its pages of the
base's file included; with base + 2 it is taken after writing.

The bars, for ours alone: load < 10 s cold, < 1 s warm; switch < 100 ms; verify < 50 ms; less than 8 MB of growth from
cycle 10 to the last. Exit code 1 when one is missed.

    python benchmarks/inference.py [--repeats 3] [--cycles 100] [--base-cache DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Awaitable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import anyio
import psutil
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core import PEFTManager, Settings
from peft_core.base_models.resolve import resolve
from peft_core.schemas.base_model import BUNDLED

PLAIN = """
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

def write(prompt, tokens, one_thread):
    torch.set_num_threads(1 if one_thread else threads)
    given = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**given, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1]:])

def name(path):
    return path.rpartition("/")[2]

verbs = {"load": load, "switch": switch, "unload": unload, "write": write}
for line in sys.stdin:
    verb, arguments = json.loads(line)
    print(json.dumps(verbs[verb](**arguments)), flush=True)
"""
PROMPT = '"""Files of a project."""\n\nimport os\nfrom pathlib import Path\n\n\ndef source_files(root: Path) -> list[Path]:\n'
TOKENS = 64
WARM_UP = 8  # tokens, uncounted
RANK = 16
SWITCHES = 20  # per round, to one and the other in turn
VERIFICATIONS = 5  # per round, each without a cache hit and then again
TEXTS = 2  # per round
SETTLED = 10  # cycles after which memory should not grow any more
OURS, PEER = "peft-mcp", "plain PEFT"

Results = dict[str, dict[str, list[float]]]  # by row and contender


@dataclass(frozen=True)
class Row:
    what: str
    unit: Literal["s", "ms", "MB", "tokens/s"]
    bar: float | None = None  # ours must stay below
    ratio: bool = True


ROWS = (
    Row("load, cold", "s", bar=10),
    Row("load, warm", "s", bar=1),
    Row("switch", "ms", bar=100),
    Row("verify, first call", "ms"),
    Row("verify, no cache hit", "ms", bar=50),
    Row("verify, warm", "ms", bar=50),
    Row("unload one of two", "ms"),
    Row("unload the last", "ms"),
    Row("memory, base + 2", "MB"),
    Row("memory, base + 1", "MB"),
    Row("memory, nothing", "MB"),
    Row("write", "tokens/s"),
    Row("write, peer: 1 thread", "tokens/s"),
    Row("cycle", "ms"),
    Row("memory, settled", "MB"),
    Row("memory, last cycle", "MB"),
    Row("growth", "MB", bar=8, ratio=False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=100, help=f"of load, switch, unload; more than {SETTLED}")
    parser.add_argument("--base-cache", type=Path, help="keeps the converted base for the next time")
    options = parser.parse_args()
    if options.repeats < 1 or options.cycles <= SETTLED:
        parser.error(f"--repeats must be at least 1, and --cycles more than {SETTLED}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # Elsewhere, so that this process, which stands for the server, imports no torch.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            base = pool.submit(prepare, work, options.base_cache and options.base_cache.absolute()).result()
        results = anyio.run(measure, work, base, options.repeats, options.cycles)
    return report(results, options)


def prepare(work: Path, base_cache: Path | None) -> Path:
    """The base's converted directory and, in `work`, adapters that are known to belong to it."""
    import torch  # noqa: PLC0415 -- in a process of its own
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 -- likewise
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 -- likewise
    from transformers.utils import logging  # noqa: PLC0415 -- likewise

    from peft_core.modeling.convert import ensure_hf_directory  # noqa: PLC0415 -- likewise

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name

    data = work / "data"
    data.mkdir()
    if base_cache is not None:
        base_cache.mkdir(parents=True, exist_ok=True)
        (data / "base_models").symlink_to(base_cache)
    base = resolve(BUNDLED, Settings(data_dir=data))
    directory = ensure_hf_directory(base, data / "base_models", lambda detail: print(f"# {detail}", file=sys.stderr))
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), lora)
    for seed, adapter in enumerate(adapters_in(work)):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.002 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(adapter), save_embedding_layers=False)
    return directory


def adapters_in(work: Path) -> tuple[Path, Path]:
    return work / "first", work / "second"


class Ours:
    """`base` is new to the manager each time: a link of its own, so that nothing known of it is at hand."""

    def __init__(self, data_dir: Path, base: Path) -> None:
        self._manager = PEFTManager(Settings(data_dir=data_dir, log_level="WARNING"))
        self._base = str(base)

    async def load(self, adapter: Path) -> None:
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert loaded.status == "loaded", loaded.reason

    async def switch(self, adapter: Path) -> None:
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert loaded.how == "switched"

    async def unload(self, adapter: Path) -> None:
        await self._manager.unload_adapter(str(adapter))

    async def write(self, tokens: int, *, one_thread: bool = False) -> str:
        assert not one_thread  # it chooses itself
        written = await self._manager.generate({"prompt": PROMPT, "max_new_tokens": tokens})
        assert written.completion_tokens == tokens, "the answer ended early: choose another prompt"
        return written.text

    async def verify(self, adapter: Path, base: Path) -> None:
        found = await self._manager.verify_adapter_compatibility(str(adapter), str(base))
        assert not any(reason.severity == "error" for reason in found.reasons), found.reasons

    def memory_mb(self) -> float:
        host = next(p for p in psutil.Process().children() if "peft_core.inference.worker" in p.cmdline())
        return float(host.memory_info().rss / 1e6)

    async def aclose(self) -> None:
        await self._manager.aclose()


class Plain:
    def __init__(self, base: Path) -> None:
        self._base = base
        self._process: Process | None = None
        self._lines: BufferedByteReceiveStream | None = None

    async def load(self, adapter: Path) -> None:
        await self._ask("load", path=str(adapter))

    async def switch(self, adapter: Path) -> None:
        await self._ask("switch", path=str(adapter))

    async def unload(self, adapter: Path) -> None:
        await self._ask("unload", path=str(adapter))

    async def write(self, tokens: int, *, one_thread: bool = False) -> str:
        return str(await self._ask("write", prompt=PROMPT, tokens=tokens, one_thread=one_thread))

    def memory_mb(self) -> float:
        assert self._process is not None
        return float(psutil.Process(self._process.pid).memory_info().rss / 1e6)

    async def aclose(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.aclose()

    async def _ask(self, verb: str, **arguments: Any) -> Any:
        process = self._process or await self._start()
        assert process.stdin is not None
        assert self._lines is not None
        await process.stdin.send(json.dumps([verb, arguments]).encode() + b"\n")
        return json.loads(await self._lines.receive_until(b"\n", 1 << 20))

    async def _start(self) -> Process:
        self._process = await anyio.open_process(
            [sys.executable, "-W", "ignore", "-c", PLAIN, str(self._base)],
            stderr=None,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert self._process.stdout is not None
        self._lines = BufferedByteReceiveStream(self._process.stdout)
        return self._process


Contender = Ours | Plain


async def measure(work: Path, base: Path, repeats: int, cycles: int) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))
    bundled = resolve(BUNDLED, Settings()).path
    links = (link_to(bundled, work / f"link-{number}.gguf") for number in itertools.count())
    first, second = adapters_in(work)
    for repeat in range(repeats):
        ours, plain = Ours(work / "data", next(links)), Plain(base)
        contenders: list[tuple[str, Contender]] = [(OURS, ours), (PEER, plain)]
        contenders = contenders[:: -1 if repeat % 2 else 1]
        try:
            await verify(ours, first, links, results)
            await load_and_switch(contenders, first, second, results)
            await write(ours, plain, results)
            await unload_and_cycle(contenders, first, second, results, cycles)
        finally:
            await ours.aclose()
            await plain.aclose()
        for name, _ in contenders:
            last = {what: round(by_name[name][-1], 2) for what, by_name in results.items() if by_name[name]}
            print(f"# {name}: {last}", file=sys.stderr, flush=True)
    return results


def link_to(file: Path, link: Path) -> Path:
    link.symlink_to(file)
    return link


async def verify(ours: Ours, adapter: Path, links: Iterator[Path], results: Results) -> None:
    """A base under a name that was never asked for is read anew: no cache knows it."""
    if not results["verify, first call"]:  # imports, too
        results["verify, first call"][OURS].append(1e3 * await seconds(ours.verify(adapter, next(links))))
    for _ in range(VERIFICATIONS):
        link = next(links)
        for what in ("verify, no cache hit", "verify, warm"):
            results[what][OURS].append(1e3 * await seconds(ours.verify(adapter, link)))


async def load_and_switch(contenders: list[tuple[str, Contender]], first: Path, second: Path, results: Results) -> None:
    for name, one in contenders:
        results["load, cold"][name].append(await seconds(one.load(first)))
    for name, one in contenders:
        results["load, warm"][name].append(await seconds(one.load(second)))
    for _ in range(SWITCHES // 2):
        for adapter in (first, second):
            for name, one in contenders:
                results["switch"][name].append(1e3 * await seconds(one.switch(adapter)))


async def write(ours: Ours, plain: Plain, results: Results) -> None:
    """All three in turn, with the same adapter; greedy, so that they must agree on the text."""
    await ours.write(WARM_UP)
    await plain.write(WARM_UP)
    for _ in range(TEXTS):
        began = time.perf_counter()
        text = await ours.write(TOKENS)
        rate = TOKENS / (time.perf_counter() - began)
        for what, one_thread in (("write", False), ("write, peer: 1 thread", True)):
            began = time.perf_counter()
            other = await plain.write(TOKENS, one_thread=one_thread)
            results[what][PEER].append(TOKENS / (time.perf_counter() - began))
            results[what][OURS].append(rate)
            assert other == text, f"they write differently: {text!r} and {other!r}"


async def unload_and_cycle(
    contenders: list[tuple[str, Contender]],
    first: Path,
    second: Path,
    results: Results,
    cycles: int,
) -> None:
    for name, one in contenders:
        results["memory, base + 2"][name].append(one.memory_mb())
        results["unload one of two"][name].append(1e3 * await seconds(one.unload(first)))
        results["memory, base + 1"][name].append(one.memory_mb())
        # The other one in, back, forth, the first one out; and with the two exchanged.
        there, other, memory_mb = second, first, []
        for _ in range(cycles):
            began = time.perf_counter()
            await one.load(other)
            await one.switch(there)
            await one.switch(other)
            await one.unload(there)
            results["cycle"][name].append(1e3 * (time.perf_counter() - began))
            memory_mb.append(one.memory_mb())
            there, other = other, there
        results["memory, settled"][name].append(memory_mb[SETTLED - 1])
        results["memory, last cycle"][name].append(memory_mb[-1])
        results["growth"][name].append(memory_mb[-1] - memory_mb[SETTLED - 1])
        results["unload the last"][name].append(1e3 * await seconds(one.unload(there)))
        results["memory, nothing"][name].append(one.memory_mb())


async def seconds(action: Awaitable[None]) -> float:
    began = time.perf_counter()
    await action
    return time.perf_counter() - began


def report(results: Results, options: argparse.Namespace) -> int:
    print(f"\n{options.repeats} rounds, medians (min-max); settled: after {SETTLED} of {options.cycles} cycles\n")
    print(f"{'':<22} {'':<8} {OURS:>26} {PEER:>26} {'ratio (>1: ours is better)':>28} {'bar':>6}")
    missed = []
    for row in ROWS:
        ours, peer = results[row.what][OURS], results[row.what][PEER]
        better = ratios(row, ours, peer) if row.ratio else []
        cells = f"{spread(ours):>26} {spread(peer):>26} {spread(better):>28}"
        print(f"{row.what:<22} {row.unit:<8} {cells} {'' if row.bar is None else f'< {row.bar:g}':>6}")
        if row.bar is not None and median(ours) >= row.bar:
            missed.append(row.what)
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
    return int(bool(missed))


def ratios(row: Row, ours: list[float], peer: list[float]) -> list[float]:
    return [a / b if row.unit == "tokens/s" else b / a for a, b in zip(ours, peer, strict=False)]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    digits = 0 if median(values) >= 100 else 1 if median(values) >= 10 else 2
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


if __name__ == "__main__":
    sys.exit(main())
