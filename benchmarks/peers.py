"""The trainers that we compare with, each used as its documentation shows.

`python peers.py TASK_FILE` prints its figures as one line of JSON. It imports no module of peft-mcp, so that it runs in any
environment that has the peer.
"""

# ruff: noqa: PLC0415 -- each peer imports only what it needs, because its memory is measured

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Figures = dict[str, float]
GEMM_TOKENS = 512
GEMM_S = 4.0  # CPU-seconds for each number format


@dataclass(frozen=True)
class PeerTask:
    peer: str  # a key of PEERS
    base: str  # model directory
    examples: str  # JSON file: "train" and "held_out", each a list of {"input_ids", "labels"}
    output: str  # directory
    linears: list[tuple[int, int, int]]  # matrices of the base for GEMM: count, inputs, outputs
    steps: int | None  # measured steps, after one warm-up step; None: the whole epoch, and its held-out loss
    batch_size: int
    learning_rate: float
    rank: int
    alpha: float
    seed: int = 42  # for the order of the examples


def main() -> None:
    task = PeerTask(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(json.dumps(PEERS[task.peer](task) | {"peak_gb": peak_bytes() / 1e9}))


def trainer(task: PeerTask, **arguments: Any) -> Figures:
    """Run `transformers.Trainer` with PEFT."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32), lora(task))
    tokenizer = AutoTokenizer.from_pretrained(task.base)
    run = measuring(Trainer, task)(
        model=model,
        args=TrainingArguments(**common(task), **arguments),
        train_dataset=read_examples(task)["train"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads to the longest; labels with -100
        processing_class=tokenizer,
    )
    run.train()
    figures: Figures = run.figures()
    if task.steps is None:
        figures["held_out_loss"] = held_out_loss(run.model, read_examples(task)["held_out"])
    return figures


def sft(task: PeerTask, **arguments: Any) -> Figures:
    """Run TRL's `SFTTrainer`. Its defaults include gradient checkpointing, and bf16 where torch has a kernel for it."""
    from datasets import Dataset  # type: ignore[import-not-found]  # in an environment of its own
    from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]  # the same

    ids = [{"input_ids": example["input_ids"]} for example in read_examples(task)["train"]]
    run = measuring(SFTTrainer, task)(
        model=task.base,
        args=SFTConfig(**common(task), **arguments),
        train_dataset=Dataset.from_list(ids),
        peft_config=lora(task),
    )
    run.train()
    figures: Figures = run.figures()
    return figures


def gemm(task: PeerTask) -> Figures:
    """Measure flops per CPU-second of the base's matrix products on 512 tokens: forward, and gradient of the input."""
    import torch

    figures = {}
    for dtype in (torch.float32, torch.bfloat16):
        work = []
        for count, inputs, outputs in task.linears:
            x, weight = torch.randn(GEMM_TOKENS, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
            work.append((count, x, weight, torch.randn(GEMM_TOKENS, outputs, dtype=dtype)))
        flops, began = -1.0, 0.0  # the first pass is the warm-up
        while flops < 0 or time.process_time() - began < GEMM_S:
            for count, x, weight, gradient in work:
                for _ in range(count):
                    torch.mm(x, weight.t())
                    torch.mm(gradient, weight)
            if flops < 0:
                flops, began = 0.0, time.process_time()
            else:
                flops += sum(4.0 * count * GEMM_TOKENS * weight.numel() for count, _, weight, _ in work)
        figures[f"{str(dtype).removeprefix('torch.')}_flops"] = flops / (time.process_time() - began)
    return figures


PEERS: dict[str, Callable[[PeerTask], Figures]] = {
    "Trainer": trainer,
    "Trainer, group_by_length": partial(trainer, train_sampling_strategy="group_by_length"),
    "Trainer, bf16": partial(trainer, bf16=True),
    "TRL": sft,
    "TRL, packing": partial(sft, packing=True, max_length=512),
    "GEMM": gemm,
}


def common(task: PeerTask) -> dict[str, Any]:
    """What is not left at its default."""
    length = {"num_train_epochs": 1} if task.steps is None else {"max_steps": 1 + task.steps}
    return {
        **length,
        "output_dir": task.output,
        "per_device_train_batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "save_strategy": "no",
        "seed": task.seed,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }


def lora(task: PeerTask) -> Any:
    from peft import LoraConfig

    alpha: Any = task.alpha  # PEFT's annotation says int, but floats work
    return LoraConfig(task_type="CAUSAL_LM", r=task.rank, lora_alpha=alpha, target_modules="all-linear")


def measuring(trainer_class: Any, task: PeerTask) -> Any:
    """Return the class, extended to count real tokens and to read the clocks at the end of each step."""
    from transformers import TrainerCallback

    class Measuring(trainer_class):  # type: ignore[misc]  # a class known at run time
        def __init__(self, **arguments: Any) -> None:
            self.real_tokens = 0
            self.marks: list[tuple[int, float, float]] = []  # tokens, CPU-seconds, seconds
            super().__init__(**arguments, callbacks=[Clock(self)])

        def _get_train_sampler(self, *arguments: Any) -> Any:
            sampler = super()._get_train_sampler(*arguments)
            if task.steps is None:
                return sampler
            lengths = [len(example["input_ids"]) for example in self.train_dataset]
            return spread(list(sampler), lengths, task.batch_size, task.steps)

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")  # absent when documents are packed without padding
            self.real_tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *arguments, **named)

        def figures(self) -> Figures:
            first, last = self.marks[1], self.marks[-1]  # the first step is warm-up
            return dict(
                zip(("tokens", "cpu_s", "wall_s"), (b - a for a, b in zip(first, last, strict=True)), strict=True)
            )

    class Clock(TrainerCallback):
        def __init__(self, run: Measuring) -> None:
            self.run = run

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.run.marks.append((0, time.process_time(), time.perf_counter()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.run.marks.append((self.run.real_tokens, time.process_time(), time.perf_counter()))

    return Measuring


def spread(order: Sequence[int], lengths: Sequence[int], batch_size: int, steps: int) -> list[int]:
    """Choose the largest batch of an epoch for warm-up, and `steps` representative ones, evenly from smallest to largest.

    The first few batches would not represent the epoch, because a sampler that groups by length starts with the longest. The
    largest batch is included for the epoch's peak memory. `lengths` are those of the data set, in tokens.
    """
    batches = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    batches.sort(key=lambda batch: sum(lengths[index] for index in batch))
    chosen = [-1, *(int((step + 0.5) * len(batches) / steps) for step in range(steps))]
    return [index for number in chosen for index in batches[number]]


def held_out_loss(model: Any, examples: list[dict[str, list[int]]]) -> float:
    """Return nats per target token over all examples."""
    import torch

    model.eval()
    total, targets = 0.0, 0
    with torch.no_grad():
        for example in examples:
            labels = torch.tensor([example["labels"]])
            count = int((labels[:, 1:] != -100).sum())
            total += count * model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss.item()
            targets += count
    return total / targets


def read_examples(task: PeerTask) -> dict[str, list[dict[str, list[int]]]]:
    examples: dict[str, list[dict[str, list[int]]]] = json.loads(Path(task.examples).read_text(encoding="utf-8"))
    return examples


def peak_bytes() -> int:
    """Return the peak memory of the process since it started."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: on Linux a child inherits its parent's value.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
