"""File permissions: the user's code and everything derived from it is private to the user."""

from __future__ import annotations

import stat
from pathlib import Path

from peft_core.jobs.store import Store
from tests.model_files import write_model
from tests.survival.wire import server


def test_the_data_directory_is_private_to_the_user(data_dir: Path) -> None:
    Store(data_dir / "peft.db", lambda: 0.0).create()
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_files_of_server_and_runner_are_readable_by_their_user_only(data_dir: Path, tmp_path: Path) -> None:
    data_dir.mkdir(mode=0o755)  # as a user may have created it
    base = write_model(tmp_path / "base")
    records = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]
    with server(data_dir, cwd=tmp_path) as client:
        config = {"base_model": str(base), "max_length": 128, "max_steps": 1}
        client.call("train_adapter", project_id="web", records=records, config=config, wait_s=0)
        ended = False
        while not ended:
            status = client.call("get_training_status", project_id="web", wait_s=20)["structuredContent"]["status"]
            ended = status not in ("queued", "in_progress")
    written = [path for path in data_dir.rglob("*") if not path.is_symlink()]
    assert {"peft.db", "runner.log", "records.jsonl", "task.json", "train.log"} <= {path.name for path in written}
    assert [path for path in written if path.stat().st_mode & 0o077 and "projects" not in path.parts] == []
