"""The single checks of `doctor`. All of them together run in tests/integration/test_command_line.py."""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
from anyio.to_thread import run_sync
from huggingface_hub import constants

from peft_core.config import Settings
from peft_core.devices import records
from peft_core.errors import InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.planning import local_bases, recommend_base, target
from peft_core.schemas.device_check import Outcome
from server.cli import doctor, exit_codes
from server.cli.doctor import Diagnosis, Finding
from server.cli.terminal import Terminal
from tests.factories import make_device_check
from tests.model_files import write_gguf

UNUSED_PORT = "http://127.0.0.1:1"


async def test_a_problem_gives_code_1_and_says_so_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_torch", lambda: Finding(topic="torch", state="ok", message="not imported here"))
    monkeypatch.setenv("HOME", str(tmp_path))
    out, settings = io.StringIO(), Settings(data_dir=tmp_path / "data", default_base_model="/no/such/model")
    async with PEFTManager(settings) as manager:
        code = await doctor.doctor(manager, Namespace(report=None), Terminal(out, io.StringIO(), as_json=False))
    assert code == exit_codes.NO
    assert "PROBLEM base models: the default, /no/such/model, cannot be trained" in out.getvalue()
    assert out.getvalue().endswith("Training is not possible: see PROBLEM above.\n")


async def test_a_check_that_crashes_is_a_problem_and_does_not_end_the_others() -> None:
    def crash() -> Finding:
        raise OSError("no such device")

    (found,) = await doctor._check("git", partial(run_sync, crash))
    assert (found.topic, found.state) == ("git", "problem")
    assert "OSError: no such device" in found.message


async def test_a_default_base_model_that_cannot_be_used_prevents_training(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", default_base_model=str(tmp_path / "nothing"))
    async with PEFTManager(settings) as manager:
        base, training = await doctor._base_models(manager), await doctor._training(manager)
    assert (base.state, training.state) == ("problem", "problem")
    assert "CODEBASE_GARDENER_DEFAULT_BASE_MODEL" in base.fix
    assert "nothing" in training.message


async def test_the_best_base_model_is_named_and_a_model_for_code_is_worth_downloading_if_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(target, "available_memory_bytes", lambda: 10**11)
    monkeypatch.setattr(local_bases, "device_memory_bytes", lambda _: 10**11)
    monkeypatch.setattr(local_bases, "MAX_SECONDS", 600.0)
    monkeypatch.setattr(recommend_base, "_free_disk_bytes", lambda: 10**11)
    async with PEFTManager(Settings(data_dir=tmp_path / "data")) as manager:
        without = await doctor._recommended_base(manager)
        fim = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
        write_gguf(tmp_path / ".lmstudio" / "models" / "org" / "m" / "tiny-coder.gguf", fim)
        with_coder = await doctor._recommended_base(manager)
    assert (without.state, without.message.partition(" ")[0]) == ("advice", "bundled")
    assert "hf download Qwen/Qwen2.5-Coder-" in without.fix
    assert (with_coder.state, with_coder.fix) == ("ok", "")
    assert with_coder.message.startswith(
        "~/.lmstudio/models/org/m/tiny-coder.gguf: a model for code, with fill-in-the-mid"
    )


async def test_a_data_directory_that_cannot_be_written_prevents_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor._disk(tmp_path / "file" / "data")
    assert (found.state, found.message) == ("problem", f"{tmp_path / 'file'} is not a writable directory")
    assert "CODEBASE_GARDENER_DATA_DIR" in found.fix


def test_free_space_is_that_of_the_disk_on_which_the_data_directory_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor._disk(tmp_path / "not" / "yet" / "there").message.endswith(f"{tmp_path}/not/yet/there")
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1 << 80)
    found = doctor._disk(tmp_path)
    assert (found.state, "peft-mcp disk" in found.fix) == ("advice", True)


def test_the_memory_limit_of_the_settings_is_shown() -> None:
    assert "MAX_MEMORY_MB" not in doctor._memory(Settings()).message
    assert "a job may use 1.5 GB" in doctor._memory(Settings(max_memory_mb=1500)).message


def test_without_git_the_advice_is_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._git().state == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._git().message == "it is not on the PATH"
    broken = tmp_path / "git"
    broken.write_text(f"#!{sys.executable}\nraise SystemExit(1)\n")
    broken.chmod(0o755)
    assert (doctor._git().state, "does not work" in doctor._git().message) == ("advice", True)


def test_an_ollama_that_does_not_run_prevents_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._ollama(Settings(ollama_base_url=UNUSED_PORT))
    assert (found.state, found.fix) == ("advice", "Start it with `ollama serve`")


def test_an_ollama_on_another_machine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://ollama.example.org")
    found = doctor._ollama(Settings())
    assert (found.state, "is not asked" in found.message) == ("advice", True)


def test_a_gpu_that_torch_does_not_use_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "expected_device", lambda requested, **_: "cuda")
    monkeypatch.setattr(doctor, "why_no_cuda", lambda: "the installed torch supports CPUs only")
    assert "supports CPUs only" in doctor._unused_gpu("cpu")
    assert doctor._unused_gpu("cuda") == ""


def test_each_finding_is_a_line_with_its_remedy_below() -> None:
    problem = Finding(topic="git", state="problem", message="it is absent", fix="Install it")
    fine = Finding(topic="Python", state="ok", message="3.11")
    assert list(doctor._lines(Diagnosis(can_train=False, findings=[fine, problem]))) == [
        "ok      Python: 3.11",
        "PROBLEM git: it is absent",
        "        -> Install it",
        "Training is not possible: see PROBLEM above.",
    ]


def test_checked_devices_are_shown_with_what_to_do_and_written_to_a_new_file(tmp_path: Path) -> None:
    settings, file = Settings(data_dir=tmp_path / "data"), tmp_path / "report.md"
    assert doctor._devices(settings) == []
    own = {"machine": records.machine_id()}
    records.save(settings.data_dir, make_device_check(**own))
    records.save(settings.data_dir, make_device_check(**own, device="mps", outcome=Outcome.DIFFERS, reason="why"))
    found = sorted(doctor._devices(settings), key=lambda finding: finding.state)
    assert [finding.state for finding in found] == ["advice", "ok"]
    assert found[0].message.startswith("NVIDIA H100: mps computes something else than the CPU: why")
    assert "Trainings use the CPU instead" in found[0].fix
    assert "doctor --report FILE" in found[0].fix
    doctor._write_report(settings, file)
    assert file.read_text().count("## Check") == 2
    with pytest.raises(InvalidArgument, match="--report"):
        doctor._write_report(settings, file)
