"""A Ray cluster of several nodes on this machine, in a process of its own that a test controls through `TestCluster`.

As a program it reads one command a line from standard input, and writes a line when it is done: "add NAME", "kill NAME".
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
CPUS = 4  # of a node, which Ray only counts
STORE_BYTES = 80_000_000
STARTS = 4  # attempts
SETTINGS = {
    # Ray would start a process for each CPU in advance, and give the processor to everything else first.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",
    # On a busy machine the process that serves a client may take more than 30 s to start.
    "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",
}


class TestCluster:
    """The head node, which runs no trainings, and nodes that a test adds and kills. Its connections need a token."""

    __test__ = False  # not a test, although its name begins so

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self.token = directory / "token"
        self.token.write_text(secrets.token_hex(32))
        self.address = f"ray://127.0.0.1:{free_port()}"

    def __enter__(self) -> Self:
        log = (self._directory / "cluster.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.real_cluster", self.address.rpartition(":")[2], str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env={**os.environ, **self.environment, **SETTINGS},
            start_new_session=True,
        )
        log.close()
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        try:
            self._process.wait(60)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process.stdout.close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to connect."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "OMP_NUM_THREADS": "1"}

    def data_dir(self, node: str) -> Path:
        return self._directory / node

    def hold(self, node: str, step: int | None) -> None:
        """Let the workers on a node wait after this step; None lets them go on."""
        file = self.data_dir(node) / "hold"
        if step is None:
            file.unlink()
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text(str(step))

    def runs(self, node: str) -> set[Path]:
        """Return the directories of the runs that take place on a node."""
        return set((self.data_dir(node) / "cluster" / "runs").glob("run-*"))

    def add(self, node: str) -> None:
        self._command(f"add {node}")

    def kill(self, node: str) -> None:
        """Kill every process of a node, without notice. "head" is the head node."""
        self._command(f"kill {node}")

    def _command(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        self._read()

    def _read(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "done\n":
            raise RuntimeError((self._directory / "cluster.log").read_text()[-3000:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_node(start: Callable[[], Any]) -> Any:
    """Start a node, again if it fails: on a busy machine its agents miss a deadline that is fixed in Ray."""
    for _ in range(STARTS - 1):
        try:
            return start()
        except Exception:  # noqa: BLE001 -- Ray raises nothing more special
            traceback.print_exc()
    return start()


def main(port: int, directory: Path) -> None:
    from ray.cluster_utils import Cluster  # noqa: PLC0415 -- seconds, and only in this process

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def done() -> None:
        answers.write("done\n")
        answers.flush()

    environment = {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "site"), str(ROOT)]),
        "CODEBASE_GARDENER_ALLOWED_ROOTS": str(directory),  # so the nodes do not see this machine's base models
    }
    common: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    head: dict[str, Any] = {
        **common,
        "num_cpus": 0,
        "ray_client_server_port": port,
        "env_vars": {**environment, "CODEBASE_GARDENER_DATA_DIR": str(directory / "head")},
    }
    cluster = start_node(lambda: Cluster(initialize_head=True, head_node_args=head))
    nodes = {"head": cluster.head_node}
    done()
    for line in sys.stdin:
        action, name = line.split()
        if action == "add":
            variables = {**environment, "CODEBASE_GARDENER_DATA_DIR": str(directory / name)}
            add = partial(cluster.add_node, num_cpus=CPUS, env_vars=variables, **common)
            nodes[name] = start_node(add)
        else:
            nodes.pop(name).kill_all_processes(check_alive=False, allow_graceful=False)
        done()
    for node in nodes.values():
        node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
