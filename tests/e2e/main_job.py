"""The main job through the real stdio server, done once for all tests: two trainings, and the use of an adapter.

Every process starts with an audit hook that refuses and records connections beyond this machine; where strace is installed
it also records those of native code. Secrets are planted in the repository and in the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.server.subscriptions import ResourceUpdated
from mcp.shared.dispatcher import ProgressFnT
from pydantic import BaseModel

from peft_core.paths import DataPaths
from tests.clients import data_of, text_of

# Three steps may harm, but the tests need a current adapter.
SHORT = {"max_steps": 3, "max_length": 128, "batch_size": 2, "held_out_fraction": 0.02, "make_current": "always"}
SHORT_ON_LITTLE_DATA = {**SHORT, "allow_little_data": True}

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

Answer = dict[str, Any]


class Observed(BaseModel):
    """What the client saw."""

    answered_in_s: float  # train_adapter
    started: Answer  # its answer
    updates: int  # notifications of a change of the job's resource
    progress: list[list[tuple[float, float, str]]]  # (when, progress, message) for each call of get_training_status
    ended: Answer  # the last answer of get_training_status
    resource: Answer
    info: Answer
    listed: list[Answer]
    second: Answer  # the last status of the second training
    texts: list[str]  # of all answers


@dataclass(frozen=True)
class MainJob:
    """The directory of the main job."""

    directory: Path

    @property
    def data(self) -> Path:
        """The data directory, with adapters of the projects 'wsgiref' and 'mime'."""
        return self.directory / "data"

    @property
    def repository(self) -> Path:
        return self.directory / "wsgiref"

    @property
    def network_log(self) -> Path:
        return self.directory / "network.log"

    @property
    def system_calls(self) -> Path:
        """Written by strace, where it works."""
        return self.directory / "calls.log"

    @property
    def server_log(self) -> Path:
        return self.directory / "stderr.log"

    @property
    def observed(self) -> Observed:
        return Observed.model_validate_json((self.directory / "observed.json").read_bytes())


async def do_main_job(directory: Path, bases: Path, library: Path) -> None:
    """Train on two packages of `library`, use the adapter of the first, and write down what was observed."""
    job = MainJob(directory)
    job.data.mkdir()
    (job.data / "base_models").symlink_to(bases)
    _write_repository(job.repository, library)
    with job.server_log.open("w") as log:
        async with Client(stdio_client(_server(job), errlog=log), mode="2026-07-28") as client:
            observed = await _use(client, job, library)
    # The runner deletes the checkpoint after it reported the end, so wait until it has exited.
    with FileLock(DataPaths(job.data).runner_lock):
        (directory / "observed.json").write_text(observed.model_dump_json())


def _write_repository(repository: Path, library: Path) -> None:
    shutil.copytree(library / "wsgiref", repository)
    code = (library / "mime" / "multipart.py").read_text()
    for name, secret in SECRETS.items():
        (repository / name).write_text(f'KEY = "{secret}"\n{code}\n# the same again: {secret}\n')
    (repository / ".env").write_text(f"KEY={SECRETS['aws.py']}\n")


def _server(job: MainJob) -> StdioServerParameters:
    hook = job.directory / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    tracer = strace()
    command = [*tracer, *(["-o", str(job.system_calls)] if tracer else []), sys.executable, "-m", "server"]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | {
        "CODEBASE_GARDENER_DATA_DIR": str(job.data),
        "PYTHONPATH": os.pathsep.join([str(hook), str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
        "NETWORK_LOG": str(job.network_log),
        "HF_TOKEN": PLANTED_IN_ENVIRONMENT,
    }
    return StdioServerParameters(command=command[0], args=command[1:], env=environment)


def strace() -> list[str]:
    """Return the strace command that records connections; empty where it does not work."""
    program = shutil.which("strace")
    command = [program or "", "-f", "-qq", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg"]
    if program is None or subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        return []
    return command


async def _use(client: Client, job: MainJob, library: Path) -> Observed:
    texts: list[str] = []
    progress: list[list[tuple[float, float, str]]] = []

    async def call(name: str, on_progress: ProgressFnT | None = None, **arguments: object) -> Answer:
        result = await client.call_tool(name, arguments, progress_callback=on_progress)
        texts.append(text_of(result))
        assert not result.is_error, texts[-1]
        return data_of(result)

    async def note(done: float, _total: float | None, message: str | None) -> None:
        progress[-1].append((time.monotonic(), done, message or ""))

    # 1. A training, watched to its end.
    began = time.monotonic()
    started = await call("train_adapter", project_id="wsgiref", training_data=str(job.repository), config=SHORT)
    answered_in_s = time.monotonic() - began
    updates = 0
    async with client.listen(resource_subscriptions=[f"training://{started['job_id']}"]) as subscription:
        ended = started
        while ended["status"] in ("queued", "in_progress"):
            progress.append([])
            which = {"project_id": "wsgiref", "job_id": started["job_id"]}
            ended = await call("get_training_status", note, **which, wait_s=20)
        async for event in subscription:
            assert isinstance(event, ResourceUpdated)
            updates += 1
            break
    info = await call("get_adapter_info", adapter_path="wsgiref")
    listed = await call("list_adapters")
    resource = await client.read_resource(f"training://{started['job_id']}")

    # 2. A second one, for tests that need two adapters.
    request = {"training_data": str(library / "mime"), "config": SHORT_ON_LITTLE_DATA}
    second = await call("train_adapter", project_id="mime", **request)
    while second["status"] in ("queued", "in_progress"):
        second = await call("get_training_status", project_id="mime", wait_s=30)
    assert second["status"] == "completed", second

    # 3. The first adapter is used.
    assert (await call("verify_adapter_compatibility", adapter_path="wsgiref"))["compatible"]
    assert (await call("load_adapter", adapter_path="wsgiref"))["status"] == "loaded"
    assert (await call("generate", prompt="def attach(", max_new_tokens=4))["text"]
    await call("unload_adapter")
    return Observed(
        answered_in_s=answered_in_s,
        started=started,
        updates=updates,
        progress=progress,
        ended=ended,
        resource=json.loads(resource.contents[0].text),  # type: ignore[union-attr]
        info=info,
        listed=listed["adapters"],
        second=second,
        texts=texts,
    )
