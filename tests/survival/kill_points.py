"""Kill points: the places in the product where the survival tests kill, stop or starve a process.

A kill point is a comment in the source, on a line of its own:

    # kill-point: runner: the adapter is published but not current
    # kill-point: runner: an event is about to be recorded (pass 3)
    # kill-point: inference worker, load_adapter: the base is loaded

It names the process that passes it, for the inference worker also the tool whose call is under way, and the state of the
job at this place. `(pass N)` means that the process acts when it passes for the N-th time. The product does nothing at a
kill point; `site/sitecustomize.py` turns the one comment that a test has armed into a call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARKER = re.compile(
    r"^ *# kill-point: (?P<process>server|runner|worker|inference worker|export worker)(?:, (?P<tool>\w+))?: "
    r"(?P<state>.+?)(?: \(pass (?P<count>\d+)\))?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class KillPoint:
    process: str  # the process that passes it
    tool: str | None  # inference worker only: the tool whose call is under way
    state: str  # of the job, for people
    count: int  # the pass at which the process acts, from 1
    module: str
    marker: str  # the comment, as the source has it

    def __str__(self) -> str:
        return f"{self.process}, {self.state}"


def kill_points_in(*places: str) -> list[KillPoint]:
    """The kill points in modules and packages, given as paths from the root of the repository."""
    files = [file for place in places for file in _sources(ROOT / place)]
    return [point for file in files for point in _points_of(file)]


def _sources(place: Path) -> Iterator[Path]:
    yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


def _points_of(file: Path) -> Iterator[KillPoint]:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for match in MARKER.finditer(file.read_text(encoding="utf-8")):
        yield KillPoint(
            process=match["process"],
            tool=match["tool"],
            state=match["state"],
            count=int(match["count"] or 1),
            module=module,
            marker=match[0].strip(),
        )


def point_named(points: list[KillPoint], state: str) -> KillPoint:
    """The one kill point with this state."""
    (point,) = (point for point in points if point.state == state)
    return point


_ALL = kill_points_in("peft_core", "server")
SERVER = [point for point in _ALL if point.process == "server"]
RUNNER = [point for point in _ALL if point.process == "runner"]
EXPORT_WORKER = [point for point in _ALL if point.process == "export worker"]
INFERENCE_WORKER = [point for point in _ALL if point.process == "inference worker"]
REAL_WORKER = [point for point in _ALL if point.process == "worker"]
# The small worker of `small_job.py` prepares its data and writes its manifest with the product's code.
SMALL_WORKER = [
    *kill_points_in("tests/survival/small_job.py"),
    *(point for point in kill_points_in("peft_core/data", "peft_core/adapters") if point.process == "worker"),
]
