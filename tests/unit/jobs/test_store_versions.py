"""The version of the database: it changes with every stored field, and other versions are refused."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from peft_core.errors import StorageError
from peft_core.jobs.state import Job
from peft_core.jobs.store import SCHEMA_VERSION, Store
from peft_core.schemas.events import EVENT
from tests.factories import make_job

# (version, hash of the stored fields). If this test fails, a released peft-mcp could not read what this one writes, or the
# reverse: raise SCHEMA_VERSION, migrate older databases, and put both numbers here. While the version is unreleased, only
# the hash changes.
PINNED = (4, "ce3161b385a4817b")


def fields_of(schema: Any) -> Any:
    """A JSON schema without the texts for people and without defaults: every field is stored with its value."""
    if isinstance(schema, list):
        return [fields_of(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {key: fields_of(part) for key, part in value.items()}
        if name in ("properties", "$defs")
        else fields_of(value)
        for name, value in schema.items()
        if name not in ("title", "description", "default", "advanced")
    }


def test_no_stored_field_changes_without_a_new_version() -> None:
    stored = [fields_of(Job.model_json_schema()), fields_of(EVENT.json_schema())]
    digest = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
    assert (SCHEMA_VERSION, digest) == PINNED


@pytest.mark.parametrize("version", [-1, 0, 1, SCHEMA_VERSION - 1])
def test_a_database_without_a_released_version_is_refused_with_what_to_do(tmp_path: Path, version: int) -> None:
    path = tmp_path / "peft.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    path.touch()
    with pytest.raises(StorageError, match="Move it away") as caught:
        Store(path, lambda: 0.0).latest("web")
    assert caught.value.code == "not_our_database"


def test_a_database_of_a_newer_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path / "peft.db", lambda: 0.0)
    store.create()
    store.insert(make_job("a"))
    with closing(sqlite3.connect(tmp_path / "peft.db")) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    for call in (lambda: store.latest("web"), lambda: store.insert(make_job("b"))):
        with pytest.raises(StorageError, match=r"newer peft-mcp.*[Uu]pgrade") as caught:
            call()
        assert caught.value.code == "newer_database"
