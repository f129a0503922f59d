"""In every process below a data directory whose parent holds `point.json`: do what it says at the place it names.

Python imports this module by itself where its directory is in PYTHONPATH. The product knows nothing of it: the place is a
function of the product (`module`, `function`), before or after its `count`-th call, and what is done there is real: a signal
to the process itself, a stop (for the test to act meanwhile), a call that does not return, or all memory taken under a
real limit. It is done once, in
one process: the file `mark` says which.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import threading
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOARD: list[bytes] = []


def out_of_memory() -> None:
    """Take what there is under the limit; what comes next meets real failures to allocate."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # stays: the test may give the memory back
    resource.setrlimit(resource.RLIMIT_AS, (size, most))
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
    if point["deed"] == "memory":
        out_of_memory()
    elif point["deed"] == "hang":  # this thread; the others go on
        threading.Event().wait()
    else:
        os.kill(os.getpid(), signal.Signals[point["deed"]])


class Finder(MetaPathFinder):
    """Changes a module as soon as it is there."""

    module: str

    def change(self, module: Any) -> None:
        raise NotImplementedError  # each of the finders below has its own

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
            self.change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class SmallRunner(Finder):
    """Has a server start the runner of this room, whose child is small."""

    module = "peft_core.jobs.supervisor"

    def change(self, module: Any) -> None:
        module.RUNNER = [sys.executable, "-P", "-m", "tests.survival.runner"]


class AtThePoint(Finder):
    """Wraps the named function."""

    def __init__(self, point: dict[str, Any]) -> None:
        self.module = point["module"]
        self.point = point
        self.calls = 0
        self.lock = threading.Lock()

    def change(self, module: Any) -> None:
        *owners, name = self.point["function"].split(".")
        holder = functools.reduce(getattr, owners, module)
        plain = getattr(holder, name)

        def due() -> bool:
            with self.lock:
                self.calls += 1
                return bool(self.calls == self.point["count"])

        @functools.wraps(plain)
        def at_the_point(*args: Any, **kwargs: Any) -> Any:
            now = due()
            if now and self.point["when"] == "before":
                act(self.point)
            result = plain(*args, **kwargs)
            if now and self.point["when"] == "after":
                act(self.point)
            return result

        setattr(holder, name, at_the_point)


def arm() -> None:
    here = Path.cwd()
    for directory in (here, *list(here.parents)[:4]):
        try:
            point = json.loads((directory / "point.json").read_text())
        except OSError:
            continue
        sys.meta_path.insert(0, AtThePoint(point))
        return


arm()
sys.meta_path.insert(0, SmallRunner())
