"""What is said about the age of an adapter, after real edits in real git repositories."""

import subprocess
import threading
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from peft_core.config import Settings
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import Snapshot, read_snapshot
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.schemas.dataset import DatasetSpec, DataSource, SourceKind
from peft_core.schemas.staleness import Staleness
from peft_core.staleness.repository import staleness_of
from peft_core.staleness.service import StalenessService
from tests.factories import make_dataset_spec

FILES, FUNCTIONS = 10, 8


def function(name: str) -> str:
    return f"def {name}(value, other):\n    first = value * {len(name)} + other\n    return [first, other, '{name}']\n"


def repository(root: Path) -> Path:
    root.mkdir()
    for number in range(FILES):
        text = "\n\n".join(function(f"work_{number}_{n}") for n in range(FUNCTIONS))
        (root / f"module_{number}.py").write_text(text)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com"]
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


def commit(root: Path, message: str) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", message)


def committed(root: Path) -> Path:
    git(repository(root), "init", "-q")
    commit(root, "First")
    return root


def snapshot_of(root: Path, out: Path, **settings: object) -> Snapshot:
    prepare(
        make_dataset_spec(root, **settings), directory=out, token_counter=EstimatedTokenCounter(), report=lambda _: None
    )
    snapshot = read_snapshot(out)
    assert snapshot is not None
    return snapshot


def now(snapshot: Snapshot, root: Path, **selection: tuple[str, ...]) -> Staleness:
    return staleness_of(snapshot, [DataSource(path=root, kind=SourceKind.REPOSITORY)], **selection)


def edit(root: Path, file: int, old: str, new: str) -> None:
    path = root / f"module_{file}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_code_that_has_not_changed_is_up_to_date(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    assert now(snapshot, root) == Staleness(
        text="Up to date: none of its 10 files has changed since the training.",
        retrain=False,
        commits_behind=0,
        files=10,
        files_changed=0,
        files_new=0,
        files_deleted=0,
        units_changed_percent=0.0,
        source=str(root),
    )
    commit(root, "Without content")
    assert now(snapshot, root).commits_behind == 0


