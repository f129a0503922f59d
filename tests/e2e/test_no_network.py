"""The main job asks for no network connection, and planted secrets appear in no file, answer or log.

Every process starts with an audit hook that refuses and records connections beyond this machine; where strace is installed
it also records those of native code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from tests.clients import data_of, text_of
from tests.e2e.conftest import SHORT

HOOK = """
import os, sys

def _record(line):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{os.getpid()} {line}\\n")

def _is_local(host):
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else host
    return text in (None, "", "localhost", "::1") or str(text).startswith("127.")

def _hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[-1]
        if not isinstance(address, tuple) or not address or _is_local(address[0]):
            return
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if _is_local(arguments[0]):
            return
    else:
        return
    _record(f"tried {event} {arguments[1:]!r}")
    raise OSError("the network is forbidden")

_record(f"began {' '.join(sys.orig_argv)}")
sys.addaudithook(_hook)
"""
SECRETS = {
    "aws.py": "AKIAQ3EGVMKP7XTLW2ZN",
    "github.py": "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dF3gH6",
    "hub.py": "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi",
}
PLANTED_IN_ENVIRONMENT = "hf_plantedPLANTEDplantedPLANTEDplanted"


def strace() -> list[str]:
    """Return the strace command that records connections; empty where it does not work."""
    program = shutil.which("strace")
    command = [program or "", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg"]
    if program is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        return []
    return command


@pytest.fixture
def repository(tmp_path: Path, stdlib_repository: Path) -> Path:
    repository = tmp_path / "repository"
    shutil.copytree(stdlib_repository / "mime", repository)
    code = (repository / "multipart.py").read_text()
    for name, secret in SECRETS.items():
        (repository / name).write_text(f'KEY = "{secret}"\n{code}\n# the same again: {secret}\n')
    (repository / ".env").write_text(f"KEY={SECRETS['aws.py']}\n")
    return repository


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
async def test_the_main_job_makes_no_connection_and_leaks_no_secret(
    data_dir: Path, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    log, calls = tmp_path / "network.log", tmp_path / "calls.log"
    traced = strace()
    command = [*traced, *(["-o", str(calls)] if traced else []), sys.executable, "-m", "server"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | {
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "NETWORK_LOG": str(log),
        "HF_TOKEN": PLANTED_IN_ENVIRONMENT,
    }
    server = StdioServerParameters(command=command[0], args=command[1:], env=environment)
    answers: list[str] = []
    with (tmp_path / "stderr.log").open("w") as errors:
        async with Client(stdio_client(server, errlog=errors), mode="2026-07-28") as client:

            async def call(name: str, **arguments: object) -> dict[str, object]:
                result = await client.call_tool(name, arguments)
                answers.append(text_of(result))
                assert not result.is_error, answers[-1]
                return data_of(result)

            await call("train_adapter", project_id="web", training_data=str(repository), config=SHORT)
            status: dict[str, object] = {"status": "queued"}
            while status["status"] in ("queued", "in_progress"):
                status = await call("get_training_status", project_id="web", wait_s=30)
            assert status["status"] == "completed", status
            assert (await call("verify_adapter_compatibility", adapter_path="web"))["compatible"]
            assert (await call("load_adapter", adapter_path="web"))["status"] == "loaded"
            assert (await call("generate", prompt="def attach(", max_new_tokens=4))["text"]
            await call("get_adapter_info", adapter_path="web")
            await call("unload_adapter")

    recorded = log.read_text()
    for process in ("-m server", "peft_core.jobs.runner", "peft_core.worker", "peft_core.inference.worker"):
        assert re.search(rf"began .*{process}", recorded), f"{process} had no hook"
    assert "tried" not in recorded
    if traced:
        remote = [
            line for line in calls.read_text().splitlines() if "AF_INET" in line and not re.search(r"127\.|::1", line)
        ]
        assert remote == []

    files = [path for path in data_dir.rglob("*") if path.is_file() and "base_models" not in path.parts]
    assert len(files) > 5
    for secret in (*SECRETS.values(), PLANTED_IN_ENVIRONMENT):
        assert secret not in "\n".join(answers)
        for path in (*files, tmp_path / "stderr.log"):
            assert secret.encode() not in path.read_bytes(), path
