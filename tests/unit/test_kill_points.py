"""The kill points of the survival tests: comments in the product that can be compiled into calls."""

from __future__ import annotations

import re
from pathlib import Path

from tests.survival.kill_points import (
    EXPORT_WORKER,
    INFERENCE_WORKER,
    REAL_WORKER,
    ROOT,
    RUNNER,
    SERVER,
    SMALL_WORKER,
    kill_points_in,
)

EVERY = [*SERVER, *RUNNER, *REAL_WORKER, *INFERENCE_WORKER, *SMALL_WORKER, *EXPORT_WORKER]
MENTION = re.compile(r"#.*kill-point")


def test_every_process_has_kill_points() -> None:
    assert len(SERVER) >= 7
    assert len(RUNNER) >= 16
    assert len(REAL_WORKER) >= 20
    assert len(SMALL_WORKER) >= 16
    assert len(EXPORT_WORKER) == 4
    assert {point.tool for point in INFERENCE_WORKER} == {"load_adapter", "generate", "unload_adapter"}


def test_every_comment_that_mentions_a_kill_point_has_the_right_form() -> None:
    for path in [*(ROOT / "peft_core").rglob("*.py"), *(ROOT / "server").rglob("*.py")]:
        mentioned = len(MENTION.findall(path.read_text()))
        assert mentioned == len(kill_points_in(str(path.relative_to(ROOT)))), path


def test_a_marker_names_one_place_only() -> None:
    places = [(point.module, point.marker) for point in {*EVERY}]
    assert len(places) == len({*places})
    for point in EVERY:
        lines = [line.strip() for line in source_of(point.module).splitlines()]
        assert lines.count(point.marker) == 1, point


def test_a_call_in_the_place_of_a_marker_compiles() -> None:
    for point in {*EVERY}:
        source = source_of(point.module)
        (line,) = (line for line in source.splitlines() if line.strip() == point.marker)
        call = line.replace(point.marker, "reached()")
        compile(source.replace(line, call), point.module, "exec", dont_inherit=True)


def source_of(module: str) -> str:
    return Path(ROOT, *module.split(".")).with_suffix(".py").read_text()
