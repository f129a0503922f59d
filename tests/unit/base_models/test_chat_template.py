"""Where a base model's chat template comes from: planning and workers must agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_core.base_models.huggingface import chat_templates
from peft_core.base_models.resolve import resolve
from peft_core.base_models.tokenizer import load_tokenizer
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError
from tests.model_files import write_model
from tests.tiny_models import write_tiny_tokenizer

TEMPLATE = "{{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
SOURCES: dict[str, tuple[dict[str, object], str | None]] = {
    "a string in tokenizer_config.json": ({"tokenizer_config.json": {"chat_template": TEMPLATE}}, TEMPLATE),
    "a default among several": ({"tokenizer_config.json": {"chat_template": NAMED}}, TEMPLATE),
    "no default among several": ({"tokenizer_config.json": {"chat_template": NAMED[:1]}}, None),
    "malformed entries": (
        {"tokenizer_config.json": {"chat_template": ["x", {"name": "default", "template": 1}]}},
        None,
    ),
    "an empty string": ({"tokenizer_config.json": {"chat_template": ""}}, None),
    "chat_template.jinja": ({"chat_template.jinja": TEMPLATE}, TEMPLATE),
    "chat_template.json": ({"chat_template.json": {"chat_template": TEMPLATE}}, TEMPLATE),
    "chat_template.json without a template": ({"chat_template.json": {}}, None),
    "chat_template.jinja before the others": (
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "other"}},
        TEMPLATE,
    ),
}


def write_files(directory: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        if name == "tokenizer_config.json" and isinstance(content, dict):
            content = json.loads((directory / name).read_text()) | content  # noqa: PLW2901
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


@pytest.mark.parametrize(("files", "expected"), SOURCES.values(), ids=SOURCES)
def test_planning_and_tokenizer_find_the_same_chat_template(
    tmp_path: Path, files: dict[str, object], expected: str | None
) -> None:
    base = write_model(tmp_path / "base")
    write_tiny_tokenizer(base, chat_template=None)
    write_files(base, files)
    assert resolve(str(base), Settings()).has_chat_template == (expected is not None)
    assert load_tokenizer(base).turns.template.sources.default == expected


def test_an_unreadable_chat_template_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BaseCheckpointError, match=r"chat_template\.jinja cannot be read"):
        chat_templates(tmp_path)
