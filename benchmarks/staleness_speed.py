"""How long does it take to say how far the code has moved on since an adapter was trained?

A directory is copied into a git repository, a snapshot is taken of it as a training does, and files are edited in commits. Then
the comparison is timed. CPU seconds include the git processes.

    python benchmarks/staleness_speed.py [--code PATH ...]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from peft_core.data import git
from peft_core.data.snapshot import SNAPSHOT_FILE_NAME, Snapshot, SourceState, read_snapshot, state_of, write_snapshot
from peft_core.data.walk import walk
from peft_core.schemas.dataset import DataSource, SourceKind
from peft_core.schemas.staleness import Staleness
from peft_core.staleness.repository import staleness_of

SHARES = (0.0, 0.05, 0.3, 1.0)  # of the files that are edited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", nargs="+", default=["sympy", "transformers/models"], help="relative to site-packages")
    print("| code | files | MB | snapshot kB | files edited | CPU s | wall s | answer |")
    print("|---|---|---|---|---|---|---|---|")
    for code in parser.parse_args().code:
        with tempfile.TemporaryDirectory() as directory:
            measure(code, Path(directory))


def measure(code: str, directory: Path) -> None:
    root = directory / "code"
    shutil.copytree(
        Path(sysconfig.get_paths()["purelib"]) / code, root, ignore=shutil.ignore_patterns("*.so*", "lib", "bin")
    )
    run(root, "init", "-q")
    commit(root)
    files = walk(root).files
    state = SourceState(commit=git.head_state(root)[0], dirty=False)
    states = [known for file in files if (known := state_of(file)) is not None]
    write_snapshot(directory / SNAPSHOT_FILE_NAME, Snapshot(sources=(state,), files=tuple(states)))
    edited = 0
    for share in SHARES:
        for file in files[edited : round(share * len(files))]:
            path = Path(file.path)
            path.write_bytes(path.read_bytes() + b"\n\nedited = True\n")
        edited = round(share * len(files))
        commit(root)
        began, cpu = time.perf_counter(), cpu_seconds()
        found = compare(directory, root)
        size = sum(file.size for file in files) / 1e6
        packed = (directory / SNAPSHOT_FILE_NAME).stat().st_size / 1e3
        print(
            f"| {code} | {len(files)} | {size:.0f} | {packed:.0f} | {edited} | {cpu_seconds() - cpu:.2f} | "
            f"{time.perf_counter() - began:.2f} | {found.text.partition('. ')[0]} |",
            flush=True,
        )


def compare(directory: Path, root: Path) -> Staleness:
    snapshot = read_snapshot(directory)
    assert snapshot is not None
    return staleness_of(snapshot, [DataSource(path=root, kind=SourceKind.REPOSITORY)])


def commit(root: Path) -> None:
    run(root, "add", "-A")
    run(root, "-c", "user.name=A", "-c", "user.email=a@example.com", "commit", "-q", "--allow-empty", "-m", "Change")


def run(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


if __name__ == "__main__":
    main()
