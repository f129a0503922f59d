"""Relative paths, as a tool receives them from a client with and without roots, in both protocol eras."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from mcp.client import Client
from mcp.client.session import ClientRequestContext
from mcp.server.mcpserver import Context
from mcp.types import INTERNAL_ERROR, CallToolResult, ErrorData, ListRootsResult, Root, TextContent
from pydantic import BaseModel, FileUrl

from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.schemas.training import TrainingConfig
from server.app import PEFTServer
from server.tools import make_tool
from tests.clients import text_of

NO_CONFIG = TrainingConfig()


class Received(BaseModel):
    arguments: dict[str, Any]


async def show(
    ctx: Context[Any, Any],
    training_data: str | list[dict[str, Any]] | None = None,
    adapter_path: str | None = None,
    output_path: str | None = None,
    base_model: str | None = None,
    config: TrainingConfig = NO_CONFIG,
) -> Annotated[CallToolResult, Received]:
    """Return the arguments that are left."""
    received = Received(
        arguments={
            "training_data": training_data,
            "adapter_path": adapter_path,
            "output_path": output_path,
            "base_model": base_model,
            "config": {
                "base_model": config.base_model,
                "more_sources": config.more_sources,
                "continue_from": config.continue_from,
            },
        }
    )
    return CallToolResult(
        content=[TextContent(type="text", text="shown")], structured_content=received.model_dump(mode="json")
    )


async def call(era: str, roots: Sequence[Path] | ErrorData | None, **arguments: Any) -> CallToolResult:
    async def list_roots(_: ClientRequestContext) -> ListRootsResult | ErrorData:
        if isinstance(roots, ErrorData):
            return roots
        return ListRootsResult(roots=[Root(uri=FileUrl(path.as_uri())) for path in roots or ()])

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[PEFTManager]:
        yield PEFTManager(Settings(data_dir="/none"))

    callback = None if roots is None else list_roots
    server = PEFTServer([make_tool(show, "Show")], lifespan=lifespan)
    async with Client(server, mode=era, list_roots_callback=callback) as client:
        return await client.call_tool("show", arguments)


async def received(era: str, roots: Sequence[Path] | None, **arguments: Any) -> dict[str, Any]:
    result = await call(era, roots, **arguments)
    assert not result.is_error, text_of(result)
    assert result.structured_content is not None
    return {name: result.structured_content["arguments"][name] for name in arguments}


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    """Two roots, one with a blank in its name; `src` is in both, `docs` in the first, `my lib` in the second."""
    first, second = tmp_path / "web shop", tmp_path / "api"
    for directory in (first / "src", first / "docs", second / "src", second / "my lib"):
        directory.mkdir(parents=True)
    return [first, second]


async def test_a_relative_path_is_looked_for_in_the_roots(era: str, roots: list[Path]) -> None:
    assert await received(era, roots, training_data="docs") == {"training_data": str(roots[0] / "docs")}
    assert await received(era, roots, training_data=" './my lib' ") == {"training_data": str(roots[1] / "my lib")}
    assert await received(era, roots[:1], training_data=".") == {"training_data": str(roots[0])}


async def test_a_path_that_is_in_two_roots_is_refused_with_both(era: str, roots: list[Path]) -> None:
    result = await call(era, roots, training_data="src")
    assert result.is_error
    for place in (roots[0] / "src", roots[1] / "src"):
        assert str(place)[-20:] in text_of(result)
    assert "training_data = 'src'" in text_of(result)
    assert "must be absolute" in text_of(result)


async def test_one_directory_that_is_reached_through_two_roots_is_not_ambiguous(era: str, roots: list[Path]) -> None:
    link = roots[0].parent / "link"
    link.symlink_to(roots[0])
    (given,) = (await received(era, [roots[0], link], training_data="src")).values()
    assert Path(given).samefile(roots[0] / "src")


async def test_a_relative_path_in_no_root_is_refused_with_the_roots(era: str, roots: list[Path]) -> None:
    result = await call(era, roots, training_data="nope")
    assert result.is_error
    assert "must be absolute, or exist in one of these roots" in text_of(result)
    assert "web shop" in text_of(result)


async def test_a_path_that_is_not_in_the_only_root_is_left_to_the_tool(era: str, roots: list[Path]) -> None:
    assert await received(era, roots[:1], training_data="nope") == {"training_data": str(roots[0] / "nope")}
    assert await received(era, roots[:1], training_data="../x") == {"training_data": str(roots[0] / "../x")}


async def test_answers_do_not_tell_whether_a_private_file_exists(
    roots: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(roots[0]))
    (roots[0] / ".ssh").mkdir()
    (roots[0] / ".ssh" / "key_a").write_text("secret")
    (roots[1] / "link").symlink_to(roots[0] / ".ssh")
    for listed, place in ((roots, ".ssh"), (roots, "link"), ([roots[0] / "src", roots[1]], "../.ssh")):
        answers = {await answer(listed, f"{place}/{name}") for name in ("key_a", "key_b")}
        assert len(answers) == 1, answers


async def answer(roots: Sequence[Path], path: str) -> str:
    result = await call("legacy", roots, training_data=path)
    return f"{text_of(result)} {result.structured_content}".replace(path.rpartition("/")[2], "key")


@pytest.mark.parametrize(
    "unlisted", [None, [], ErrorData(code=INTERNAL_ERROR, message="no")], ids=["undeclared", "none", "error"]
)
async def test_without_roots_a_relative_path_is_refused_even_if_it_exists_where_the_server_runs(
    roots: list[Path], monkeypatch: pytest.MonkeyPatch, unlisted: Sequence[Path] | ErrorData | None
) -> None:
    monkeypatch.chdir(roots[0])
    for arguments in (
        {"training_data": "src"},
        {"output_path": "out"},
        {"adapter_path": "./src"},
        {"base_model": "./src"},
        {"config": {"more_sources": ["docs"]}},
    ):
        result = await call("legacy", unlisted, **arguments)
        assert result.is_error, arguments
        assert "must be absolute" in text_of(result)
        assert len(text_of(result)) < 400


async def test_paths_inside_config_are_resolved_too(era: str, roots: list[Path]) -> None:
    given = {"base_model": "./docs", "more_sources": ["/elsewhere", "my lib"]}
    expected = {"base_model": str(roots[0] / "docs"), "more_sources": ["/elsewhere", str(roots[1] / "my lib")]}
    assert await received(era, roots, config=given) == {"config": {**expected, "continue_from": None}}


async def test_the_adapter_to_continue_from_may_be_a_relative_path_or_a_project(era: str, roots: list[Path]) -> None:
    for given, expected in (("docs/web", str(roots[0] / "docs" / "web")), ("web", "web"), ("none", "none")):
        (roots[0] / "docs" / "web").mkdir(exist_ok=True)
        shown = await received(era, roots, config={"continue_from": given})
        assert shown["config"]["continue_from"] == expected


async def test_a_new_directory_is_created_in_the_only_root(era: str, roots: list[Path]) -> None:
    assert await received(era, roots[:1], output_path="out/gguf") == {"output_path": str(roots[0] / "out/gguf")}
    result = await call(era, roots, output_path="out/gguf")
    assert result.is_error
    assert "could mean" in text_of(result)


NAMES = {"adapter_path": "web", "base_model": "org/model"}
UNTOUCHED: list[dict[str, Any]] = [
    NAMES,
    {"adapter_path": "org/adapter", "base_model": "ollama:qwen2.5-coder:1.5b"},
    {"training_data": "/code/web", "output_path": "~/out"},
    {"training_data": "file:///code/web"},
    {"training_data": [{"text": "x"}]},
]


@pytest.mark.parametrize("arguments", UNTOUCHED, ids=str)
async def test_names_absolute_paths_and_records_stay_as_they_are(
    era: str, roots: list[Path], arguments: dict[str, Any]
) -> None:
    assert await received(era, None, **arguments) == arguments
    assert await received(era, roots, **arguments) == arguments


async def test_a_name_with_a_slash_is_a_path_if_a_root_has_it(era: str, roots: list[Path]) -> None:
    (roots[0] / "org" / "model").mkdir(parents=True)
    expected = str(roots[0] / "org" / "model")
    given = {"adapter_path": "org/model", "base_model": "org/model"}
    assert await received(era, roots, **given) == {"adapter_path": expected, "base_model": expected}


@pytest.mark.parametrize("name", ["org/model", "model"])
async def test_a_base_model_that_only_exists_where_the_server_runs_is_refused(
    roots: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    result = await call("legacy", roots, base_model=name)
    assert result.is_error
    assert "must be absolute" in text_of(result)


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("https://github.com/me/web", "git clone"),
        ("C:\\Users\\me\\web", "/mnt/c/Users/me/web"),
        ("org/data", "hf download --repo-type dataset org/data"),
    ],
)
async def test_what_is_no_path_of_this_machine_is_answered_with_what_to_do(given: str, advice: str) -> None:
    result = await call("legacy", None, training_data=given)
    assert result.is_error
    assert advice in text_of(result)


@pytest.mark.parametrize("text", ["a" * 300 + "/b", "a/" * 3000, "\ud800/b", "./\ud800", "a\0b/c"], ids=ascii)
async def test_texts_that_no_file_can_have_as_a_path_are_answered_like_any_other(roots: list[Path], text: str) -> None:
    for field in ("training_data", "adapter_path", "output_path", "base_model"):
        for listed in (None, roots[:1], roots):
            result = await call("2026-07-28", listed, **{field: text})
            assert not result.is_error or "cannot be used" in text_of(result), (field, text_of(result))
