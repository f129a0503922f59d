"""The main job asks for no network connection, and planted secrets appear in no file, answer or log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.main_job import HOOK, PLANTED_IN_ENVIRONMENT, SECRETS, MainJob, strace


def test_the_hook_refuses_remote_connections_and_allows_local_ones(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    program = """
import socket
refused = 0
for reach in (
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: socket.create_connection(("192.0.2.1", 9), timeout=1),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
):
    try:
        reach()
    except OSError as error:
        refused += "forbidden" in str(error)
listening = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listening.getsockname())
print(refused)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NETWORK_LOG": str(tmp_path / "log")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
    assert (tmp_path / "log").read_text().count("tried") == 3


@pytest.mark.model
def test_the_main_job_makes_no_connection_and_leaks_no_secret(main_job: MainJob) -> None:
    recorded = main_job.network_log.read_text()
    for process in ("-m server", "peft_core.jobs.runner", "peft_core.worker", "peft_core.inference.worker"):
        assert re.search(rf"began .*{process}", recorded), f"{process} had no hook"
    assert "tried" not in recorded
    if strace():
        calls = main_job.system_calls.read_text().splitlines()
        assert [line for line in calls if "AF_INET" in line and not re.search(r"127\.|::1", line)] == []

    files = [path for path in main_job.data.rglob("*") if path.is_file() and "base_models" not in path.parts]
    assert len(files) > 5
    for secret in (*SECRETS.values(), PLANTED_IN_ENVIRONMENT):
        assert secret not in "\n".join(main_job.observed.texts)
        for path in (*files, main_job.server_log):
            assert secret.encode() not in path.read_bytes(), path
