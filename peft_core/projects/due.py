"""Look whether projects are due, and queue their trainings.

    python -m peft_core.projects.due SETTINGS_AS_JSON PROJECT...

It computes at low priority, and writes to standard error what it found.
"""

from __future__ import annotations

import os
import sys

import structlog

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.jobs.service import JobService
from peft_core.projects.service import ProjectService
from peft_core.staleness.service import StalenessService
from peft_core.system import logs
from peft_core.system.child_process import make_files_private

NICENESS = 10


def main(arguments: list[str]) -> int:
    """Check the projects that the command line names, and return the exit code."""
    make_files_private()
    os.nice(NICENESS)
    settings = Settings.model_validate_json(arguments[0])
    logs.configure(settings.log_level)
    log = structlog.get_logger(__name__)
    registry = Registry(settings.paths, settings.allowed_roots)
    jobs = JobService(settings, registry)
    service = ProjectService(settings, registry, jobs, StalenessService(settings, jobs.dataset_of).of)
    for project_id in arguments[1:]:
        try:
            (refreshed,) = service.refresh_due([project_id])
        except PeftMcpError as error:
            log.warning("not checked", project_id=project_id, error=str(error))
        else:
            log.info(refreshed.outcome, project_id=project_id, reason=refreshed.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
