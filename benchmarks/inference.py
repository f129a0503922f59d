"""Compare using adapters through our `PEFTManager` and its inference worker with plain PEFT in a process of its own.

Both have the bundled base in float32 from the same files, the same two adapters (rank 16, all linear layers) and the same
prompt. Both processes run at the same time and take turns, so that other work on the machine disturbs both. Times are
measured by the caller, from request to response: a cold load includes the start of Python, its imports, tokenizer, base and
adapter. Our load also verifies the file and computes a text to prove the effect; plain PEFT does neither, and reads its
memory-mapped base only when it first generates. Memory is the process's resident memory (VmRSS), including mapped pages of
the base; with base + 2 adapters it is measured after generating.

The targets, for ours alone: load < 10 s cold, < 1 s warm; switch < 100 ms; verify < 50 ms; less than 8 MB of growth from
cycle 10 to the last. The exit code is 1 if one is missed.

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
PROMPT = '"""Files of a project."""\n\nimport os\nfrom pathlib import Path\n\n\ndef source_files(root: Path) -> list[Path]:\n'
TOKENS = 64
WARM_UP = 8  # tokens, not timed
RANK = 16
SWITCHES = 20  # per round, alternating between the two adapters
VERIFICATIONS = 5  # per round, each first uncached and then cached
TEXTS = 2  # per round
SETTLED = 10  # cycles after which memory should no longer grow
OURS, PEER = "peft-mcp", "plain PEFT"

Results = dict[str, dict[str, list[float]]]  # by row and contender


@dataclass(frozen=True)
class Row:
    what: str
    unit: Literal["s", "ms", "MB", "tokens/s"]
    target: float | None = None  # ours must stay below
    ratio: bool = True


ROWS = (
    Row("load, cold", "s", target=10),
    Row("load, warm", "s", target=1),
    Row("switch", "ms", target=100),
    Row("verify, first call", "ms"),
    Row("verify, not cached", "ms", target=50),
    Row("verify, cached", "ms", target=50),
    Row("unload one of two", "ms"),
    Row("unload the last", "ms"),
    Row("memory, base + 2", "MB"),
    Row("memory, base + 1", "MB"),
    Row("memory, empty", "MB"),
    Row("generate", "tokens/s"),
    Row("generate, peer: 1 thread", "tokens/s"),
    Row("cycle", "ms"),
    Row("memory, settled", "MB"),
    Row("memory, last cycle", "MB"),
    Row("growth", "MB", target=8, ratio=False),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cycles", type=int, default=100, help=f"cycles of load, switch, unload; more than {SETTLED}")
    parser.add_argument("--base-cache", type=Path, help="directory that retains the converted base")
    options = parser.parse_args()
    if options.repeats < 1 or options.cycles <= SETTLED:
        parser.error(f"--repeats must be at least 1, and --cycles more than {SETTLED}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # In another process, because this one plays the server's part and must not import torch.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            base = pool.submit(prepare, work, options.base_cache and options.base_cache.absolute()).result()
        results = anyio.run(measure, work, base, options.repeats, options.cycles)
    return report(results, options)


def prepare(work: Path, base_cache: Path | None) -> Path:
    """Convert the base and write adapters for it into `work`; return the converted base's directory."""
    # Imported here, because only the process that prepares needs torch.
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    from peft_core.modeling.convert import ensure_hf_directory  # noqa: PLC0415

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT uses the old name

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
    """Our manager. It is given the base by a new link each time, so that no cache knows it."""

    def __init__(self, data_dir: Path, base: Path) -> None:
        self._manager = PEFTManager(Settings(data_dir=data_dir, engine="torch", log_level="WARNING"))
        self._base = str(base)

    async def load(self, adapter: Path) -> None:
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert loaded.status == "loaded", loaded.reason

    async def switch(self, adapter: Path) -> None:
        loaded = await self._manager.load_adapter(str(adapter), self._base, accept_unproven_base=True)
        assert loaded.how == "switched"

    async def unload(self, adapter: Path) -> None:
        await self._manager.unload_adapter(str(adapter))

    async def generate(self, tokens: int, *, one_thread: bool = False) -> str:
        assert not one_thread  # it chooses the number of threads itself
        generated = await self._manager.generate({"prompt": PROMPT, "max_new_tokens": tokens})
        assert generated.completion_tokens == tokens, "the answer ended early: choose another prompt"
        return generated.text

    async def verify(self, adapter: Path, base: Path) -> None:
        checked = await self._manager.verify_adapter_compatibility(str(adapter), str(base))
        assert not any(reason.severity == "error" for reason in checked.reasons), checked.reasons

    def memory_mb(self) -> float:
        worker = next(p for p in psutil.Process().children() if "peft_core.inference.worker" in p.cmdline())
        return float(worker.memory_info().rss / 1e6)

    async def aclose(self) -> None:
        await self._manager.aclose()


