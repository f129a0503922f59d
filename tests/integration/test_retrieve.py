"""`generate(retrieve=true)` through the real inference worker with a tiny model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.errors import InferenceError, InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.schemas.dataset import Example, Segment
from tests.tiny_models import write_tiny_adapter, write_tiny_base

NAME = "20260101-000000-abcdef"
CODE = {"store.py": "def open_store(path): ...\n", "web.py": "def send(url): ...\n"}
PROMPT = {"prompt": "open_store(", "max_new_tokens": 4, "retrieve": True}


@pytest.fixture
async def manager(data_dir: Path, tmp_path: Path) -> AsyncIterator[PEFTManager]:
    """A manager with an adapter of the project 'web', and the dataset of its job."""
    settings = Settings(data_dir=data_dir, log_level="WARNING")
    write_tiny_adapter(settings.paths.adapter("web", NAME), write_tiny_base(tmp_path / "base"), 0)
    settings.paths.current("web").symlink_to(NAME)
    dataset = settings.paths.job(NAME).dataset
    dataset.mkdir(parents=True)
    examples = [
        Example(
            segments=(Segment(text=text, literal=True),), path=path, language="python", kind="function", start_line=3
        )
        for path, text in CODE.items()
    ]
    (dataset / "train.jsonl").write_text("".join(f"{example.model_dump_json()}\n" for example in examples))
    (dataset / "manifest.json").write_text(json.dumps({"dataset": {"summary": {"sha256": ""}}}))
    async with PEFTManager(settings) as opened:
        yield opened


async def test_similar_code_precedes_the_prompt_and_the_answer_says_which(manager: PEFTManager, tmp_path: Path) -> None:
    await manager.load_adapter("web", str(tmp_path / "base"))
    found, plain = await manager.generate(PROMPT), await manager.generate({**PROMPT, "retrieve": False})
    assert found.retrieved is not None
    assert [unit.path for unit in found.retrieved.units] == ["store.py"]
    assert found.retrieved.searched_units == len(CODE)
    assert found.prompt_tokens == plain.prompt_tokens + found.retrieved.tokens
    assert plain.retrieved is None

    question = [{"role": "user", "content": "What does send do?"}]
    chat = await manager.generate({"messages": question, "max_new_tokens": 4, "retrieve": True})
    assert chat.retrieved is not None
    assert [unit.path for unit in chat.retrieved.units] == ["web.py"]
    assert chat.prompt_tokens > chat.retrieved.tokens

    nothing = await manager.generate({**PROMPT, "prompt": "zebra"})
    assert nothing.retrieved is not None
    assert nothing.retrieved.units == ()
    assert "nothing was added" in nothing.retrieved.note

    with pytest.raises(InferenceError, match="begins with a special token, so it is a template"):
        await manager.generate({**PROMPT, "prompt": "<end>open_store("})

    with pytest.raises(InferenceError, match="no matching unit fits") as caught:
        await manager.generate({**PROMPT, "max_new_tokens": 4096})
    assert caught.value.code == "prompt_too_long_to_retrieve"


async def test_the_base_model_alone_takes_the_code_of_a_named_project(manager: PEFTManager, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no adapter is active"):
        await manager.generate(PROMPT, use_base=True)
    await manager.load_adapter(
        str(write_tiny_adapter(tmp_path / "foreign", tmp_path / "base", 1)), str(tmp_path / "base")
    )
    with pytest.raises(InvalidArgument, match="not trained on this machine") as caught:
        await manager.generate(PROMPT)
    assert caught.value.code == "no_retrieval_index"
    found = await manager.generate(PROMPT, adapter_path="web", use_base=True)
    assert found.adapter_path is None
    assert found.retrieved is not None
    assert [unit.path for unit in found.retrieved.units] == ["store.py"]
    assert Path(found.retrieved.adapter_path).name == NAME
