"""Valid objects for tests that look at something else."""

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
from peft_core.jobs.model import Job, JobRequest
from peft_core.results import Estimate, Metrics
from peft_core.spec import Base, DatasetSummary, Fingerprint, ModelShape, SourceSummary, TrainingConfig

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


def make_job(job_id: str = "20260101-000000-abcdef", project_id: str = "web", **changes: Any) -> Job:
    request = JobRequest(
        source=Path("/code/web"),
        source_kind="repository",
        config=TrainingConfig(),
        base=make_base(),
        found=make_source(),
        device="cpu",
        estimate=Estimate(train_tokens=18_000, steps=24, seconds=200.0, memory_bytes=1_500_000_000, basis="a guess"),
    )
    return Job(
        **{
            "job_id": job_id,
            "project_id": project_id,
            "request": request,
            "created_at": 0.0,
            "updated_at": 0.0,
            **changes,
        }
    )


def make_manifest(
    adapter_id: str, project_id: str = "web", *, base: Base | None = None, files: dict[str, str] | None = None
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
            config=TrainingConfig(), target_modules=("q_proj",), device="cpu", weights_dtype="float32", steps=3
        ),
        metrics=Metrics(base_perplexity=9.0, adapter_perplexity=6.0),
        environment={"python": "3.11"},
        files=files or {},
    )


def record_base(directory: Path, base: Base, adapter_id: str = "adapter-01") -> Path:
    """Put a manifest beside an adapter: trained on this base, its files as they are now."""
    files = {name: sha256_of(directory / name) for name in (CONFIG, WEIGHTS)}
    write_manifest(directory, make_manifest(adapter_id, base=base, files=files))
    return directory
