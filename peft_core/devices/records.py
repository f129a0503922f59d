"""The results of checks in the data directory, one small file for each `DeviceKey`."""

from __future__ import annotations

import hashlib
import platform
import re
from pathlib import Path

from peft_core.errors import HeaderError
from peft_core.paths import DataPaths
from peft_core.schemas.device_check import DeviceCheck, DeviceKey, Outcome
from peft_core.system.files import atomic_write, read_small

_MAX_BYTES = 64 << 10
_MOST_RECORDS = 50  # each version of torch or of a driver adds some
_PATH = re.compile(r"\S*[/\\]\S*")


def machine_id() -> str:
    """Identify this machine among those that share the data directory, without naming it."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:12]


def without_paths(text: str) -> str:
    """Return an error's text for a report that may be sent: whatever looks like a path is replaced."""
    return _PATH.sub("…", text)


def save(data_dir: Path, check: DeviceCheck) -> None:
    """Write the record, in place of an older one with the same key.

    Raises:
        OSError: it cannot be written.
    """
    directory = DataPaths(data_dir).device_checks
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / f"{check.key.digest}.json", check.model_dump_json(indent=2) + "\n")
    for old in sorted(directory.glob("*.json"), key=_age, reverse=True)[_MOST_RECORDS:]:
        old.unlink(missing_ok=True)


def load(data_dir: Path) -> list[DeviceCheck]:
    """Return all records, the newest first. Other files are ignored."""
    paths = DataPaths(data_dir).device_checks.glob("*.json")
    found = (_read(path) for path in sorted(paths, key=_age, reverse=True)[:_MOST_RECORDS])
    return [check for check in found if check is not None]


def load_own(data_dir: Path) -> list[DeviceCheck]:
    """Return the records of this machine, the newest first."""
    return [check for check in load(data_dir) if check.key.machine == machine_id()]


def is_known(data_dir: Path, key: DeviceKey) -> bool:
    """Return whether the device has been checked with this key and agreed.

    Every other outcome is checked again by the next training: another program may have held the memory, and hardware that
    failed once may be repaired.
    """
    check = _read(DataPaths(data_dir).device_checks / f"{key.digest}.json")
    return check is not None and check.key == key and check.outcome is Outcome.AGREES


def distrusted(data_dir: Path | None, torch: str) -> set[str]:
    """Return the devices of this machine whose newest check with this torch found that they differ from the CPU."""
    newest: dict[str, DeviceCheck] = {}
    for check in load_own(data_dir) if data_dir is not None else ():
        if check.key.torch == torch:
            newest.setdefault(check.key.device, check)
    return {device for device, check in newest.items() if check.outcome is Outcome.DIFFERS}


def _read(path: Path) -> DeviceCheck | None:
    try:
        return DeviceCheck.model_validate_json(read_small(path, _MAX_BYTES), extra="ignore")
    except (HeaderError, ValueError):
        return None


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process has just deleted it
        return 0.0
