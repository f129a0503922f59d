"""The recommendation as an assistant gets it, from the real server; no training runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_core.system.lock import FileLock
from tests.model_files import write_gguf
from tests.survival.wire import Server, server

FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CODER = "~/.lmstudio/models/org/coder/tiny-coder-Q8_0.gguf"
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME", "LLAMA_CACHE")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("code") / "web"
    repository.mkdir()
    for file in range(4):
        functions = [
            f"def add_{n}(left, right):\n    return left * {n} + right\n" for n in range(16 * file, 16 * file + 16)
        ]
        (repository / f"add_{file}.py").write_text("\n\n".join(functions))
    return repository


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose queue no runner works on, in a home with a model for code."""
    root = tmp_path_factory.mktemp("recommend")
    write_gguf(root / "home" / CODER.removeprefix("~/"), FIM, name="Tiny Coder")
    data_dir = root / "data"
    data_dir.mkdir()
    environment = {"HOME": str(root / "home"), **dict.fromkeys(CACHES, "")}
    with FileLock(data_dir / "runner.lock") as lock:
        assert lock.acquire()
        with server(data_dir, cwd=root, **environment) as client:
            while client.call("recommend_base")["structuredContent"].get("not_examined"):
                pass  # on a busy machine, one call does not suffice to read all headers
            yield client


def text_of(result: dict[str, Any]) -> str:
    return str(result["content"][0]["text"])


def test_the_answer_ranks_the_bases_with_reasons_and_the_next_call(client: Server) -> None:
    result = client.call("recommend_base")
    answer = result["structuredContent"]
    assert [base["base_model"] for base in answer["candidates"]] == [CODER, "bundled"]
    assert answer["next_step"]["arguments"] == {"config": {"base_model": CODER}}
    assert "download" not in answer
    lines = text_of(result).splitlines()
    assert lines[1].startswith(f"1. {CODER}: a model for code, with fill-in-the-middle; ")
    assert lines[2].startswith(
        "2. bundled (SmolLM2-135M-Instruct): a general model by its name, without fill-in-the-middle; "
    )


def test_a_training_on_the_default_mentions_the_better_base_in_its_first_answer_only(
    client: Server, repository: Path
) -> None:
    started = client.call("train_adapter", project_id="web", training_data=str(repository))
    hint = started["structuredContent"]["better_base"]
    assert hint.startswith(f"{CODER} on this machine suits code better than the default")
    assert hint in text_of(started)
    assert "Base model: SmolLM2-135M-Instruct on" in text_of(started)
    followed = client.call("get_training_status", project_id="web", wait_s=0)
    assert CODER not in str(followed)
    named = client.call(
        "train_adapter", project_id="named", training_data=str(repository), config={"base_model": "bundled"}
    )
    assert "better_base" not in named["structuredContent"]
    for_project = client.call("recommend_base", project_id="web")["structuredContent"]
    assert for_project["estimated_for"].endswith(" examples of web")
    assert for_project["next_step"]["arguments"]["training_data"] == str(repository)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"project_id": "wbe"}, "no project 'wbe'"),
        ({"project_id": "../web"}, "project_id = '../web' cannot be used"),
        ({"training_data": "/no/such/place"}, "no such file or directory exists"),
        ({"training_data": "src"}, "the path must be absolute"),
        ({"training_data": "/etc"}, "belongs to the operating system"),
        ({"base_model": "bundled"}, "Known: project_id, training_data"),
    ],
)
def test_wrong_input_is_refused_with_the_field_and_what_to_do(
    client: Server, repository: Path, arguments: dict[str, str], said: str
) -> None:
    client.call("train_adapter", project_id="web", training_data=str(repository))
    result = client.call("recommend_base", **arguments)
    assert result["isError"]
    assert said in text_of(result)
    assert len(text_of(result)) < 400
