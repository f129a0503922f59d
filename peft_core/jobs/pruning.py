"""Old runs go, by a rule that the user sets (`keep_runs`): their working files, log and history. Adapters never do."""

from __future__ import annotations

import shutil

from peft_core.adapters.registry import Registry
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.system.cleanup import prune_inspections, remove_older

LEFT_BEHIND_S = 86_400.0  # what nobody knows of and nobody touched for so long was left by a process that was killed


def prune(store: Store, registry: Registry, paths: DataPaths, *, keep: int) -> None:
    """Remove all but the newest `keep` runs that have ended. Only for a holder of the work lock.

    Of a run whose adapter is still there the record stays, for it knows where the base lies; it goes with its adapter. Killed
    at any point, the next time finishes it.
    """
    for job in store.ended_beyond(keep):
        files = paths.job(job.job_id).root
        if registry.published(job.project_id, job.job_id) is None:
            if store.delete_ended(job.job_id):  # unless it was resumed a moment ago
                shutil.rmtree(files, ignore_errors=True)
        elif job.has_history:
            shutil.rmtree(files, ignore_errors=True)
            store.forget_events(job.job_id)
    known = store.job_ids()
    # Of jobs that were never queued or are forgotten, and the drafts of moves that were never made.
    jobs = (path for path in paths.root.glob("jobs/*") if path.name not in known)
    drafts = paths.root.glob(".peft.db.*")
    moves = (
        path
        for place in paths.projects.glob("*/lora")
        for name in (".current.*", ".deleted.*")
        for path in place.glob(name)
    )
    remove_older((*jobs, *drafts, *moves), LEFT_BEHIND_S)
    prune_inspections(paths)
