"""Deletion of old runs by the setting `keep_runs`: their working files, logs and events. Adapters are never deleted."""

from __future__ import annotations

import shutil

from peft_core.adapters.registry import Registry
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.system import in_use
from peft_core.system.cleanup import FREED, prune_inspections, remove_older

LEFT_BEHIND_S = 86_400.0  # unknown files that have not changed for this long were left behind by a killed process


def prune(store: Store, registry: Registry, paths: DataPaths, *, keep: int) -> None:
    """Delete all but the newest `keep` runs that have ended. Only the holder of the runner's lock may call it.

    While a run's adapter exists its record is kept, because it says where the base model is; it is deleted with the
    adapter. If the process is killed half-way, the next call finishes.
    """
    for job in store.ended_beyond(keep):
        files = paths.job(job.job_id).root
        if registry.published(job.project_id, job.job_id) is None:
            if store.delete_ended(job.job_id):  # False: it was resumed a moment ago
                shutil.rmtree(files, ignore_errors=True)
        elif job.has_events:
            shutil.rmtree(files, ignore_errors=True)
            store.delete_events(job.job_id)
    known = store.job_ids()
    unknown_jobs = (
        path for path in paths.root.glob("jobs/*") if path.name not in known and path.suffix != in_use.SUFFIX
    )
    draft_databases = paths.root.glob(".peft.db.*")
    unfinished_moves = (
        path
        for directory in paths.projects.glob("*/lora")
        for name in (".current.*", ".deleted.*")
        for path in directory.glob(name)
    )
    freed = (*paths.base_models.glob(f"{FREED}*"), *paths.projects.glob(f"*/exports/*/{FREED}*"))
    remove_older((*unknown_jobs, *draft_databases, *unfinished_moves, *freed), LEFT_BEHIND_S)
    prune_inspections(paths)
