"""The prompts: they name tools and arguments that exist, and quote what the person gave."""

from __future__ import annotations

import re
from typing import Any

import pytest
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.prompts import Prompt

from server.app import TOOLS
from server.prompts import PROMPTS

GIVEN = {"path": "/code/web shop", "project_id": "web", "file": "src/app.py:12"}
CALL = re.compile(r"\b([a-z]+(?:_[a-z]+)*)\(([^)]*)\)")
ARGUMENT = re.compile(r"(\w+)=")


async def render(prompt: Prompt, arguments: dict[str, str]) -> str:
    context: Context[Any, Any] = Context()
    messages = await prompt.render(arguments, context)
    assert isinstance(messages, list)
    (message,) = messages
    assert message.role == "user"
    return message.content.text  # type: ignore[union-attr]


def given_for(prompt: Prompt) -> dict[str, str]:
    return {argument.name: GIVEN[argument.name] for argument in prompt.arguments or []}


def named(name: str) -> Prompt:
    return next(prompt for prompt in PROMPTS if prompt.name == name)


def test_the_prompts_take_these_arguments() -> None:
    arguments = {prompt.name: {a.name: a.required for a in prompt.arguments or []} for prompt in PROMPTS}
    assert arguments == {
        "train_and_evaluate": {"path": True, "project_id": False},
        "complete_with_adapter": {"project_id": True, "file": True},
        "clean_up": {},
    }


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)
async def test_a_prompt_names_only_tools_and_arguments_that_exist(prompt: Prompt) -> None:
    schemas = {tool.name: set(tool.parameters["properties"]) for tool in TOOLS}
    calls = CALL.findall(await render(prompt, given_for(prompt)))
    assert len(calls) >= 3
    for tool, arguments in calls:
        assert set(ARGUMENT.findall(arguments)) <= schemas[tool], tool


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt.name)
async def test_a_prompt_contains_what_the_person_gave(prompt: Prompt) -> None:
    given = given_for(prompt)
    text = await render(prompt, given)
    for value in given.values():
        assert repr(value) in text


async def test_training_without_a_project_id_uses_the_name_of_the_directory() -> None:
    text = await render(named("train_and_evaluate"), {"path": "/code/web"})
    assert "Project id: the name of the directory" in text


@pytest.mark.parametrize("path", ["", "x" * 5000])
async def test_a_path_without_text_or_without_end_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="train_and_evaluate"):
        await render(named("train_and_evaluate"), {"path": path})
