"""Finished runs of the proof are only reused for the same code base, steps and base model."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from benchmarks.proof import project_of
from peft_core.schemas.training import ProjectId

DEEP = "a-directory-whose-name-alone-takes-more-than-the-sixty-characters-of-an-id/src"


def test_every_code_base_duration_and_base_model_has_a_project_of_its_own(tmp_path: Path):
    runs = [
        ("mcp/server", None, None),
        ("mcp/server", 100, None),
        ("mcp/server", None, "org/base-a"),
        ("mcp/server", None, "org/base-b"),
        ("mcp-server", None, None),
        (str(tmp_path / "one" / DEEP), None, None),
        (str(tmp_path / "two" / DEEP), None, None),
    ]
    assert len({project_of(*run) for run in runs}) == len(runs)
    assert project_of(*runs[0]) == project_of(*runs[0])


@pytest.mark.parametrize("code_base", ["mcp/server", f"/{DEEP}", "/a b/.hidden..dir", "/проект"])
def test_the_project_of_a_code_base_is_a_valid_id(code_base: str):
    TypeAdapter(ProjectId).validate_python(project_of(code_base, None, None))


def test_the_end_of_the_path_can_be_read_in_the_project():
    assert project_of("huggingface_hub/cli", 100, None).startswith("huggingface_hub-cli-")