class Plain:
    def __init__(self, base: Path) -> None:
        self._base = base
        self._process: Process | None = None
        self._lines: BufferedByteReceiveStream | None = None

    async def load(self, adapter: Path) -> None:
        await self._request("load", path=str(adapter))

    async def switch(self, adapter: Path) -> None:
        await self._request("switch", path=str(adapter))

    async def unload(self, adapter: Path) -> None:
        await self._request("unload", path=str(adapter))

    async def generate(self, tokens: int, *, one_thread: bool = False) -> str:
        return str(await self._request("generate", prompt=PROMPT, tokens=tokens, one_thread=one_thread))

    def memory_mb(self) -> float:
        assert self._process is not None
        return float(psutil.Process(self._process.pid).memory_info().rss / 1e6)

    async def aclose(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.aclose()

    async def _request(self, verb: str, **arguments: Any) -> Any:
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
            await generate(ours, plain, results)
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
    """Time verifications. A base under a new name is in no cache."""
    if not results["verify, first call"]:  # includes imports
        results["verify, first call"][OURS].append(1e3 * await seconds(ours.verify(adapter, next(links))))
    for _ in range(VERIFICATIONS):
        link = next(links)
        for what in ("verify, not cached", "verify, cached"):
            results[what][OURS].append(1e3 * await seconds(ours.verify(adapter, link)))


async def load_and_switch(contenders: list[tuple[str, Contender]], first: Path, second: Path, results: Results) -> None:
    for name, contender in contenders:
        results["load, cold"][name].append(await seconds(contender.load(first)))
    for name, contender in contenders:
        results["load, warm"][name].append(await seconds(contender.load(second)))
    for _ in range(SWITCHES // 2):
        for adapter in (first, second):
            for name, contender in contenders:
                results["switch"][name].append(1e3 * await seconds(contender.switch(adapter)))


async def generate(ours: Ours, plain: Plain, results: Results) -> None:
    """Time all three in turn with the same adapter. Decoding is greedy, so they must agree on the text."""
    await ours.generate(WARM_UP)
    await plain.generate(WARM_UP)
    for _ in range(TEXTS):
        began = time.perf_counter()
        text = await ours.generate(TOKENS)
        rate = TOKENS / (time.perf_counter() - began)
        for what, one_thread in (("generate", False), ("generate, peer: 1 thread", True)):
            began = time.perf_counter()
            other = await plain.generate(TOKENS, one_thread=one_thread)
            results[what][PEER].append(TOKENS / (time.perf_counter() - began))
            results[what][OURS].append(rate)
            assert other == text, f"the texts differ: {text!r} and {other!r}"


async def unload_and_cycle(
    contenders: list[tuple[str, Contender]], first: Path, second: Path, results: Results, cycles: int
) -> None:
    for name, contender in contenders:
        results["memory, base + 2"][name].append(contender.memory_mb())
        results["unload one of two"][name].append(1e3 * await seconds(contender.unload(first)))
        results["memory, base + 1"][name].append(contender.memory_mb())
        # Load the other adapter, switch back and forth, unload the first one; then exchange the two.
        resident, other, memory_mb = second, first, []
        for _ in range(cycles):
            began = time.perf_counter()
            await contender.load(other)
            await contender.switch(resident)
            await contender.switch(other)
            await contender.unload(resident)
            results["cycle"][name].append(1e3 * (time.perf_counter() - began))
            memory_mb.append(contender.memory_mb())
            resident, other = other, resident
        results["memory, settled"][name].append(memory_mb[SETTLED - 1])
        results["memory, last cycle"][name].append(memory_mb[-1])
        results["growth"][name].append(memory_mb[-1] - memory_mb[SETTLED - 1])
        results["unload the last"][name].append(1e3 * await seconds(contender.unload(resident)))
        results["memory, empty"][name].append(contender.memory_mb())


async def seconds(action: Awaitable[None]) -> float:
    began = time.perf_counter()
    await action
    return time.perf_counter() - began


def report(results: Results, options: argparse.Namespace) -> int:
    print(f"\n{options.repeats} rounds, medians (min-max); settled: after {SETTLED} of {options.cycles} cycles\n")
    print(f"{'':<22} {'':<8} {OURS:>26} {PEER:>26} {'ratio (>1: ours is better)':>28} {'target':>6}")
    missed = []
    for row in ROWS:
        ours, peer = results[row.what][OURS], results[row.what][PEER]
        better = ratios(row, ours, peer) if row.ratio else []
        cells = f"{spread(ours):>26} {spread(peer):>26} {spread(better):>28}"
        print(f"{row.what:<22} {row.unit:<8} {cells} {'' if row.target is None else f'< {row.target:g}':>6}")
        if row.target is not None and median(ours) >= row.target:
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
