"""Compare using adapters through our `PEFTManager`, in torch and in llama.cpp, with plain PEFT and plain llama.cpp.

All have the bundled base, the same two adapters (rank 16, all linear layers) and the same prompts: torch in float32,
llama.cpp in F16 with the adapters as LoRA files in F32. Each computes in a process of its own; all run at the same time and
take turns, so that other work on the machine disturbs all. Times are measured by the caller, from request to response: a
cold load includes the start of Python, its imports, tokenizer, base and adapter. Our loads also verify the file and compute
a text to prove the effect; the plain ones do neither, and plain PEFT reads its memory-mapped base only when it first
generates. Memory is the process's resident memory (VmRSS), including mapped pages of the base; with base + 2 adapters it is
measured after generating.

Generation is greedy, and all contenders must agree on the text. Before each measured prompt another one is read, so that no
cache helps. Rows in tokens per CPU-second count the CPU time of the process; "decode" is a request for 64 tokens minus one
for a single token, which leaves the reading of the prompt out.

The targets of our two engines: load < 10 s cold, < 1 s warm; switch < 100 ms; verify < 50 ms; less than 8 MB of growth from
cycle 10 to the last; llama.cpp decodes at least 5 times as many tokens per CPU-second as torch. The exit code is 1 if one
is missed.

    python benchmarks/inference.py [--repeats 3] [--cycles 100] [--base-cache DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import queue
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import anyio
from inference_contenders import Ours, PlainLlamaCpp, PlainPeft, Writer, cpu_s, memory_mb

from peft_core import Settings
from peft_core.base_models.resolve import resolve
from peft_core.schemas.base_model import BUNDLED

PROMPT = '"""Files of a project."""\n\nimport os\nfrom pathlib import Path\n\n\ndef source_files(root: Path) -> list[Path]:\n'
LONG_PROMPT = Path(queue.__file__).read_text(encoding="utf-8")[:2000]  # about 500 tokens
OTHER_PROMPT = "#"  # read in between: it begins with another token
TOKENS = 64
WARM_UP = 8  # tokens, not timed
RANK = 16
SWITCHES = 20  # per round, alternating between the two adapters
VERIFICATIONS = 5  # per round, each first uncached and then cached
TEXTS = 2  # per round
SETTLED = 10  # cycles after which memory should no longer grow
TORCH, LLAMA_CPP = "ours, torch", "ours, llama.cpp"
PLAIN_PEFT, PLAIN_LLAMA_CPP = "plain PEFT", "plain llama.cpp"
CONTENDERS = (TORCH, LLAMA_CPP, PLAIN_PEFT, PLAIN_LLAMA_CPP)
COMPARED = ((TORCH, PLAIN_PEFT), (LLAMA_CPP, TORCH), (LLAMA_CPP, PLAIN_PEFT), (LLAMA_CPP, PLAIN_LLAMA_CPP))
DECODE = "decode"
DECODE_TARGET = 5  # times as many tokens per CPU-second in our llama.cpp as in our torch

Results = dict[str, dict[str, list[float]]]  # by row and contender


@dataclass(frozen=True)
class Row:
    what: str
    unit: Literal["s", "ms", "MB", "tokens/s", "tokens/CPU-s"]
    target: float | None = None  # ours must stay below
    ratio: bool = True


ROWS = (
    Row("load, cold", "s", target=10),
    Row("load, warm", "s", target=1),
    Row("switch", "ms", target=100),
    Row("verify, first call", "ms", ratio=False),
    Row("verify, not cached", "ms", target=50, ratio=False),
    Row("verify, cached", "ms", target=50, ratio=False),
    Row("unload one of two", "ms"),
    Row("unload the last", "ms"),
    Row("memory, base + 2", "MB"),
    Row("memory, base + 1", "MB"),
    Row("memory, empty", "MB"),
    Row("generate", "tokens/s"),
    Row("generate, PEFT: 1 thread", "tokens/s"),
    Row("generate, short prompt", "tokens/CPU-s"),
    Row("generate, long prompt", "tokens/CPU-s"),
    Row(DECODE, "tokens/CPU-s"),
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
    """Convert the base for both engines and write adapters for it into `work`; return the directory for PEFT."""
    # Imported here, because only the process that prepares needs torch.
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    from peft_core.adapters.files import read_adapter  # noqa: PLC0415
    from peft_core.llamacpp.worker.base_file import base_in_f16  # noqa: PLC0415
    from peft_core.llamacpp.worker.gguf_lora import write_gguf_lora  # noqa: PLC0415
    from peft_core.llamacpp.worker.lora_pairs import read_lora  # noqa: PLC0415
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
        lora_file = read_lora(read_adapter(adapter, weights="keep"))
        write_gguf_lora(lora_file, base, adapter.with_suffix(".gguf"))
    (work / "base.gguf").symlink_to(
        base_in_f16(base, data / "base_models", lambda detail: print(f"# {detail}", file=sys.stderr))
    )
    return directory


def adapters_in(work: Path) -> tuple[Path, Path]:
    return work / "first", work / "second"


Resident = Ours | PlainPeft  # loads and unloads while it runs


async def measure(work: Path, base: Path, repeats: int, cycles: int) -> Results:
    results: Results = defaultdict(lambda: defaultdict(list))
    bundled = resolve(BUNDLED, Settings()).path
    links = (link_to(bundled, work / f"link-{number}.gguf") for number in itertools.count())
    first, second = adapters_in(work)
    for repeat in range(repeats):
        torch = Ours(work / "data" / "torch", next(links), "torch")
        in_llama_cpp = Ours(work / "data" / "llamacpp", next(links), "llamacpp")
        peft, llama_cpp = PlainPeft(base), PlainLlamaCpp()
        loaders: list[tuple[str, Resident]] = [
            (TORCH, torch),
            (LLAMA_CPP, in_llama_cpp),
            (PLAIN_PEFT, peft),
        ][:: -1 if repeat % 2 else 1]
        try:
            await verify(torch, first, links, results)
            await load_and_switch(loaders, first, second, results)
            loading = llama_cpp.load_all(work / "base.gguf", [first.with_suffix(".gguf"), second.with_suffix(".gguf")])
            results["load, cold"][PLAIN_LLAMA_CPP].append(await seconds(loading))
            await generate({**dict(loaders), PLAIN_LLAMA_CPP: llama_cpp}, peft, results)
            await unload_and_cycle(loaders, first, second, results, cycles)
        finally:
            for contender in (torch, in_llama_cpp, peft, llama_cpp):
                await contender.aclose()
        for name in CONTENDERS:
            last = {what: round(by_name[name][-1], 2) for what, by_name in results.items() if by_name[name]}
            print(f"# {name}: {last}", file=sys.stderr, flush=True)
    return results


def link_to(file: Path, link: Path) -> Path:
    link.symlink_to(file)
    return link


async def verify(ours: Ours, adapter: Path, links: Iterator[Path], results: Results) -> None:
    """Time verifications. A base under a new name is in no cache."""
    if not results["verify, first call"]:  # includes imports
        results["verify, first call"][TORCH].append(1e3 * await seconds(ours.verify(adapter, next(links))))
    for _ in range(VERIFICATIONS):
        link = next(links)
        for what in ("verify, not cached", "verify, cached"):
            results[what][TORCH].append(1e3 * await seconds(ours.verify(adapter, link)))


async def load_and_switch(contenders: list[tuple[str, Resident]], first: Path, second: Path, results: Results) -> None:
    for name, contender in contenders:
        results["load, cold"][name].append(await seconds(contender.load(first)))
    for name, contender in contenders:
        results["load, warm"][name].append(await seconds(contender.load(second)))
    for _ in range(SWITCHES // 2):
        for adapter in (first, second):
            for name, contender in contenders:
                results["switch"][name].append(1e3 * await seconds(contender.switch(adapter)))


async def generate(writers: Mapping[str, Writer], peft: PlainPeft, results: Results) -> None:
    """Time all in turn with the same adapter."""
    for writer in writers.values():
        await writer.generate(PROMPT, WARM_UP)
    for _ in range(TEXTS):
        texts: set[tuple[str, str]] = set()
        peft.one_thread = False
        rate = TOKENS / (await cost(peft, PROMPT, TOKENS)).wall_s
        results["generate"][PLAIN_PEFT].append(rate)
        peft.one_thread = True  # it does as many tokens per second on one, and more per CPU-second
        for name, writer in writers.items():
            one, short = await cost(writer, PROMPT, 1), await cost(writer, PROMPT, TOKENS)
            long = await cost(writer, LONG_PROMPT, TOKENS)
            texts.add((short.text, long.text))
            if writer is not peft:
                results["generate"][name].append(TOKENS / short.wall_s)
            results["generate, PEFT: 1 thread"][name].append(TOKENS / short.wall_s)
            results["generate, short prompt"][name].append(TOKENS / short.cpu_s)
            results["generate, long prompt"][name].append(TOKENS / long.cpu_s)
            results[DECODE][name].append((TOKENS - 1) / (short.cpu_s - one.cpu_s))
        assert len(texts) == 1, f"the texts differ: {texts}"


@dataclass(frozen=True)
class Cost:
    text: str
    wall_s: float
    cpu_s: float


async def cost(writer: Writer, prompt: str, tokens: int) -> Cost:
    """Generate after another prompt, so that this one is in no cache."""
    await writer.generate(OTHER_PROMPT, 1)
    cpu_before, began = cpu_s(writer), time.perf_counter()
    text = await writer.generate(prompt, tokens)
    return Cost(text, time.perf_counter() - began, cpu_s(writer) - cpu_before)


async def unload_and_cycle(
    contenders: list[tuple[str, Resident]], first: Path, second: Path, results: Results, cycles: int
) -> None:
    for name, contender in contenders:
        results["memory, base + 2"][name].append(memory_mb(contender))
        results["unload one of two"][name].append(1e3 * await seconds(contender.unload(first)))
        results["memory, base + 1"][name].append(memory_mb(contender))
        # Load the other adapter, switch back and forth, unload the first one; then exchange the two.
        resident, other, measured_mb = second, first, []
        for _ in range(cycles):
            began = time.perf_counter()
            await contender.load(other)
            await contender.switch(resident)
            await contender.switch(other)
            await contender.unload(resident)
            results["cycle"][name].append(1e3 * (time.perf_counter() - began))
            measured_mb.append(memory_mb(contender))
            resident, other = other, resident
        results["memory, settled"][name].append(measured_mb[SETTLED - 1])
        results["memory, last cycle"][name].append(measured_mb[-1])
        results["growth"][name].append(measured_mb[-1] - measured_mb[SETTLED - 1])
        results["unload the last"][name].append(1e3 * await seconds(contender.unload(resident)))
        results["memory, empty"][name].append(memory_mb(contender))


async def seconds(action: Awaitable[None]) -> float:
    began = time.perf_counter()
    await action
    return time.perf_counter() - began


def report(results: Results, options: argparse.Namespace) -> int:
    print(f"\n{options.repeats} rounds, medians (min-max); settled: after {SETTLED} of {options.cycles} cycles\n")
    print(f"{'':<25} {'':<12} " + " ".join(f"{name:>22}" for name in CONTENDERS) + f" {'target':>6}")
    missed = []
    for row in ROWS:
        cells = " ".join(f"{spread(results[row.what][name]):>22}" for name in CONTENDERS)
        print(f"{row.what:<25} {row.unit:<12} {cells} {'' if row.target is None else f'< {row.target:g}':>6}")
        for name in (TORCH, LLAMA_CPP):
            values = results[row.what][name]
            if row.target is not None and values and median(values) >= row.target:
                missed.append(f"{row.what} ({name})")
    print("\nratios within rounds; above 1: the one named first is better\n")
    print(f"{'':<25} " + " ".join(f"{f'{one} / {other}':>34}" for one, other in COMPARED))
    for row in ROWS:
        if row.ratio:
            by_name = results[row.what]
            cells = " ".join(f"{spread(ratios(row, by_name[one], by_name[other])):>34}" for one, other in COMPARED)
            print(f"{row.what:<25} {cells}")
    decode = next(row for row in ROWS if row.what == DECODE)
    gain = median(ratios(decode, results[DECODE][LLAMA_CPP], results[DECODE][TORCH]))
    if gain < DECODE_TARGET:
        missed.append(f"{DECODE}: {LLAMA_CPP} is {gain:.1f} times {TORCH}, not {DECODE_TARGET}")
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return int(bool(missed))


def ratios(row: Row, ours: list[float], peer: list[float]) -> list[float]:
    return [a / b if row.unit.startswith("tokens") else b / a for a, b in zip(ours, peer, strict=False)]


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    digits = 0 if median(values) >= 100 else 1 if median(values) >= 10 else 2
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least}-{most})"


if __name__ == "__main__":
    sys.exit(main())
