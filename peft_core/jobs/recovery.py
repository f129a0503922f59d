"""Tell the truth about jobs whose runner is gone."""

from __future__ import annotations

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.events import Event, JobCancelled, JobCompleted, JobInterrupted
from peft_core.jobs.store import Store
from peft_core.spec import Status


def recover(store: Store, registry: Registry) -> None:
    """Give every job that says "in progress" the end that it had. Only for a holder of the work lock: it works alone."""
    for job in store.in_state(Status.IN_PROGRESS):
        published = registry.published(job.project_id, job.job_id)
        manifest = read_manifest(published) if published else None
        event: Event
        if published and manifest:
            registry.publish(published, job.project_id, job.job_id)
            event = JobCompleted(adapter_path=str(published), metrics=manifest.metrics)
        elif store.cancel_requested(job.job_id):
            event = JobCancelled()
        else:
            event = JobInterrupted(reason="The process that ran this job is gone (killed, or the machine went down).")
        store.append(job.job_id, event)
