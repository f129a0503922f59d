"""The check that servers start: in a process of its own, rarely, and only for projects that are retrained by themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.projects import check
from peft_core.projects.check import INTERVAL_S, DueCheck
from peft_core.projects.registrations import Registrations
from peft_core.schemas.project import Registration, RetrainThreshold, RetrainWhen


class Checks:
    """A check whose process writes down its arguments, at a time that the test sets."""

    def __init__(self, root: Path) -> None:
        self.settings = Settings(data_dir=root)
        self.now = 0.0
        self.check = DueCheck(self.settings, lambda: self.now)

    def register(self, project_id: str, rule: RetrainWhen) -> None:
        registration = Registration(project_id=project_id, source="/code", retrain_when=rule)
        Registrations(self.settings.paths).change(project_id, lambda _: registration)

    def run(self, project_id: str | None = None) -> list[str]:
        """Return the projects that the process was given; none if no process was started."""
        record = self.settings.data_dir / "checked"
        record.unlink(missing_ok=True)
        thread = self.check.start(project_id)
        if thread is not None:
            thread.join(60)
            assert not thread.is_alive()
        return record.read_text().split() if record.exists() else []


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checks:
    script = "import sys; open('checked', 'w').write(' '.join(sys.argv[2:]))"
    monkeypatch.setattr(check, "DUE", [sys.executable, "-c", script])
    return Checks(tmp_path)


def test_no_process_is_started_without_a_project_that_is_retrained_by_itself(checks: Checks) -> None:
    assert checks.run() == []
    checks.register("web", "never")
    checks.now += INTERVAL_S
    assert checks.run() == []
    checks.now += INTERVAL_S
    assert checks.run("unknown") == []


def test_all_projects_with_a_rule_are_checked_by_one_process(checks: Checks) -> None:
    for project_id, rule in (("web", RetrainThreshold(units=10)), ("api", RetrainThreshold(commits=5)), ("x", "never")):
        checks.register(project_id, rule)
    assert checks.run() == ["api", "web"]


def test_a_project_is_checked_at_most_once_in_some_minutes(checks: Checks) -> None:
    checks.register("web", RetrainThreshold(units=10))
    checks.register("api", RetrainThreshold(units=10))
    assert checks.run() == ["api", "web"]
    checks.now = INTERVAL_S - 1
    assert checks.run("web") == []  # the check of all has included it
    checks.now = INTERVAL_S
    assert checks.run("web") == ["web"]
    assert checks.run("api") == ["api"]
    assert checks.run("api") == []


def test_a_check_that_cannot_be_started_is_logged_only(
    checks: Checks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checks.register("web", RetrainThreshold(units=10))
    monkeypatch.setattr(check, "DUE", ["/no such program"])
    assert checks.run() == []
    assert "cannot check whether projects are due" in caplog.text


def test_a_damaged_registration_does_not_stop_the_check_of_the_others(checks: Checks) -> None:
    checks.register("web", RetrainThreshold(units=10))
    path = checks.settings.paths.registration("damaged")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert checks.run() == ["web"]
