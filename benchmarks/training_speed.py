"""Our training loop against `transformers.Trainer` with PEFT: speed in real tokens a CPU-second, and peak memory.

Same base, same LoRA, same examples in the same order, same rates of AdamW; Trainer pads random batches to the longest, as
it does by default. Each run is a process of its own, pinned to `--threads`; the two alternate, so that what else runs on
the machine disturbs both. CPU-seconds are of the optimiser steps alone; the first step, which warms caches, is left out.
The last loss shows that both learn, no more: Trainer's warm-up begins at a rate of zero.

    python benchmarks/training_speed.py [--source DIRECTORY] [--steps 7] [--repeats 2] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import structlog

from peft_core.bases.resolve import resolve
from peft_core.config import Settings
from peft_core.spec import TrainingConfig

CONTENDERS = ("peft-mcp", "trainer")
CONFIG = TrainingConfig(lora_plus_ratio=1.0)  # plain LoRA: Trainer has no LoRA+


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_source = Path(sysconfig.get_paths()["purelib"]) / "anyio"
    parser.add_argument("--source", type=Path, default=default_source, help="repository to train on")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=CONFIG.batch_size)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=None, help="keeps the converted base and the dataset for the next time"
    )
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        prepare_once(options)
        results: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for repeat in range(options.repeats):
            for contender in CONTENDERS if repeat % 2 == 0 else CONTENDERS[::-1]:
                results[contender].append(in_a_process(contender, options))
                print(f"# {contender}: {results[contender][-1]}", file=sys.stderr, flush=True)
    report(results, options)


def prepare_once(options: argparse.Namespace) -> None:
    """The dataset and the base on disk, the same for both."""
    from peft_core.bases.convert import materialise  # noqa: PLC0415 -- torch: not in the parent's --help
    from peft_core.compute.tokenizer import load_tokenizer  # noqa: PLC0415 -- likewise
    from peft_core.data.prepare import prepare  # noqa: PLC0415 -- likewise

    directory = materialise(resolve(None, Settings()), options.work / "base_models", lambda _detail: None)
    (options.work / "base").unlink(missing_ok=True)
    (options.work / "base").symlink_to(directory)
    prepare(
        source=options.source,
        source_kind="repository",
        directory=options.work / "dataset",
        codec=load_tokenizer(directory),
        max_length=CONFIG.max_length,
        held_out_fraction=CONFIG.held_out_fraction,
        seed=CONFIG.seed,
        report=lambda _detail: None,
    )


def in_a_process(contender: str, options: argparse.Namespace) -> dict[str, float]:
    arguments = [
        *("--contender", contender),
        *("--steps", str(options.steps)),
        *("--batch-size", str(options.batch_size)),
        *("--threads", str(options.threads)),
        *("--work", str(options.work)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(options: argparse.Namespace) -> dict[str, float]:
    """In a child: train, and tell tokens a CPU-second, peak memory and the last loss."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    return ours(options) if options.contender == "peft-mcp" else trainer(options)


def ours(options: argparse.Namespace) -> dict[str, float]:
    import torch  # noqa: PLC0415 -- each contender loads what it needs: memory is measured
    from accelerate import Accelerator  # noqa: PLC0415 -- likewise

    from peft_core.compute.base import load_base  # noqa: PLC0415 -- likewise
    from peft_core.compute.process import keep_freed_memory  # noqa: PLC0415 -- likewise
    from peft_core.compute.stop import Stop  # noqa: PLC0415 -- likewise
    from peft_core.events import Event, StepCompleted  # noqa: PLC0415 -- likewise
    from peft_core.training import lora  # noqa: PLC0415 -- likewise
    from peft_core.training.batches import plan_order  # noqa: PLC0415 -- likewise
    from peft_core.training.checkpoint import Progress  # noqa: PLC0415 -- likewise
    from peft_core.training.fused import fuse  # noqa: PLC0415 -- likewise
    from peft_core.training.loop import Loop  # noqa: PLC0415 -- likewise
    from peft_core.training.objective import choose_objective  # noqa: PLC0415 -- likewise

    keep_freed_memory()
    torch.manual_seed(CONFIG.seed)
    clock = StepClock()
    config = CONFIG.model_copy(
        update={"batch_size": options.batch_size, "max_steps": options.steps, "eval_steps": options.steps + 1}
    )
    documents = read_documents(options.work)
    order = plan_order(
        examples=len(documents), batch_size=config.batch_size, num_epochs=None, max_steps=options.steps, seed=0
    )
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = load_base(options.work / "base", torch.float32)
    objective = choose_objective(model, config.max_length)
    adapted = lora.attach(model, config, "base")
    fuse(adapted)
    optimizer = lora.build_optimizer(adapted, config)
    losses: list[float] = []

    def emit(event: Event) -> None:
        if isinstance(event, StepCompleted):
            clock.tick()
            losses.append(event.loss)

    clock.begin()
    Loop(
        config=config,
        accelerator=accelerator,
        objective=objective,
        weights=lora.weights(adapted),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=accelerator.prepare_scheduler(lora.build_scheduler(optimizer, config, order.total_steps)),
        documents=documents,
        order=order,
        held_out=documents[:1],
        progress=Progress(base_loss=0.0),
        checkpoint_directory=options.work / "checkpoint",
        run_key="benchmark",
        emit=emit,
        stop=Stop(),
    ).run()
    return clock.result([sum(len(documents[i]) for i in order.step(n + 1)) for n in range(options.steps)], losses[-1])


