"""Valid objects for tests that are about something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_core.adapters.manifest import (
    CONFIG,
    WEIGHTS,
    BaseRecord,
    DataRecord,
    Manifest,
    RunRecord,
    sha256_of,
    write_manifest,
)
from peft_core.devices.tolerance import tolerance
from peft_core.jobs.state import Job
from peft_core.schemas.base_model import Base, Fingerprint, ModelShape
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.dataset import DatasetSpec, DatasetSummary, SourceSummary
from peft_core.schemas.device_check import DeviceCheck, DeviceKey, GradientDifference, Outcome
from peft_core.schemas.evaluation import (
    AdapterComparison,
    ComparedAdapter,
    ComparedCompletion,
    Comparison,
    Continuation,
    Difference,
    Evaluation,
    Keep,
    TrainedOn,
    Verdict,
)
from peft_core.schemas.results import Estimate, Metrics
from peft_core.schemas.task import JobRequest, TrainingTask
from peft_core.schemas.training import TrainingConfig

SMOLLM2_SHAPE = ModelShape(
    parameters=134_515_008,
    hidden_size=576,
    intermediate_size=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    vocab_size=49152,
    context_length=8192,
)


def make_base(**changes: Any) -> Base:
    return Base(
        **{
            "ref": "bundled",
            "name": "SmolLM2-135M-Instruct",
            "format": "gguf",
            "path": Path("/models/base.gguf"),
            "model_type": "llama",
            "shape": SMOLLM2_SHAPE,
            "size_bytes": 100_000_000,
            "has_chat_template": True,
            "fingerprint": Fingerprint(architecture="a" * 64, sample="b" * 64),
            **changes,
        }
    )


def make_source(**changes: Any) -> SourceSummary:
    return SourceSummary(
        **{
            "kind": "repository",
            "path": Path("/code/web"),
            "files": 12,
            "examples": None,
            "estimated_tokens": 20_000,
            "languages": {"python": 10, "markdown": 2},
            "left_out": {"binary": 1},
            **changes,
        }
    )


def make_dataset_spec(source: Path, **changes: Any) -> DatasetSpec:
    return DatasetSpec(
        **{
            "source": source,
            "source_kind": "repository",
            "max_length": 128,
            "held_out_fraction": 0.2,
            "seed": 0,
            **changes,
        }
    )


def make_request(**changes: Any) -> JobRequest:
    return JobRequest(
        **{
            "source": Path("/code/web"),
            "source_kind": "repository",
            "config": TrainingConfig(rank=16),
            "base": make_base(),
            "found": make_source(),
            "device": "cpu",
            "estimate": Estimate(
                train_tokens=18_000, steps=24, seconds=200.0, memory_bytes=1_500_000_000, basis="a guess"
            ),
            **changes,
        }
    )


def make_cluster_plan(**changes: Any) -> ClusterPlan:
    return ClusterPlan(
        **{"address": "ray://head:10001", "gpus": 1, "cpus": 2, "memory_bytes": 4_000_000_000, **changes}
    )


def change_request(task: TrainingTask, **changes: Any) -> TrainingTask:
    return task.model_copy(update={"request": task.request.model_copy(update=changes)})


def make_job(job_id: str = "20260101-000000-abcdef", project_id: str = "web", **changes: Any) -> Job:
    return Job(
        **{
            "job_id": job_id,
            "project_id": project_id,
            "request": make_request(),
            "created_at": 0.0,
            "updated_at": 0.0,
            **changes,
        }
    )


def make_device_check(**changes: Any) -> DeviceCheck:
    """Return a check of a GPU that agreed. `changes`: of the check or of its key."""
    key = {
        "machine": "0123456789ab",
        "system": "Linux",
        "device": "cuda",
        "device_name": "NVIDIA H100",
        "driver": "CUDA 12.8",
        "torch": "2.13.0",
        "number_format": "bfloat16",
        "way": "llama with heads of 64; documents packed; head in chunks",
    }
    of_key = {name: changes.pop(name) for name in list(changes) if name in key}
    rounding = GradientDifference(
        loss=1e-3, gradient=0.03, worst=0.08, worst_tensor="layers.3.mlp.up_proj, A", scale=2e-3
    )
    return DeviceCheck(
        **{
            "key": DeviceKey(**{**key, **of_key}),
            "outcome": Outcome.AGREES,
            "difference": rounding,
            "rounding": rounding,
            "tolerance": tolerance(rounding),
            "tokens": 256,
            "layers": 30,
            "total_layers": 30,
            "measured_bytes": 1_100_000_000,
            "expected_bytes": 1_000_000_000,
            "checked_at": "2026-01-02T03:04:05+00:00",
            **changes,
        }
    )


def make_evaluation(verdict: Verdict = Verdict.HELPS, **changes: Any) -> Evaluation:
    sign = 1 if verdict is Verdict.HARMS else -1
    continuation = Continuation(
        file="src/app.py",
        line=12,
        prompt="def add(a, b):",
        expected="    return a + b",
        base="    return a",
        adapter="    return a + b",
        base_similarity=0.6,
        adapter_similarity=1.0,
    )
    return Evaluation(
        **{
            "verdict": verdict,
            "reason": "the held-out loss moved",
            "loss": Comparison(
                base=2.2, adapter=2.2 + sign * 0.4, change=sign * 0.4, low=sign * 0.4 - 0.1, high=sign * 0.4 + 0.1
            ),
            "base_perplexity": 9.0,
            "adapter_perplexity": 6.0,
            "next_line": Comparison(base=0.1, adapter=0.15, change=0.05, low=0.01, high=0.09),
            "edit_similarity": Comparison(base=0.4, adapter=0.5, change=0.1),
            "general_loss": Comparison(base=1.0, adapter=1.05, change=0.05, low=0.01, high=0.08),
            "files": 6,
            "examples": 40,
            "tokens": 8000,
            "lines": 300,
            "prompts": 24,
            "general_tokens": 2000,
            "resampled": "files",
            "gains": (continuation,),
            **changes,
        }
    )


def make_comparison(**changes: Any) -> AdapterComparison:
    """Two adapters that help, B more than A."""
    completion = ComparedCompletion(
        file="src/app.py",
        line=12,
        prompt="def add(a, b):",
        expected="    return a + b",
        base="    return a",
        adapter_a="    return b",
        adapter_b="    return a + b",
        base_similarity=0.6,
        a_similarity=0.5,
        b_similarity=1.0,
    )
    names = {"adapter_a": "web/a-01", "adapter_b": "web/b-02"}
    losses = (
        Comparison(base=2.2, adapter=1.8, change=-0.4, low=-0.5, high=-0.3),
        Comparison(base=2.2, adapter=1.5, change=-0.7, low=-0.8, high=-0.6),
    )
    return AdapterComparison(
        **{
            "keep": Keep.ADAPTER_B,
            "reason": "Keep web/b-02: its held-out loss is lower",
            **{
                field: ComparedAdapter(
                    name=name,
                    adapter_path=f"/data/projects/web/lora/{name[4:]}",
                    evaluation=make_evaluation(seen_in_training=0.0, loss=loss).without_texts,
                )
                for (field, name), loss in zip(names.items(), losses, strict=True)
            },
            "loss": Difference(adapter_a=1.8, adapter_b=1.5, change=-0.3, low=-0.4, high=-0.2),
            "next_line": Difference(adapter_a=0.15, adapter_b=0.16, change=0.01, low=-0.02, high=0.04),
            "edit_similarity": Difference(adapter_a=0.5, adapter_b=0.6, change=0.1),
            "general_loss": Difference(adapter_a=1.05, adapter_b=1.06, change=0.01, low=-0.01, high=0.02),
            "left_out": TrainedOn(adapter_a=3, both=12),
            "shared_training": 0.8,
            "completions": (completion,),
            **changes,
        }
    )


def make_manifest(
    adapter_id: str,
    project_id: str = "web",
    *,
    base: Base | None = None,
    files: dict[str, str] | None = None,
    config: TrainingConfig | None = None,
    evaluation: Evaluation | None = None,
) -> Manifest:
    trained_on = base or make_base()
    return Manifest(
        adapter_id=adapter_id,
        project_id=project_id,
        created_at=f"2026-01-{adapter_id[-2:]}T00:00:00Z",
        base=BaseRecord.model_validate(trained_on.model_dump(include=set(BaseRecord.model_fields))),
        data=DataRecord(
            source_kind="repository",
            summary=DatasetSummary(
                train_examples=9, held_out_examples=1, train_tokens=900, held_out_tokens=100, files=5, left_out={}
            ),
            languages={"python": 10},
        ),
        run=RunRecord(
            config=config or TrainingConfig(rank=16),
            target_modules=("q_proj",),
            device="cpu",
            weights_dtype="float32",
            steps=3,
        ),
        metrics=Metrics(base_perplexity=9.0, adapter_perplexity=6.0),
        evaluation=evaluation,
        environment={"python": "3.11"},
        files=files or {},
    )


def record_base(directory: Path, base: Base, adapter_id: str = "adapter-01") -> Path:
    """Write a manifest for an adapter: trained on this base model, with the hashes of its current files."""
    files = {name: sha256_of(directory / name) for name in (CONFIG, WEIGHTS)}
    write_manifest(directory, make_manifest(adapter_id, base=base, files=files))
    return directory
