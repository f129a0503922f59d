"""Makes a process act at the kill point that a test has armed.

Python imports this module by itself when its directory is in PYTHONPATH. A process whose working directory is at or below a
directory with a file `point.json` reads there which kill point (see `kill_points.py`) is armed, and what to do when it is
reached: send itself a signal, stop (so that the test can act meanwhile), hang, or take all memory under a real limit. The
comment that marks the kill point is replaced by a call when its module is compiled; the product itself has no hook. The
action is taken once, by one process: the file `mark` says by which.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType
from typing import Any

HOARD: list[bytes] = []


def take_all_memory() -> None:
    """Allocate everything below the current size as the limit: the next allocations really fail."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)  # stays as it is: the test may lift the soft limit later
    resource.setrlimit(resource.RLIMIT_AS, (size, hard_limit))
    for step in (1 << 20, 1 << 12, 1 << 7):
        try:
            while True:
                HOARD.append(bytes(step))
        except MemoryError:
            pass


def act(point: dict[str, Any]) -> None:
    mark = Path(point["mark"])
    try:
        mark.with_suffix(".taken").touch(exist_ok=False)
    except OSError:
        return  # another process was first, or the test is over
    draft = mark.with_suffix(".draft")
    draft.write_text(str(os.getpid()))
    draft.rename(mark.with_suffix(".reached"))
    if point["action"] == "memory":
        take_all_memory()
    elif point["action"] == "hang":  # only this thread hangs
        threading.Event().wait()
    else:
        os.kill(os.getpid(), signal.Signals[point["action"]])


class ArmedPoint:
    """Counts how often the process passes the armed kill point."""

    def __init__(self, point: dict[str, Any]) -> None:
        self._point = point
        self._passes = 0
        self._lock = threading.Lock()

    def passed(self) -> None:
        with self._lock:
            self._passes += 1
            is_due = self._passes == self._point["count"]
        if is_due:
            act(self._point)


class KillPointLoader(SourceFileLoader):
    """Compiles a module with a call in the place of the comment that marks the armed kill point."""

    def __init__(self, name: str, path: str, marker: str) -> None:
        super().__init__(name, path)
        self._marker = marker

    def get_code(self, fullname: str) -> CodeType:
        lines = Path(self.path).read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines):
            if line.strip() == self._marker:
                indent = line[: len(line) - len(line.lstrip())]
                lines[number] = f"{indent}__import__('sitecustomize').ARMED.passed()"
        return compile("\n".join(lines), self.path, "exec", dont_inherit=True)


class KillPointFinder(MetaPathFinder):
    """Finds the module of the armed kill point, once, and gives it the loader above."""

    def __init__(self, point: dict[str, Any]) -> None:
        self._module = point["module"]
        self._marker = point["marker"]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.origin is not None:
            spec.loader = KillPointLoader(name, spec.origin, self._marker)
        return spec


class SmallRunnerFinder(MetaPathFinder):
    """Makes a server start the runner of the survival tests, whose child is small."""

    module = "peft_core.jobs.supervisor"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.RUNNER = [sys.executable, "-P", "-m", "tests.survival.runner"]

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def read_armed_point() -> dict[str, Any] | None:
    working_directory = Path.cwd()
    for directory in (working_directory, *list(working_directory.parents)[:4]):
        try:
            point: dict[str, Any] = json.loads((directory / "point.json").read_text())
        except OSError:
            continue
        return point
    return None


if (armed := read_armed_point()) is not None:
    ARMED = ArmedPoint(armed)
    sys.meta_path.insert(0, KillPointFinder(armed))
sys.meta_path.insert(0, SmallRunnerFinder())