def trainer(options: argparse.Namespace) -> dict[str, float]:
    """`transformers.Trainer` as its documentation shows it, on the very same batches, padded to the longest."""
    import torch  # noqa: PLC0415 -- each contender loads what it needs: memory is measured
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 -- likewise
    from transformers import (  # noqa: PLC0415 -- likewise
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from peft_core.training.batches import plan_order  # noqa: PLC0415 -- likewise

    torch.manual_seed(CONFIG.seed)
    clock = StepClock()
    documents = read_documents(options.work)
    order = plan_order(
        examples=len(documents), batch_size=options.batch_size, num_epochs=None, max_steps=options.steps, seed=0
    )
    shown = [documents[index] for step in range(options.steps) for index in order.step(step + 1)]
    examples = [{"input_ids": d.ids_T.tolist(), "labels": d.ids_T.tolist()} for d in shown]

    class InOrder(Trainer):  # type: ignore[misc]  # Trainer is Any where transformers has no annotations
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(examples)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            clock.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.tick()

    model = AutoModelForCausalLM.from_pretrained(options.work / "base", dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=CONFIG.rank, lora_alpha=CONFIG.lora_alpha, target_modules="all-linear")
    arguments = TrainingArguments(
        output_dir=str(options.work / "trainer"),
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=CONFIG.learning_rate,
        warmup_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    run = InOrder(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(options.work / "base")),
        callbacks=[Clock()],
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return clock.result([sum(len(documents[i]) for i in order.step(n + 1)) for n in range(options.steps)], losses[-1])


class StepClock:
    """CPU-seconds of this process at the end of each step."""

    def __init__(self) -> None:
        self._ticks: list[float] = []
        self._born = time.process_time()

    def begin(self) -> None:
        self._ticks = [time.process_time()]

    def tick(self) -> None:
        self._ticks.append(time.process_time())

    def result(self, tokens: Sequence[int], last_loss: float) -> dict[str, float]:
        from peft_core.compute.process import peak_memory_bytes  # noqa: PLC0415 -- psutil: after the run

        seconds = self._ticks[-1] - self._ticks[1]  # the first step warms up
        return {
            "tokens_per_cpu_s": round(sum(tokens[1:]) / seconds, 2),
            "peak_gb": round(peak_memory_bytes() / 1e9, 3),
            "setup_cpu_s": round(self._ticks[0] - self._born, 1),
            "last_loss": round(float(last_loss), 4),
        }


def read_documents(work: Path) -> list:  # type: ignore[type-arg]  # of Document, which would import torch here
    from peft_core.compute.tokenizer import load_tokenizer  # noqa: PLC0415 -- likewise
    from peft_core.data.read import read_examples  # noqa: PLC0415 -- children only
    from peft_core.training.batches import tokenise  # noqa: PLC0415 -- likewise

    tokenizer = load_tokenizer(work / "base")
    return [
        tokenise(example, tokenizer, CONFIG.max_length) for example in read_examples(work / "dataset" / "train.jsonl")
    ]


def report(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    print(f"\n{options.repeats} x {options.steps} steps of {options.batch_size} examples, {options.threads} thread(s)")
    print(f"{'':10} {'tokens / CPU-s':>22} {'peak memory':>12} {'last loss':>10}")
    for contender, runs in results.items():
        rates = [run["tokens_per_cpu_s"] for run in runs]
        peak, loss = max(run["peak_gb"] for run in runs), runs[-1]["last_loss"]
        print(
            f"{contender:10} {statistics.median(rates):8.1f} ({min(rates):.1f}-{max(rates):.1f}) {peak:9.2f} GB {loss:10.3f}"
        )
    ratios = [a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"] for a, b in zip(*results.values(), strict=True)]
    memory = max(r["peak_gb"] for r in results["trainer"]) / max(r["peak_gb"] for r in results["peft-mcp"])
    print(
        f"speed ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}), memory ratio {memory:.2f}"
    )


if __name__ == "__main__":
    main()
