"""What is named is freed completely, and never what is in use."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_core.adapters.registry import Registry
from peft_core.errors import AdapterInUse, InvalidArgument, PeftMcpError, StorageError
from peft_core.jobs.pruning import prune
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import JobResumed, JobStarted
from peft_core.schemas.results import Status
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.storage import service as service_module
from peft_core.storage.items import ABANDONED_S, conversion_lock
from peft_core.system import in_use
from peft_core.system.lock import FileLock
from tests.factories import make_job, make_request
from tests.unit.storage.conftest import DONE, KEY, STOPPED, Usage, item, publish, write


def files_below(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}


def test_a_converted_base_is_freed_and_nothing_else_changes(kept: DataPaths, usage: Usage) -> None:
    before = files_below(kept.root)
    after = usage(f"base_models/{KEY}")
    assert before - files_below(kept.root) == {f"base_models/{KEY}/config.json", f"base_models/{KEY}/model.safetensors"}
    assert [freed.name for freed in after.freed] == [f"base_models/{KEY}"]
    assert after.freed[0].bytes >= 50_000
    assert after.summary.startswith(f"Freed 51 kB: base_models/{KEY}. {kept.root} holds ")
    assert [path.name for path in kept.base_models.iterdir()] == [f"{KEY}.f16.gguf"]  # no lock file either


def test_every_kind_of_item_is_freed_by_its_listed_name(kept: DataPaths, usage: Usage) -> None:
    write(kept.base_models / ".converting-abc" / "model.safetensors", 800)
    listed = usage()
    names = [entry.name for entry in listed.items if entry.can_free]
    assert len(names) == 8
    after = usage(*names)
    assert {freed.name: freed.bytes for freed in after.freed} == {name: item(listed, name).bytes for name in names}
    assert after.total_bytes == listed.total_bytes - sum(freed.bytes for freed in after.freed)
    assert [entry.name for entry in after.items] == ["database"]
    assert files_below(kept.root) == {"peft.db", "logs/runner.log", "projects/web/lora/.lock", "base_models/.lock"} | {
        name for name in files_below(kept.root) if name == "exports.lock"
    }


def test_a_freed_job_keeps_its_record_and_the_adapter_that_it_published(
    kept: DataPaths, store: Store, usage: Usage
) -> None:
    usage(f"jobs/{DONE}")
    assert not kept.job(DONE).root.exists()
    assert store.get(DONE).status is Status.COMPLETED
    assert store.events(DONE)
    (adapter,) = Registry(kept).adapters()
    assert (adapter.adapter_id, adapter.current) == (DONE, True)


def test_freeing_the_current_adapter_makes_the_newest_other_one_current(kept: DataPaths, usage: Usage) -> None:
    publish(kept, "web", "20260103-000000-cccc03")
    usage("adapters/web/20260103-000000-cccc03")
    (adapter,) = Registry(kept).adapters()
    assert (adapter.adapter_id, adapter.current) == (DONE, True)
    usage(f"adapters/web/{DONE}")
    assert not os.path.lexists(kept.current("web"))


def test_logs_are_emptied_and_their_writers_go_on_writing(kept: DataPaths, usage: Usage) -> None:
    with (kept.logs / "runner.log").open("ab") as log:
        assert usage("logs").freed[0].bytes == 500
        log.write(b"next\n")
    assert (kept.logs / "runner.log").read_bytes() == b"next\n"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "base_models", "jobs", "base_models/../jobs", f"base_models/{KEY}/", f"jobs/{DONE}/dataset", "/etc",
     f"adapters/web/{DONE}/../../lora", "adapters/web/current", "projects/web", "peft.db", "*", "x" * 3000, "a\0b"],
)  # fmt: skip
def test_a_name_that_is_not_listed_is_an_error_that_says_what_exists(kept: DataPaths, usage: Usage, name: str) -> None:
    before = files_below(kept.root)
    with pytest.raises(
        InvalidArgument, match=r"must be names as disk_usage lists them: there are (base|job|adap)"
    ) as caught:
        usage(f"jobs/{STOPPED}", name)
    assert len(str(caught.value)) < 500
    assert files_below(kept.root) == before


def test_the_error_begins_with_similar_names(kept: DataPaths, usage: Usage) -> None:
    with pytest.raises(InvalidArgument, match=f"there are jobs/{DONE}"):
        usage(f"job/{DONE}")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40))
def test_no_text_frees_anything_but_what_is_listed_under_it(kept: DataPaths, usage: Usage, text: str) -> None:
    listed = {entry.name for entry in usage().items}
    before = files_below(kept.root)
    if text not in listed:
        with pytest.raises(PeftMcpError):
            usage(text)
        assert files_below(kept.root) == before


def test_quotes_around_a_name_and_repeated_names_are_understood(kept: DataPaths, usage: Usage) -> None:
    assert [freed.name for freed in usage(f' "jobs/{DONE}"', f"jobs/{DONE}").freed] == [f"jobs/{DONE}"]


def test_database_and_unknown_files_cannot_be_freed(kept: DataPaths, usage: Usage) -> None:
    write(kept.root / "notes.txt", 5)
    for name in ("database", "other"):
        with pytest.raises(StorageError, match=f"Nothing was freed. {name}: "):
            usage(name)
    assert (kept.root / "notes.txt").exists()


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [f"base_models/{KEY}", f"base_models/{KEY}.f16.gguf", f"adapters/web/{DONE}", f"jobs/{DONE}"]
)
def test_what_another_process_reads_is_kept_until_it_ends(kept: DataPaths, usage: Usage, name: str) -> None:
    places = {"adapters": kept.adapter("web", DONE), "jobs": kept.job(DONE).root}
    path = places.get(name.partition("/")[0], kept.root / name)
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holds\n"
        assert not item(usage(), name).can_free
        with pytest.raises(StorageError, match="Nothing was freed"):
            usage(name)
        after = usage(name, "logs")
        assert [kept_item.name for kept_item in after.kept] == [name]
        assert f"Not freed: {name}: " in after.summary
        assert path.exists()
        process.kill()
    assert item(usage(), name).can_free
    usage(name)
    assert not path.exists()


HOLD = """
import sys
from pathlib import Path
from peft_core.system import in_use
in_use.hold(Path(sys.argv[1]))
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_base_that_is_being_converted_is_not_touched(kept: DataPaths, usage: Usage) -> None:
    write(kept.base_models / ".converting-abc" / "model.safetensors", 800)
    write(kept.base_models / f".{KEY}.f16.gguf.0a1b2c3d", 900)  # written a moment ago
    with FileLock(conversion_lock(kept)) as lock:
        assert lock.acquire()
        listed = usage()
        assert not any(entry.name == "leftovers" for entry in listed.items)
        assert item(listed, "other").bytes == 1700
    assert item(usage(), "leftovers").bytes == 800
    usage("leftovers")
    assert not (kept.base_models / ".converting-abc").exists()
    assert (kept.base_models / f".{KEY}.f16.gguf.0a1b2c3d").exists()


