"""In every process below a data directory whose parent holds `point.json`: do the deed that it names at its kill point.

Python imports this module automatically if its directory is in PYTHONPATH. The product knows nothing of it. A kill point is
before or after the `count`-th call of a function of the product (`module`, `function`), and the deed is real: a signal to
the process itself, a stop (while the test acts), a call that does not return, or exhausted memory under a real limit. It is
done once, in one process: the file `mark` says which.
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
    """Take all memory under the limit, so that later allocations really fail."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)  # kept, so that the test can raise the limit again
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
    if point["deed"] == "memory":
        out_of_memory()
    elif point["deed"] == "hang":  # this thread only
        threading.Event().wait()
    else:
        os.kill(os.getpid(), signal.Signals[point["deed"]])


class Finder(MetaPathFinder):
    """Changes a module right after it is imported."""

    module: str

    def change(self, module: Any) -> None:
        raise NotImplementedError

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
    """Makes a server start the runner with the small worker."""

    module = "peft_core.jobs.supervisor"

    def change(self, module: Any) -> None:
        module.RUNNER = [sys.executable, "-P", "-m", "tests.survival.runner"]


class AtThePoint(Finder):
    """Wraps the function of the kill point."""

    def __init__(self, point: dict[str, Any]) -> None:
        self.module = point["module"]
        self.point = point
        self.calls = 0
        self.lock = threading.Lock()

    def change(self, module: Any) -> None:
        *owners, name = self.point["function"].split(".")
        holder = functools.reduce(getattr, owners, module)
        original = getattr(holder, name)

        def due() -> bool:
            with self.lock:
                self.calls += 1
                return bool(self.calls == self.point["count"])

        @functools.wraps(original)
        def at_the_point(*args: Any, **kwargs: Any) -> Any:
            is_due = due()
            if is_due and self.point["when"] == "before":
                act(self.point)
            result = original(*args, **kwargs)
            if is_due and self.point["when"] == "after":
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