def test_commits_files_and_units_are_counted(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    edit(root, 1, "def work_1_3(value", "def renamed(value")
    commit(root, "Rename")
    (root / "added.py").write_text(function("added_one") + "\n\n" + function("added_two"))
    commit(root, "Add")
    (root / "module_9.py").unlink()
    commit(root, "Delete")
    found = now(snapshot, root)
    assert (found.files, found.files_changed, found.files_new, found.files_deleted) == (11, 1, 1, 1)
    assert found.commits_behind == 3
    assert found.units_changed_percent == round(100 * 3 / (9 * FUNCTIONS + 2), 1)
    assert found.text == (
        "3 commits behind: 3 of 11 files changed (1 new, 1 deleted), 4 % of the units. Retraining is worthwhile from about "
        "10 % of the units."
    )
    assert found.retrain is False


def test_many_changes_call_for_a_retraining(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    for file in range(4):
        edit(root, file, "value", "amount")
    found = now(snapshot, root)
    assert (found.commits_behind, found.files_changed, found.units_changed_percent) == (0, 4, 40.0)
    assert found.text == (
        "Not committed: 4 of 10 files changed, 40 % of the units. Retrain it with refresh_project: it has not seen enough of "
        "the code as it is now."
    )
    assert found.retrain is True


def test_what_is_moved_indented_or_formatted_differently_is_not_new(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    (root / "package").mkdir()
    (root / "module_0.py").rename(root / "package" / "renamed.py")
    edit(root, 1, "\n    ", "\n        ")
    edit(root, 2, function("work_2_0"), "")
    edit(root, 3, "def work_3_0", function("work_2_0") + "\n\ndef work_3_0")
    commit(root, "Tidy")
    found = now(snapshot, root)
    assert (found.files, found.files_changed, found.files_new, found.files_deleted) == (10, 3, 0, 0)
    assert found.units_changed_percent == 0.0
    assert found.text.startswith("1 commit behind: 3 of 10 files changed, none of the units.")


@pytest.mark.parametrize("rewrite", ["amend", "branch", "reset"])
def test_commits_of_a_history_that_was_rewritten_are_not_counted(tmp_path: Path, rewrite: str):
    root = committed(tmp_path / "r")
    edit(root, 0, "def work_0_0", "def work_x")
    commit(root, "Second")
    snapshot = snapshot_of(root, tmp_path / "out")
    if rewrite == "amend":
        edit(root, 0, "def work_x", "def work_y")
        git(root, "add", "-A")
        git(root, "commit", "-q", "--amend", "-m", "Second, better")
        git(root, "reflog", "expire", "--expire=now", "--all")
        git(root, "gc", "-q", "--prune=now")
    elif rewrite == "branch":
        git(root, "checkout", "-q", "-b", "other", "HEAD~1")
    else:
        git(root, "reset", "-q", "--hard", "HEAD~1")
    found = now(snapshot, root)
    assert found.commits_behind is None
    assert found.files_changed == 1
    assert found.text.startswith(
        "Since the training, 1 of 10 files changed, 1 % of the units. Its commit is not in the history of the current branch"
    )


def test_without_git_the_content_is_compared(tmp_path: Path):
    root = repository(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    edit(root, 5, "def work_5_1", "def work_5_one")
    found = now(snapshot, root)
    assert (found.commits_behind, found.files_changed, found.units_changed_percent) == (None, 1, 1.2)
    assert found.text.startswith("Since the training, 1 of 10 files changed, 1 % of the units. Retraining is")


def test_the_selection_of_the_training_holds(tmp_path: Path):
    root = committed(tmp_path / "r")
    (root / ".gitignore").write_text("ignored.py\n")
    snapshot = snapshot_of(root, tmp_path / "out", exclude=("module_9.py",))
    (root / "ignored.py").write_text(function("ignored"))
    edit(root, 9, "value", "amount")
    assert now(snapshot, root, exclude=("module_9.py",)).files_changed == 0
    assert now(snapshot, root, exclude=("module_9.py",)).files_new == 0
    assert now(snapshot, root).files_new == 1


def test_of_many_changed_files_a_sample_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    for file in range(FILES):
        edit(root, file, "value", "amount")
    monkeypatch.setattr("peft_core.staleness.compare._MAX_CUT_BYTES", 2_000)
    found = now(snapshot, root)
    assert found.units_changed_percent == 100.0
    assert "about 100 % of the units" in found.text
    assert found == now(snapshot, root)


def test_files_that_a_short_training_did_not_cut_count_like_the_others(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    uncut = {f"module_{number}.py" for number in range(5)}
    files = tuple(file.model_copy(update={"units": None} if file.path in uncut else {}) for file in snapshot.files)
    for file in (0, 9):  # one that was cut, and one that was not
        edit(root, file, "value", "amount")
    found = now(snapshot.model_copy(update={"files": files}), root)
    assert (found.files_changed, found.units_changed_percent) == (2, 20.0)
    assert "about 20 % of the units" in found.text


def cut_only(snapshot: Snapshot, *cut: int) -> Snapshot:
    """Return the snapshot of a short training, which cut these modules only."""
    names = {f"module_{number}.py" for number in cut}
    files = [file if file.path in names else file.model_copy(update={"units": None}) for file in snapshot.files]
    return snapshot.model_copy(update={"files": tuple(files)})


def test_changes_in_files_of_which_nothing_is_known_count(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = cut_only(snapshot_of(root, tmp_path / "out"), 0)
    for file in range(1, FILES):
        edit(root, file, f"def work_{file}_0(value", "def renamed(value")
    found = now(snapshot, root)
    assert (found.files_changed, found.units_changed_percent, found.retrain) == (9, 90.0, True)
    assert found.text == (
        "Not committed: 9 of 10 files changed, about 90 % of the units. Retrain it with refresh_project: it has not seen "
        "enough of the code as it is now."
    )


def test_one_file_with_other_white_space_is_no_evidence_that_the_others_have_not_changed(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = cut_only(snapshot_of(root, tmp_path / "out"), 0, 1)
    edit(root, 0, "\n    ", "\n        ")
    for file in range(2, FILES):
        edit(root, file, "value", "amount")
    found = now(snapshot, root)
    assert (found.files_changed, found.units_changed_percent) == (9, 40.0)
    assert "about 40 % of the units" in found.text


def test_of_a_snapshot_without_units_the_files_are_counted(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = cut_only(snapshot_of(root, tmp_path / "out"))
    edit(root, 0, "value", "amount")
    found = now(snapshot, root)
    assert (found.files_changed, found.units_changed_percent, found.retrain) == (1, None, False)
    assert found.text.startswith("Not committed: 1 of 10 files changed.")
    assert found.in_brief == "1 file changed"


def test_code_of_which_files_were_only_deleted_is_not_up_to_date(tmp_path: Path):
    root = committed(tmp_path / "r")
    snapshot = snapshot_of(root, tmp_path / "out")
    assert now(snapshot, root).in_brief == "up to date"
    for file in sorted(root.glob("*.py"))[:2]:
        file.unlink()
    found = now(snapshot, root)
    assert (found.files_deleted, found.units_changed_percent) == (2, 0.0)
    assert found.in_brief == "2 files changed"


def test_another_code_base_is_recognised(tmp_path: Path):
    snapshot = snapshot_of(committed(tmp_path / "r"), tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    for number in range(5):
        (other / f"view_{number}.py").write_text("\n\n".join(function(f"view_{number}_{n}") for n in range(4)))
    found = now(snapshot, other)
    assert found.retrain is False
    assert found.text.endswith(
        f"Hardly anything of what it was trained on is in {other}, which may be another code base."
    )


# The service, which finds the code of an adapter.


def service(tmp_path: Path, spec: DatasetSpec | None) -> StalenessService:
    return StalenessService(Settings(data_dir=tmp_path / "data"), {"known": spec}.get)


def adapter(tmp_path: Path, name: str = "known") -> Path:
    directory = tmp_path / "data" / "projects" / "web" / "lora" / name
    directory.mkdir(parents=True)
    return directory


def test_the_code_is_found_through_the_job(tmp_path: Path):
    root, directory = committed(tmp_path / "r"), adapter(tmp_path)
    snapshot_of(root, directory)
    edit(root, 0, "value", "amount")
    found = service(tmp_path, make_dataset_spec(root)).of(directory)
    assert found is not None
    assert (found.files_changed, found.units_changed_percent, found.retrain) == (1, 10.0, True)


def test_where_nothing_can_be_said_the_reason_is_given(tmp_path: Path):
    root, directory = committed(tmp_path / "r"), adapter(tmp_path)
    spec = make_dataset_spec(root)
    reasons = {
        "the job that trained the adapter, which names it, was deleted or cannot be": (
            adapter(tmp_path, "unknown"),
            spec,
        ),
        "no readable snapshot.json.gz": (directory, spec),
        f"{tmp_path / 'gone'}, which it was trained on, does not exist": (
            directory,
            make_dataset_spec(tmp_path / "gone"),
        ),
        "may not be read with the present settings.": (directory, make_dataset_spec(Path("/etc"))),
    }
    for reason, (path, trained_on) in reasons.items():
        found = service(tmp_path, trained_on).of(path)
        assert found is not None
        assert reason in found.text
        assert found.text.startswith("It is not known how far the code has moved on: ")
        assert found.retrain is None


def test_an_adapter_from_elsewhere_or_of_records_has_no_code_here(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    spec = make_dataset_spec(tmp_path / "r")
    assert service(tmp_path, spec).of(elsewhere) is None
    records = make_dataset_spec(tmp_path / "records.jsonl", source_kind="jsonl")
    assert service(tmp_path, records).of(adapter(tmp_path)) is None


async def test_a_comparison_that_takes_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, directory = committed(tmp_path / "r"), adapter(tmp_path)
    comparing = service(tmp_path, make_dataset_spec(root))
    began, may_end = threading.Event(), threading.Event()

    def slow(_adapter: Path) -> None:
        began.set()
        may_end.wait()

    monkeypatch.setattr(comparing, "of", slow)
    try:
        found = await comparing.within(0.05, str(directory))
        assert found is not None
        assert found.text.endswith("comparing it takes more than 0.05 s.")
        await anyio.to_thread.run_sync(began.wait)
        found = await comparing.within(0.05, str(directory))  # waits for the first one
        assert found is not None
        assert found.retrain is None
    finally:
        may_end.set()
