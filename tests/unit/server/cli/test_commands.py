"""Commands with a real manager, on data directories that hold finished jobs and adapters: output and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.jobs.state import Job
from peft_core.jobs.status import not_started, status_of
from peft_core.jobs.store import Store
from peft_core.manager import PEFTManager
from peft_core.paths import DataPaths
from peft_core.projects.registrations import Registrations
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.events import JobCompleted, JobStarted
from peft_core.schemas.project import Refreshed, Registration, RetrainThreshold, RetrainWhen
from peft_core.schemas.results import ErrorInfo, Metrics, Status, TrainingStatus
from peft_core.schemas.training import EvaluatedAdapter, ProjectId, SweepRun, TrainingConfig
from peft_core.system.lock import FileLock
from server.cli import exit_codes
from server.cli.arguments import parse_arguments
from server.cli.follow import advice, follow_all
from server.cli.jobs import judge, project_of, training_config
from server.cli.run import run
from server.cli.terminal import Terminal
from server.status_text import summarise_refresh
from tests.factories import make_comparison, make_evaluation, make_job, make_request
from tests.unit.storage.conftest import publish

Cli = Callable[..., tuple[int, str, str]]
ERROR = ErrorInfo(code="x", message="It broke.", suggestions=("Fix it",))


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path / "data")


@pytest.fixture
def cli(paths: DataPaths, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command, and return (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(parse_arguments(arguments), Settings(data_dir=paths.root))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def insert(paths: DataPaths, *jobs: Job) -> None:
    paths.root.mkdir(exist_ok=True)
    store = Store(paths.database, lambda: 0.0)
    store.create()
    for job in jobs:
        store.insert(job)


def has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(has_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(has_null, value)))


# -- status ----------------------------------------------------------------------------------------------------------


def test_status_lists_the_newest_jobs_of_all_projects(cli: Cli, paths: DataPaths) -> None:
    insert(
        paths,
        make_job("20260101-000000-aaaaaa", "web", status=Status.FAILED, error=ERROR),
        make_job("20260102-000000-bbbbbb", "api", status=Status.CANCELLED, created_at=5.0),
    )
    code, out, _ = cli("status")
    assert code == exit_codes.DONE
    titles, newest, oldest = out.splitlines()
    assert titles.split() == ["PROJECT", "JOB", "KIND", "STATE", "QUEUED"]
    assert newest.startswith("api      20260102-000000-bbbbbb  training  cancelled")
    assert oldest.startswith("web      20260101-000000-aaaaaa  training  failed: It broke")


def test_status_of_an_empty_data_directory_is_no_error(cli: Cli) -> None:
    assert cli("status")[:2] == (exit_codes.DONE, "Nothing was trained here yet.\n")
    assert json.loads(cli("status", "--json")[1]) == {"jobs": []}


@pytest.mark.parametrize(("arguments", "expected"), [([], exit_codes.DONE), (["--wait"], exit_codes.NO_RESULT)])
def test_only_a_command_that_waits_fails_with_its_job(
    cli: Cli, paths: DataPaths, arguments: list[str], expected: int
) -> None:
    insert(paths, make_job(status=Status.FAILED, error=ERROR))
    code, out, err = cli("status", "web", *arguments)
    assert code == expected
    assert out == "web: failed: It broke.\n"
    assert "Train: peft-mcp train PATH --project web" in err


def test_json_is_one_object_without_nulls(cli: Cli, paths: DataPaths) -> None:
    insert(paths, make_job(status=Status.FAILED, error=ERROR))
    _, out, _ = cli("status", "web", "--json")
    data = json.loads(out)
    assert (data["project_id"], data["status"], data["error"]["code"]) == ("web", "failed", "x")
    assert not has_null(data)


def test_an_error_is_text_on_standard_error_and_json_on_standard_output(cli: Cli, paths: DataPaths) -> None:
    insert(paths, make_job(status=Status.FAILED, error=ERROR))
    code, out, err = cli("status", "nope", "--json")
    assert code == exit_codes.REFUSED
    assert json.loads(out)["error"]["code"] == "unknown_project"
    assert err.startswith("peft-mcp: There is no project 'nope'.")
    assert "`peft-mcp train`" in err
    assert cli("status", "nope")[1] == ""


def test_status_without_a_project_cannot_wait(cli: Cli) -> None:
    code, _, err = cli("status", "--wait")
    assert code == exit_codes.REFUSED
    assert "project is missing" in err


@pytest.mark.parametrize("command", ["cancel", "resume"])
def test_what_was_never_started_is_neither_cancelled_nor_resumed(cli: Cli, command: str) -> None:
    code, out, err = cli(command, "web")
    assert (code, out) == (exit_codes.REFUSED, "")
    assert "web" in err


@pytest.mark.parametrize("command", ["status", "cancel", "resume"])
def test_a_job_of_another_project_is_refused(cli: Cli, paths: DataPaths, command: str) -> None:
    insert(
        paths,
        make_job("20260101-000000-aaaaaa", "web", status=Status.CANCELLED),
        make_job(project_id="api", status=Status.CANCELLED),
    )
    code, _, err = cli(command, "api", "--job", "20260101-000000-aaaaaa")
    assert code == exit_codes.REFUSED
    assert "'web'" in err


# -- train and evaluate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "/no/such/place"], "training_data = '/no/such/place'"),
        (["train", ".", "--max-steps", "0"], "config.max_steps = 0"),
        (["train", ".", "--max-steps", "1", "--epochs", "1"], "exclude each other"),
        (["train", ".", "--config", "{"], "--config = '{'"),
        (["train", ".", "--config", "[1]"], "must be a JSON object"),
        (["train", ".", "--config", "[" * 100_000], "must be a JSON object"),
        (["train", "~no-such-user/code"], "home directory"),
        (["train", "x" * 5000], "training_data = 'xxx"),
        (["evaluate", "~no-such-user/adapter", "."], "No adapter at"),
        (["evaluate", "./" + "x" * 5000, "."], "No adapter at"),
        (["train", ".", "--config", '{"lr": 1}'], "learning_rate"),
        (["train", ".", "--project", "a b"], "project_id = 'a b'"),
        (["evaluate", "nope", "."], "No adapter at 'nope'"),
        (["compare", "nope", "web"], "No adapter at 'nope'"),
        (["evaluate", "web", ".", "--fail-unless", "helps", "--no-wait"], "omit --no-wait"),
        (["disk", "--free", "nope"], "free = 'nope'"),
    ],
)
def test_a_request_that_is_not_valid_ends_with_code_2_and_names_the_value(
    cli: Cli, arguments: list[str], named: str
) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (exit_codes.REFUSED, "")
    assert named in err


def test_options_win_over_the_json_of_config() -> None:
    options = parse_arguments(
        ["train", ".", "--config", '{"rank": 8, "max_steps": 2}', "--max-steps", "5", "--include", "*.py"]
    )
    assert training_config(options) == {"rank": 8, "max_steps": 5, "include": ["*.py"]}


@pytest.mark.parametrize(
    ("name", "project"),
    [("web", "web"), ("My Code (2)", "My-Code-2"), ("app.js", "app.js"), ("a..b", "a.b"), ("_x_", "x"), ("x" * 99, "x" * 64)],
)  # fmt: skip
def test_a_project_is_named_after_its_directory(tmp_path: Path, name: str, project: str) -> None:
    (tmp_path / name).mkdir()
    assert project_of(str(tmp_path / name)) == project
    assert project_of(f"{tmp_path / name}/") == project


def test_a_project_is_named_after_the_working_directory_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "web" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "web")
    assert project_of(".") == "web"
    assert project_of("src/..") == "web"
    assert project_of("chat.log.jsonl") == "chat"


def test_a_name_without_usable_letters_asks_for_a_project() -> None:
    with pytest.raises(InvalidArgument, match="--project ID"):
        project_of("/code/\N{CYRILLIC SMALL LETTER KA}")


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=80))
def test_every_derived_project_id_is_valid(name: str) -> None:
    try:
        project = project_of(f"/code/{name}")
    except InvalidArgument:
        return
    TypeAdapter(ProjectId).validate_python(project)


@pytest.mark.parametrize(
    ("verdict", "demanded", "code"),
    [
        (Verdict.HELPS, Verdict.HELPS, exit_codes.DONE),
        (Verdict.NO_DIFFERENCE, Verdict.HELPS, exit_codes.NO),
        (Verdict.HARMS, Verdict.HELPS, exit_codes.NO),
        (Verdict.HELPS, Verdict.NO_DIFFERENCE, exit_codes.DONE),
        (Verdict.NO_DIFFERENCE, Verdict.NO_DIFFERENCE, exit_codes.DONE),
        (Verdict.HARMS, Verdict.NO_DIFFERENCE, exit_codes.NO),
        (None, Verdict.HELPS, exit_codes.NO),
    ],
)
def test_fail_unless_judges_the_verdict(verdict: Verdict | None, demanded: Verdict, code: int) -> None:
    evaluation = None if verdict is None else make_evaluation(verdict)
    status = status_of(make_job(status=Status.COMPLETED, evaluation=evaluation), None, Path("/none"), now=0.0)
    with Path(os.devnull).open("w") as nowhere:
        assert judge(status, demanded, Terminal(nowhere, nowhere, as_json=False)) == code


@pytest.mark.parametrize(
    "evaluated",
    [
        None,
        EvaluatedAdapter(adapter_path=Path("/a")),
        EvaluatedAdapter(adapter_path=Path("/a"), compared_with=Path("/b b")),
    ],
)
@pytest.mark.parametrize("state", list(Status))
def test_every_state_suggests_commands_that_exist(state: Status, evaluated: EvaluatedAdapter | None) -> None:
    job = make_job(status=state, error=ERROR if state is Status.FAILED else None)
    if evaluated is not None:
        request = job.request.model_copy(update={"evaluated": evaluated})
        comparison = make_comparison() if evaluated.compared_with and state is Status.COMPLETED else None
        job = job.model_copy(update={"request": request, "comparison": comparison})
    status = not_started("web") if state is Status.NOT_STARTED else status_of(job, 1, Path("/none"), now=0.0)
    text = advice(status)
    commands = re.findall(r": peft-mcp (.*)", text)
    assert commands or state is Status.COMPLETED
    for command in commands:
        parse_arguments(shlex.split(command))  # exits with code 2 for one that does not exist
    assert not re.search(r"\b(train_adapter|get_training_status|cancel_training|resume_training)\b", text)


# -- list and disk ---------------------------------------------------------------------------------------------------


def test_list_shows_the_adapters_with_what_was_measured(cli: Cli, paths: DataPaths) -> None:
    for project, adapter in (("web", "a-01"), ("web", "a-02"), ("api", "a-03")):
        publish(paths, project, adapter)
    code, out, _ = cli("list")
    assert code == exit_codes.DONE
    titles, *rows = out.splitlines()
    assert titles.split() == [
        "PROJECT",
        "ADAPTER",
        "CURRENT",
        "VERDICT",
        "PERPLEXITY",
        "SIZE",
        "AGE",
        "CODE",
        "BASE",
        "MODEL",
    ]
    assert [row.split()[:3] for row in rows] == [["api", "a-03", "yes"], ["web", "a-02", "yes"], ["web", "a-01", "not"]]
    assert all("9.00 -> 6.00" in row and row.endswith("SmolLM2-135M-Instruct") for row in rows)
    assert [adapter["adapter_id"] for adapter in json.loads(cli("list", "web", "--json")[1])["adapters"]] == [
        "a-02",
        "a-01",
    ]


def test_without_an_adapter_list_says_how_to_train_one(cli: Cli) -> None:
    code, out, err = cli("list")
    assert (code, out) == (exit_codes.DONE, "There is no adapter yet.\n")
    assert "peft-mcp train PATH" in err


def test_disk_shows_what_would_be_lost_and_frees_only_what_is_named(cli: Cli, paths: DataPaths) -> None:
    first, second = publish(paths, "web", "a-01"), publish(paths, "api", "a-02")
    code, out, _ = cli("disk")
    assert code == exit_codes.DONE
    assert re.search(r"^adapters/web/a-01 .* kB .*If freed: ", out, re.MULTILINE)
    code, out, _ = cli("disk", "--free", "adapters/web/a-01", "--json")
    assert code == exit_codes.DONE
    assert [item["name"] for item in json.loads(out)["freed"]] == ["adapters/web/a-01"]
    assert not first.exists()
    assert second.exists()


def test_disk_ends_with_code_2_if_something_named_is_kept(cli: Cli, paths: DataPaths) -> None:
    insert(paths, make_job(status=Status.FAILED, error=ERROR))
    published = publish(paths, "web", "a-01")
    code, out, _ = cli("disk", "--free", "adapters/web/a-01", "--free", "database", "--json")
    assert code == exit_codes.REFUSED
    assert [item["name"] for item in json.loads(out)["kept"]] == ["database"]
    assert not published.exists()
    assert paths.database.exists()


async def test_the_runs_of_a_sweep_are_followed_to_the_best_one(paths: DataPaths) -> None:
    sweep = SweepRun(sweep_id="s", number=1, setting="rank")
    requests = [
        make_request(config=TrainingConfig(rank=rank), sweep=sweep.model_copy(update={"number": rank}))
        for rank in (1, 2, 3)
    ]
    insert(paths, *(make_job(f"run-{request.sweep.number}", request=request) for request in requests if request.sweep))
    store, losses, seen = Store(paths.database, lambda: 0.0), iter((3.0, 1.0, 2.0)), []

    class EndsWhatItShows(Terminal):
        @contextmanager
        def progress(self) -> Iterator[Callable[[TrainingStatus], None]]:
            def show(status: TrainingStatus) -> None:
                if not status.status.is_final:
                    job_id = str(status.job_id)
                    seen.append(job_id)
                    store.append(job_id, JobStarted())
                    store.append(job_id, JobCompleted(adapter_path=None, metrics=Metrics(adapter_loss=next(losses))))

            yield show

    async with PEFTManager(Settings(data_dir=paths.root)) as manager:
        with FileLock(paths.runner_lock) as lock:
            assert lock.acquire()  # no runner may start
            first = await manager.get_training_status("web", "run-1")
            followed = await follow_all(manager, first, EndsWhatItShows(io.StringIO(), io.StringIO(), as_json=False))
    assert seen == ["run-1", "run-2", "run-3"]
    assert followed.status.sweep is not None
    assert (followed.status.job_id, followed.status.sweep.is_complete) == ("run-2", True)
    assert followed.exit_code == exit_codes.DONE


# -- refresh -----------------------------------------------------------------------------------------------------------


def register(paths: DataPaths, project_id: str, source: Path | None, rule: RetrainWhen = "never") -> None:
    registration = Registration(
        project_id=project_id, source=None if source is None else str(source), retrain_when=rule
    )
    Registrations(paths).change(project_id, lambda _: registration)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def test_a_rule_is_set_for_the_projects_that_are_named(cli: Cli, paths: DataPaths, repository: Path) -> None:
    for project in ("api", "web"):
        register(paths, project, repository)
    code, out, _ = cli("refresh", "web", "--retrain-when", "units=15")
    assert code == exit_codes.DONE
    assert out.startswith("web: ")
    rules = {entry.project_id: entry.retrain_when for entry in Registrations(paths).all()}
    assert rules == {"api": "never", "web": RetrainThreshold(units=15)}
    assert cli("refresh", "--retrain-when", "never")[:2] == (
        exit_codes.DONE,
        "api: It is not retrained by itself from now on.\nweb: It is not retrained by itself from now on.\n",
    )


@pytest.mark.parametrize("rule", ["units=0", "units=101", "often", "10", "units=", "commits=-1", "percent=5"])
def test_a_rule_that_is_none_is_refused(cli: Cli, paths: DataPaths, repository: Path, rule: str) -> None:
    register(paths, "web", repository)
    code, _, err = cli("refresh", "web", "--retrain-when", rule)
    assert code == exit_codes.REFUSED
    assert "never, units=N" in err


def test_projects_that_cannot_be_checked_are_reported_with_exit_code_2(
    cli: Cli, paths: DataPaths, repository: Path, tmp_path: Path
) -> None:
    register(paths, "web", tmp_path / "gone", RetrainThreshold(units=10))
    register(paths, "never", repository)
    code, out, _ = cli("refresh", "--if-due", "--json")
    assert code == exit_codes.REFUSED
    (project,) = json.loads(out)["projects"]
    assert (project["project_id"], project["outcome"]) == ("web", "not_possible")
    assert "does not exist any more" in project["reason"]


def test_a_project_that_cannot_be_refreshed_does_not_keep_the_others_from_it(
    cli: Cli, paths: DataPaths, repository: Path, tmp_path: Path
) -> None:
    register(paths, "first", tmp_path / "gone")
    register(paths, "last", repository)
    code, out, _ = cli("refresh", "--retrain-when", "units=10")
    assert code == exit_codes.REFUSED
    assert re.match(r"first: source = .* does not exist any more.*\nlast: .*retrained by itself when 10 %", out)
    rules = {entry.project_id: entry.retrain_when for entry in Registrations(paths).all()}
    assert rules == {"first": "never", "last": RetrainThreshold(units=10)}
    assert [line.partition(":")[0] for line in cli("refresh")[1].splitlines()] == ["first", "last"]


def test_a_training_that_was_asked_for_is_not_said_to_wait_for_a_free_machine() -> None:
    job = status_of(make_job(), 1, Path("/none"), now=0.0)
    asked_for = Refreshed(project_id="web", outcome="queued", reason="started to catch up", job=job)
    by_itself = asked_for.model_copy(update={"job": job.model_copy(update={"only_while_free": True})})
    free = "It runs only while the machine is free."
    assert [free in summarise_refresh(refreshed) for refreshed in (asked_for, by_itself)] == [False, True]


def test_a_refresh_without_projects_says_so(cli: Cli) -> None:
    for arguments in ((), ("--if-due",)):
        code, out, _ = cli("refresh", *arguments)
        assert (code, out) == (exit_codes.DONE, "No project is registered for this.\n")
    code, _, err = cli("refresh", "web")
    assert code == exit_codes.REFUSED
    assert "peft-mcp train" in err


def test_the_hook_is_installed_once_and_removed_without_a_trace(cli: Cli, paths: DataPaths, repository: Path) -> None:
    register(paths, "web", repository)
    hook = repository / ".git" / "hooks" / "post-commit"
    code, out, err = cli("refresh", "web", "--install-hook", "--yes")
    assert (code, out) == (exit_codes.DONE, f"Changed: {hook}\n")
    assert "--retrain-when units=10" in err  # without a rule it has no effect
    assert "crontab" in err
    assert "launchd" in err
    assert os.access(hook, os.X_OK)
    assert cli("refresh", "--install-hook")[:2] == (exit_codes.DONE, "No hook was changed.\n")
    assert cli("refresh", "web", "--remove-hook", "--yes")[0] == exit_codes.DONE
    assert not hook.exists()


def test_a_hook_is_not_changed_without_an_answer(cli: Cli, paths: DataPaths, repository: Path) -> None:
    register(paths, "web", repository)
    code, out, err = cli("refresh", "web", "--install-hook")
    assert (code, out) == (exit_codes.REFUSED, "No hook was changed.\n")
    assert "give --yes" in err
    assert not (repository / ".git" / "hooks" / "post-commit").exists()


@pytest.mark.parametrize(
    ("answer", "agreed"), [("y\n", True), ("Yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_a_question_on_a_terminal_is_agreed_to_only_by_yes(
    monkeypatch: pytest.MonkeyPatch, answer: str, agreed: bool
) -> None:
    class Console(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Console(answer))
    err = Console()
    assert Terminal(io.StringIO(), err, as_json=False).confirm("Shall it?") is agreed
    assert err.getvalue() == "Shall it? [y/N] "


def test_projects_without_git_are_passed_over_unless_they_are_named(
    cli: Cli, paths: DataPaths, repository: Path, tmp_path: Path
) -> None:
    register(paths, "chats", None)
    register(paths, "plain", tmp_path)
    register(paths, "web", repository)
    code, out, err = cli("refresh", "--install-hook", "--yes")
    assert code == exit_codes.DONE
    assert out.count("post-commit") == 1
    assert "chats: " in err
    assert "plain: " in err
    for project in ("chats", "plain"):
        assert cli("refresh", project, "--install-hook", "--yes")[0] == exit_codes.REFUSED


def test_a_hook_that_cannot_be_written_does_not_keep_the_others_from_it(
    cli: Cli, paths: DataPaths, repository: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    subprocess.run(["git", "init", "-q", "--template=", str(odd)], check=True)
    (odd / ".git" / "hooks").write_text("not a directory")
    register(paths, "api", odd)
    register(paths, "web", repository)
    code, out, err = cli("refresh", "--install-hook", "--yes")
    assert code == exit_codes.REFUSED
    assert out == f"Changed: {repository}/.git/hooks/post-commit\n"
    assert re.search(r"api: The hook .*odd/\.git/hooks/post-commit cannot be written", err)
