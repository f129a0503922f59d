"""The real model in both engines: the same greedy text."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.manager import PEFTManager

pytestmark = pytest.mark.model


async def test_llama_cpp_generates_the_text_of_peft(trained: Path) -> None:
    texts = {}
    for engine in ("torch", "llamacpp"):
        async with PEFTManager(Settings(data_dir=trained)) as manager:
            loaded = await manager.load_adapter("wsgiref", engine=engine)
            assert loaded.engine == engine
            answer = await manager.generate({"prompt": "class Handler:\n    def", "max_new_tokens": 64})
            assert answer.completion_tokens > 10
            texts[engine] = answer.text
    assert texts["llamacpp"] == texts["torch"]
