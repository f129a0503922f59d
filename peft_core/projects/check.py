"""Have a process look whether projects are due: reading a repository would delay the server that is asked to."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable

from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.projects.registrations import Registrations
from peft_core.system.child_process import open_log, python_module

DUE = python_module("peft_core.projects.due")
INTERVAL_S = 300.0  # shortest time between two checks of a project by one server

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


class DueCheck:
    """Starts the process, at most once in a while for each project. Its methods return immediately."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._registrations = Registrations(settings.paths)
        self._clock = clock
        self._checked_at: dict[str | None, float] = {}

    def start(self, project_id: str | None = None) -> threading.Thread | None:
        """Check one project, or all of them, in the background. Problems are logged: nothing depends on the check.

        Return the thread that waits for the process; None if it is too early for another check.
        """
        now = self._clock()
        if now - max(self._checked_at.get(name, float("-inf")) for name in (project_id, None)) < INTERVAL_S:
            return None
        self._checked_at[project_id] = now
        thread = threading.Thread(target=self._check, args=(project_id,), name="due-check", daemon=True)
        thread.start()
        return thread

    def _check(self, project_id: str | None) -> None:
        try:
            one = None if project_id is None else self._registrations.read(project_id)
            found = self._registrations.all() if project_id is None else [one] if one is not None else []
            ruled = [registration.project_id for registration in found if registration.retrain_when != "never"]
            if ruled:
                self._run(ruled)
        except (PeftMcpError, OSError) as error:
            log.warning("cannot check whether projects are due: %s", error)

    def _run(self, project_ids: list[str]) -> None:
        with open_log(self._settings.paths.logs / "refresh.log") as output:
            process = subprocess.Popen(  # noqa: S603 -- a module of ours, with an absolute interpreter path
                [*DUE, self._settings.model_dump_json(), *project_ids],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._settings.paths.root,
                start_new_session=True,  # a job that it has begun to queue is queued completely
            )
        process.wait()
