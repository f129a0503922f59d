"""`peft-mcp` in real processes: a training with a tiny base model, Ctrl-C, doctor, and the server in a terminal."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.errors import JobNotFound
from peft_core.jobs.status import status_of
from peft_core.manager import PEFTManager
from peft_core.schemas.results import Status
from server.cli import exit_codes
from server.cli.follow import follow
from server.cli.terminal import Terminal
from tests.factories import make_job
from tests.tiny_models import write_tiny_base

COMMAND = [sys.executable, "-m", "server"]
TIMEOUT_S = 300
# Three steps may harm, but `evaluate` needs a current adapter.
CONFIG = {"max_length": 64, "allow_little_data": True, "make_current": "always", "held_out_fraction": 0.2}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("tiny-base")))


@pytest.fixture
def environment(data_dir: Path) -> dict[str, str]:
    return {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir), "PYTHONPATH": str(Path(__file__).parents[2])}


def peft_mcp(
    *arguments: str, cwd: Path, env: Mapping[str, str], expect: int = exit_codes.DONE
) -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == expect, ended.stderr
    return ended


def write_records(path: Path, sizes: Sequence[int]) -> Path:
    texts = [f"def add_{size}(value):\n    return value + {size}\n" * 3 for size in sizes]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_training_from_a_terminal_to_a_verdict(tmp_path: Path, tiny_base: str, environment: dict[str, str]) -> None:
    write_records(tmp_path / "adds.jsonl", range(30))
    write_records(tmp_path / "unseen.jsonl", range(1000, 1020))
    options = ["--base-model", tiny_base, "--config", json.dumps(CONFIG), "--max-steps"]

    # 1. Relative paths are those of the working directory; the project has the file's name.
    trained = peft_mcp("train", "adds.jsonl", *options, "100", "--json", cwd=tmp_path, env=environment)
    status = json.loads(trained.stdout)
    assert (status["project_id"], status["status"], status["step"]) == ("adds", "completed", 100)
    assert Path(status["adapter_path"]).is_dir()
    lines = trained.stderr.splitlines()
    assert any(line.startswith("adds: training: step") for line in lines)

    # 2. The verdict decides the exit code of an evaluation.
    evaluate = ["evaluate", "adds", "unseen.jsonl", "--fail-unless", "helps", "--json"]
    evaluated = subprocess.run(
        [*COMMAND, *evaluate],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    verdict = json.loads(evaluated.stdout)["evaluation"]["verdict"]
    assert evaluated.returncode == (exit_codes.DONE if verdict == "helps" else exit_codes.NO), evaluated.stderr

    # 3. Ctrl-C ends the command, not the training; it says how to follow and stop it, and that works.
    process = subprocess.Popen(
        [*COMMAND, "train", "adds.jsonl", *options, "3000", "--project", "long"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line.startswith("long: ") and "queued" not in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == exit_codes.LEFT_RUNNING, err
    assert out.startswith("long: ")
    assert "Follow it: peft-mcp status long --job" in err
    stop = err.partition("Stop it: peft-mcp ")[2].split()
    jobs = json.loads(peft_mcp("status", "--json", cwd=tmp_path, env=environment).stdout)["jobs"]
    assert (jobs[0]["project_id"], jobs[0]["status"]) == ("long", "in_progress")
    peft_mcp(*stop, cwd=tmp_path, env=environment)
    waited = peft_mcp("status", "long", "--wait", cwd=tmp_path, env=environment, expect=exit_codes.NO_RESULT)
    assert waited.stdout.startswith("long: cancelled")


async def test_the_error_of_a_job_that_cannot_be_read_any_more_ends_the_waiting(
    data_dir: Path,
) -> None:
    """The task group of `follow` would otherwise wrap the error, and it would appear as a crash."""
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        job = status_of(make_job(status=Status.QUEUED), 1, Path("/none"), now=0.0)
        with pytest.raises(JobNotFound):
            await follow(manager, job, Terminal(sys.stdout, sys.stderr, as_json=False))


def test_doctor_imports_torch_and_says_whether_training_is_possible(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "home" / ".cursor").mkdir(parents=True)
    env = {**environment, "HOME": str(tmp_path / "home"), "CODEBASE_GARDENER_OLLAMA_BASE_URL": "http://127.0.0.1:1"}
    diagnosis = json.loads(peft_mcp("doctor", "--json", cwd=tmp_path, env=env).stdout)
    assert diagnosis["can_train"] is True
    found = {finding["topic"]: finding for finding in diagnosis["findings"]}
    assert "transformers" in found["torch"]["message"]
    assert "passes all checks" in found["training"]["message"]
    assert found["Ollama"]["state"] == "advice"
    assert "peft-mcp" in found["Cursor"]["fix"]


def test_a_server_in_a_terminal_says_what_it_is_waiting_for(tmp_path: Path, environment: dict[str, str]) -> None:
    terminal, stdin = pty.openpty()
    process = subprocess.Popen(COMMAND, stdin=stdin, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    os.close(stdin)
    assert process.stderr is not None
    assert b"waits for a client" in process.stderr.readline()
    process.kill()
    process.communicate()
    os.close(terminal)


def test_the_server_imports_no_command() -> None:
    script = "import sys, server.__main__, server.app; print('server.cli' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"


def test_commands_import_neither_mcp_nor_anything_heavy() -> None:
    script = """
import sys
import server.cli.run
heavy = {"mcp", "mcp_types", "rich", "starlette", "uvicorn", "torch", "transformers", "numpy", "structlog"}
print(sorted(heavy & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
