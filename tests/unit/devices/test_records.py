"""The kept results of checks, and the report that may be sent."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from peft_core.devices import records
from peft_core.devices.report import headline, is_problem, write_report
from peft_core.paths import DataPaths
from peft_core.schemas.device_check import DeviceCheck, Outcome
from tests.factories import make_device_check


def test_a_device_is_known_once_it_agreed_with_the_same_versions(tmp_path: Path) -> None:
    check = make_device_check()
    assert not records.is_known(tmp_path, check.key)
    records.save(tmp_path, check)
    assert records.is_known(tmp_path, check.key)
    for change in ({"torch": "3.0"}, {"driver": "13"}, {"number_format": "float32"}, {"way": "x"}, {"machine": "y"}):
        assert not records.is_known(tmp_path, check.key.model_copy(update=change))


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.AGREES])
def test_every_other_outcome_is_checked_again(tmp_path: Path, outcome: Outcome) -> None:
    check = make_device_check(outcome=outcome, reason="x")
    records.save(tmp_path, check)
    assert not records.is_known(tmp_path, check.key)
    assert records.load(tmp_path) == [check]
    records.save(tmp_path, make_device_check())  # repaired
    assert records.is_known(tmp_path, check.key)
    assert len(records.load(tmp_path)) == 1


def test_damaged_and_foreign_files_are_ignored(tmp_path: Path) -> None:
    directory = DataPaths(tmp_path).device_checks
    assert records.load(tmp_path) == []
    directory.mkdir()
    (directory / "a.json").write_text("{")
    (directory / "b.json").write_text("[]" * 100_000)
    (directory / "c.json").symlink_to("/etc/passwd")
    os.mkfifo(directory / "d.json")
    records.save(tmp_path, make_device_check())
    assert len(records.load(tmp_path)) == 1


def test_only_the_newest_fifty_are_kept(tmp_path: Path) -> None:
    for number in range(52):
        check = make_device_check(torch=f"2.{number}")
        records.save(tmp_path, check)
        os.utime(DataPaths(tmp_path).device_checks / f"{check.key.digest}.json", (number, number))
    kept = {check.key.torch for check in records.load(tmp_path)}
    assert len(kept) == 50
    assert {"2.51", "2.2"} <= kept


def test_checks_of_other_machines_that_share_the_directory_are_not_this_ones(tmp_path: Path) -> None:
    records.save(tmp_path, make_device_check(machine="another"))
    own = make_device_check(machine=records.machine_id())
    records.save(tmp_path, own)
    assert records.load_own(tmp_path) == [own]
    assert platform.node() not in own.model_dump_json()


def test_paths_in_an_error_are_removed() -> None:
    text = "OSError: no kernel in /data/secret/x.metallib or C:\\Users\\me\\y.dll for aten::mm"
    assert records.without_paths(text) == "OSError: no kernel in … or … for aten::mm"


def test_the_report_has_every_figure_and_names_no_machine() -> None:
    check = make_device_check(outcome=Outcome.DIFFERS, reason="the loss differs by 9 % (tolerance 1 %)")
    report = write_report([check])
    for text in (
        "NVIDIA H100",
        "2.13.0",
        "bfloat16",
        "| loss (tolerance) | 1.000e-03 (7.500e-03) |",
        "9 %",
        "1.100 GB",
    ):
        assert text in report
    assert check.key.machine not in report
    assert "No accelerator has been checked" in write_report([])


def test_a_name_from_a_driver_cannot_break_the_report_or_the_terminal() -> None:
    check = make_device_check(device_name="GPU | x\n## Check 9\x1b[31m")
    assert "\n## Check 9" not in write_report([check])
    assert "\x1b" not in write_report([check]) + headline(check)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({}, False), ({"memory_note": "it takes 9 GB"}, True), ({"outcome": Outcome.DIFFERS, "reason": "x"}, True)],
)
def test_doctor_shows_what_a_person_should_know(changes: dict[str, object], problem: bool) -> None:
    check: DeviceCheck = make_device_check(**changes)
    assert is_problem(check) is problem
    assert "torch 2.13.0" in headline(check)


def test_a_device_is_distrusted_while_its_newest_check_with_this_torch_differs(tmp_path: Path) -> None:
    own = {"machine": records.machine_id(), "reason": "x"}
    assert records.distrusted(None, "2.13.0") == set()
    for number, changes in enumerate(
        (
            {"device": "cuda", "outcome": Outcome.DIFFERS},
            {"device": "mps", "outcome": Outcome.DIFFERS},
            {"device": "mps", "way": "another"},  # newer, and it agrees
            {"device": "xpu", "outcome": Outcome.DIFFERS, "torch": "2.9"},
            {"device": "npu", "outcome": Outcome.OUT_OF_MEMORY},
        )
    ):
        check = make_device_check(**{**own, **changes})
        records.save(tmp_path, check)
        os.utime(DataPaths(tmp_path).device_checks / f"{check.key.digest}.json", (number, number))
    assert records.distrusted(tmp_path, "2.13.0") == {"cuda"}