def test_a_conversion_that_begins_between_listing_and_freeing_is_not_touched(
    kept: DataPaths, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(kept.base_models / ".converting-abc" / "model.safetensors", 800)
    begin = FileLock(conversion_lock(kept))
    found = service_module.find_items

    def then_convert(paths: DataPaths) -> object:
        items = found(paths)
        begin.acquire()
        return items

    monkeypatch.setattr(service_module, "find_items", then_convert)
    with begin, pytest.raises(StorageError, match="leftovers: Another process works there"):
        usage("leftovers")
    assert (kept.base_models / ".converting-abc").exists()


def test_unfinished_jobs_are_kept(kept: DataPaths, store: Store, usage: Usage) -> None:
    store.requeue(STOPPED, JobResumed())
    with pytest.raises(StorageError, match=r"The job is queued\. Wait for its end, or call cancel_training"):
        usage(f"jobs/{STOPPED}")
    store.append(STOPPED, JobStarted())
    assert item(usage(), f"jobs/{STOPPED}").reason == "The job is running. Wait for its end, or call cancel_training."


def test_a_job_that_is_resumed_between_listing_and_freeing_is_kept(
    kept: DataPaths, store: Store, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = in_use.unused

    def resume_first(path: Path) -> object:
        raise AssertionError("the job's state is checked before its directory is renamed")

    describe = service_module.Surroundings.describe

    def then_resume(self: object, found: object) -> object:
        described = describe(self, found)  # type: ignore[arg-type]
        if store.get(STOPPED).status is Status.INTERRUPTED:
            store.requeue(STOPPED, JobResumed())
        return described

    monkeypatch.setattr(service_module.Surroundings, "describe", then_resume)
    monkeypatch.setattr(in_use, "unused", resume_first)
    with pytest.raises(StorageError, match="resumed a moment ago"):
        usage(f"jobs/{STOPPED}")
    monkeypatch.setattr(in_use, "unused", aside)
    assert (kept.job(STOPPED).checkpoint / "state.safetensors").exists()


def test_a_job_cannot_be_resumed_while_its_files_are_set_aside(kept: DataPaths, store: Store) -> None:
    resumed = threading.Event()

    def resume() -> None:
        store.requeue(STOPPED, JobResumed())
        resumed.set()

    with store.while_ended(STOPPED) as ended:
        assert ended
        thread = threading.Thread(target=resume)
        thread.start()
        assert not resumed.wait(0.2)
    thread.join(30)
    assert resumed.is_set()
    with store.while_ended(STOPPED) as ended:
        assert not ended


@pytest.mark.parametrize("is_second", [False, True])
def test_an_adapter_that_waits_for_its_evaluation_is_kept(
    kept: DataPaths, store: Store, usage: Usage, is_second: bool
) -> None:
    paths = [kept.adapter("web", DONE), Path("/elsewhere/a")]
    evaluated = EvaluatedAdapter(adapter_path=paths[is_second], compared_with=paths[not is_second])
    store.insert(make_job("20260104-000000-dddddd", request=make_request(evaluated=evaluated)))
    assert item(usage(), f"adapters/web/{DONE}").reason.startswith("Job 20260104-000000-dddddd evaluates it.")


def test_an_adapter_that_this_server_uses_is_kept_with_the_reason(kept: DataPaths, usage: Usage) -> None:
    def refuse(path: Path) -> None:
        raise AdapterInUse(f"Adapter {path.name} is loaded.", suggestions=["Call unload_adapter first"])

    entry = item(usage(require_unused=refuse), f"adapters/web/{DONE}")
    assert entry.reason == f"Adapter {DONE} is loaded. Call unload_adapter first."


def test_the_adapters_that_the_endpoint_serves_are_kept(kept: DataPaths, usage: Usage) -> None:
    earlier = publish(kept, "web", "20260103-000000-cccc03").name
    with FileLock(kept.serving_lock) as lock:
        assert lock.acquire()
        listed = usage()
        assert item(listed, f"adapters/web/{earlier}").reason == "The endpoint serves it. Call stop_serving first."
        assert item(listed, f"adapters/web/{DONE}").can_free
    assert item(usage(), f"adapters/web/{earlier}").can_free


def test_exports_are_kept_while_an_export_runs_or_if_they_are_not_ours(kept: DataPaths, usage: Usage) -> None:
    write(kept.exports("web") / DONE / "by-hand" / "model.gguf", 300)
    name = f"exports/web/{DONE}/gguf-lora"
    with FileLock(kept.exports_lock) as lock:
        assert lock.acquire()
        assert item(usage(), name).reason == "An export is running. Wait for its end."
    assert "export.json" in item(usage(), f"exports/web/{DONE}/by-hand").reason
    usage(name)
    assert [path.name for path in (kept.exports("web") / DONE).iterdir()] == ["by-hand"]


def test_an_unknown_job_directory_is_kept_as_long_as_a_request_may_be_writing_it(kept: DataPaths, usage: Usage) -> None:
    records = write(kept.job("20260105-000000-eeeeee").records, 100)
    assert "A request may just be writing it" in item(usage(), "jobs/20260105-000000-eeeeee").reason
    long_ago = time.time() - ABANDONED_S - 60
    for path in (records, records.parent):
        os.utime(path, (long_ago, long_ago))
    assert usage("jobs/20260105-000000-eeeeee").freed[0].bytes == 100


def test_jobs_are_kept_and_all_else_can_be_freed_when_the_database_is_damaged(kept: DataPaths, usage: Usage) -> None:
    kept.database.write_bytes(b"not a database" * 1000)
    assert "database of jobs cannot be read" in item(usage(), f"jobs/{DONE}").reason
    with pytest.raises(StorageError, match="database of jobs cannot be read"):
        usage(f"jobs/{DONE}")
    assert usage(f"base_models/{KEY}").freed


def test_a_directory_that_is_no_adapter_is_not_called_freed(kept: DataPaths, usage: Usage) -> None:
    write(kept.adapters("api") / "current" / "notes.txt", 5)
    with pytest.raises(StorageError, match="adapters/api/current: Project 'api' has no adapter 'current'"):
        usage("adapters/api/current")
    assert (kept.adapters("api") / "current" / "notes.txt").exists()


def test_a_data_directory_that_can_only_be_read_is_listed_and_kept(
    kept: DataPaths, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use.hold(kept.base_models / KEY)
    in_use.keep_only(())  # the lock file stays
    open_file: Callable[..., int] = os.open

    def read_only(path: Path, flags: int, *arguments: int, **named: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, "Read-only file system")
        return open_file(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", read_only)
    assert len(usage().items) == 8
    for name in (
        f"base_models/{KEY}",
        f"base_models/{KEY}.f16.gguf",
        f"adapters/web/{DONE}",
        f"exports/web/{DONE}/gguf-lora",
    ):
        with pytest.raises(StorageError, match=f"Nothing was freed. {name}: "):
            usage(name)
    assert (kept.base_models / KEY / "model.safetensors").exists()


# -- other processes and deaths ----------------------------------------------------------------------------------------

FREE = """
import os, shutil, signal, sys
from pathlib import Path
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.storage.service import StorageService
settings = Settings(data_dir=Path(sys.argv[1]))
if sys.argv[2] == "killed":
    shutil.rmtree = lambda path, **_: os.kill(os.getpid(), signal.SIGKILL)
sys.stdin.readline()
usage = StorageService(settings, Registry(settings.paths)).usage(sys.argv[3:], lambda path: None)
print(sum(freed.bytes for freed in usage.freed))
"""


def free_in_process(kept: DataPaths, how: str, *names: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FREE, str(kept.root), how, *names]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "name", [f"base_models/{KEY}", f"jobs/{DONE}", f"exports/web/{DONE}/gguf-lora", f"adapters/web/{DONE}"]
)
def test_what_a_killed_process_had_begun_to_free_is_gone_and_the_next_call_finishes(
    kept: DataPaths, usage: Usage, name: str
) -> None:
    size = item(usage(), name).bytes
    process = free_in_process(kept, "killed", name)
    process.communicate("go\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    listed = usage()
    assert name not in {entry.name for entry in listed.items}
    assert item(listed, "leftovers").bytes == size
    usage("leftovers")
    assert "leftovers" not in {entry.name for entry in usage().items}
    assert not [path for path in kept.root.rglob(".*") if path.is_dir()]


def test_two_processes_free_the_same_items_once(kept: DataPaths, usage: Usage) -> None:
    names = [entry.name for entry in usage().items if entry.can_free and entry.name != "logs"]
    size = sum(item(usage(), name).bytes for name in names)
    processes = [free_in_process(kept, "completely", *names) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    freed = [int(output) for process, output in zip(processes, outputs, strict=True) if process.returncode == 0]
    assert freed, "at least one succeeds"
    assert sum(freed) <= size
    assert not [name for name in names if name in {entry.name for entry in usage().items}]


def test_pruning_deletes_what_a_killed_process_had_begun_to_free(kept: DataPaths, store: Store) -> None:
    for directory in (kept.base_models, kept.job(DONE).root.parent, kept.exports("web") / DONE):
        old = write(directory / ".freed.0123" / "file", 10).parent
        os.utime(old, (1, 1))
    prune(store, Registry(kept), kept, keep=100)
    assert not list(kept.root.rglob(".freed.*"))


def test_files_that_cannot_be_deleted_are_reported(
    kept: DataPaths, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "delete", lambda path: 0)
    with pytest.raises(StorageError, match=r"Only 0 kB of it could be deleted; the rest is in .*\.freed\."):
        usage(f"jobs/{DONE}")


def test_a_full_disk_on_which_no_lock_file_can_be_created_does_not_prevent_freeing(
    kept: DataPaths, usage: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file: Callable[..., int] = os.open

    def full(path: Path, flags: int, *arguments: int, **named: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", full)
    assert usage(f"base_models/{KEY}").freed[0].bytes >= 50_000
