"""The bridge as the runner starts it, without a cluster."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

from peft_core.cluster.attachment import Record
from peft_core.paths import JobPaths
from peft_core.schemas.events import EVENT, JobInterrupted
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import INTERRUPTED_EXIT_CODE
from peft_core.system.child_process import python_module
from tests.factories import make_cluster_plan, make_request


def test_a_cluster_that_is_gone_interrupts_the_job(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        address = f"ray://127.0.0.1:{taken.getsockname()[1]}"
        task = TrainingTask(
            job_id="20260101-000000-abcdef",
            project_id="web",
            request=make_request(cluster=make_cluster_plan(address=address)),
            job_dir=tmp_path,
            base_models_dir=tmp_path / "base_models",
            data_dir=tmp_path,
        )
        paths = JobPaths(tmp_path)
        paths.task.write_text(task.model_dump_json())
        paths.cluster.write_text(Record(name="peft-mcp-of-an-earlier-bridge").model_dump_json())
        command = [*python_module("peft_core.cluster.bridge"), str(paths.task), "--patience", "0"]
        ended = subprocess.run(command, capture_output=True, check=False, timeout=120)

    assert ended.returncode == INTERRUPTED_EXIT_CODE, ended.stderr.decode()
    last = EVENT.validate_json(ended.stdout.splitlines()[-1])
    assert isinstance(last, JobInterrupted)
    assert last.reason.startswith(f"The cluster at {address} does not answer")
    assert "resuming attaches to it" in last.reason
