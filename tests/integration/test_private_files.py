"""What is written is for its user alone: code, and what was made from it."""

from __future__ import annotations

import stat
from pathlib import Path

from peft_core.jobs.store import Store
from tests.model_files import write_model
from tests.survival.wire import server


def test_nobody_else_on_the_machine_can_read_the_data_directory(data_dir: Path) -> None:
    Store(data_dir / "peft.db", lambda: 0.0).create()
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700


def test_what_the_server_and_its_runner_write_is_readable_for_their_user_alone(data_dir: Path, tmp_path: Path) -> None:
    data_dir.mkdir(mode=0o755)  # of an earlier version
    base = write_model(tmp_path / "base")
    records = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]
    with server(data_dir, cwd=tmp_path) as asked:
        config = {"base_model": str(base), "max_length": 128, "max_steps": 1}
        asked.call("train_adapter", project_id="web", training_data=records, config=config, wait_s=0)
        ended = False
        while not ended:
            status = asked.call("get_training_status", project_id="web", wait_s=20)["structuredContent"]["status"]
            ended = status not in ("queued", "in_progress")
    written = [path for path in data_dir.rglob("*") if not path.is_symlink()]
    assert {"peft.db", "runner.log", "records.jsonl", "task.json", "train.log"} <= {path.name for path in written}
    assert [path for path in written if path.stat().st_mode & 0o077 and "projects" not in path.parts] == []
