"""llama.cpp as the engine of `generate`: the same text as PEFT, for every adapter, whatever was generated before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import psutil
import pytest

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import AdapterNotLoaded, InferenceError, InvalidArgument
from peft_core.inference.worker import llama_model
from peft_core.inference.worker.models import encode
from peft_core.manager import PEFTManager
from peft_core.schemas.generation import GenerationRequest
from server.format_results import format_loaded
from tests.integration.test_inference_worker import worker_pid
from tests.tiny_models import write_byte_level_tokenizer, write_tiny_adapter, write_tiny_base

FIM = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
REQUESTS = [
    {"prompt": "def f", "max_new_tokens": 24},
    {"messages": [{"role": "user", "content": "abc"}], "max_new_tokens": 12},
    {"prefix": "ab", "suffix": "cd", "max_new_tokens": 12},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
    write_byte_level_tokenizer(directory, FIM)
    return str(directory)


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("adapters")
    return [str(write_tiny_adapter(place / name, Path(base), seed)) for seed, name in enumerate("abc")]


@pytest.fixture
async def manager(data_dir: Path) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(Settings(data_dir=data_dir, log_level="WARNING")) as opened:
        yield opened


async def test_both_engines_write_the_same_texts(data_dir: Path, adapters: list[str], base: str) -> None:
    texts: dict[str, list[tuple[str, str | None]]] = {}
    for engine in ("torch", "llamacpp"):
        async with PEFTManager(Settings(data_dir=data_dir)) as manager:
            for adapter in adapters[:2]:
                loaded = await manager.load_adapter(adapter, base, engine=engine)
                assert (loaded.engine, loaded.engine_reason) == (engine, "it was asked for")
                assert loaded.effect is not None
                assert loaded.effect.max_logit_change > 0.01
                for request in REQUESTS:
                    answer = await manager.generate({**request, "compare_with_base": True})
                    assert answer.engine == engine
                    texts.setdefault(engine, []).append((answer.text, answer.base_text))
    assert texts["torch"] == texts["llamacpp"]
    assert all(text != base_text for text, base_text in texts["torch"][:3])


async def test_llama_cpp_is_chosen_on_a_cpu_and_kept_for_the_next_adapter(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    loaded = await manager.load_adapter(adapters[0], base)
    assert (loaded.engine, loaded.how) == ("llamacpp", "cold")
    text = format_loaded(loaded).content[0].text  # type: ignore[union-attr]
    assert "Computed in llama.cpp: it generates several times faster than torch on a CPU." in text
    assert (await manager.load_adapter(adapters[1], base)).how == "warm"
    assert (await manager.load_adapter(adapters[1], base, engine="torch")).how == "cold"
    assert (await manager.load_adapter(adapters[1], base)).how == "switched"


async def test_adapters_do_not_see_the_cache_of_each_other(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    alone = []
    for adapter in adapters:
        await manager.load_adapter(adapter, base)
        alone.append((await manager.generate(REQUESTS[0])).text)
    alone.append((await manager.generate(REQUESTS[0], use_base=True)).text)
    assert len(set(alone)) == 4
    for which in (3, 0, 0, 2, 1, 3, 2, 0):
        answer = await manager.generate(
            REQUESTS[0], adapter_path=adapters[which] if which < 3 else None, use_base=which == 3
        )
        assert answer.text == alone[which]
    await manager.unload_adapter(adapters[1])
    assert (await manager.generate(REQUESTS[0], adapter_path=adapters[2])).text == alone[2]
    await manager.load_adapter(adapters[1], base)
    assert (await manager.generate(REQUESTS[0])).text == alone[1]


async def test_a_stop_text_a_limit_and_a_seed_are_respected(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    await manager.load_adapter(adapters[0], base)
    whole = await manager.generate(REQUESTS[0])
    assert (whole.completion_tokens, whole.finish_reason) == (24, "length")
    stop = whole.text[5:7]
    stopped = await manager.generate({**REQUESTS[0], "stop": [stop]})
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    sampled = [(await manager.generate({**REQUESTS[0], "temperature": 1.0, "seed": seed})).text for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


async def test_a_cancelled_generation_ends_and_does_not_affect_the_next(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    await manager.load_adapter(adapters[0], base)
    expected = (await manager.generate(REQUESTS[0])).text
    with anyio.CancelScope() as scope:

        async def leave(_done: float, _total: float | None, _message: str) -> None:
            scope.cancel()

        await manager.generate({"prompt": "x", "max_new_tokens": 2000, "temperature": 1.0}, on_progress=leave)
    assert scope.cancelled_caught
    assert (await manager.generate(REQUESTS[0])).text == expected


async def test_a_killed_process_is_reported_and_replaced(manager: PEFTManager, adapters: list[str], base: str) -> None:
    await manager.load_adapter(adapters[0], base)
    expected = (await manager.generate(REQUESTS[0])).text
    process = psutil.Process(worker_pid(manager))
    process.kill()
    with anyio.fail_after(30):
        # asyncio must reap it: waiting for it here would take its exit code away.
        while process.is_running():  # noqa: ASYNC110 -- nothing signals it
            await anyio.sleep(0.05)
    with pytest.raises((InferenceError, AdapterNotLoaded), match=r"SIGKILL|load_adapter"):
        await manager.generate(REQUESTS[0])
    await manager.load_adapter(adapters[0], base)
    assert (await manager.generate(REQUESTS[0])).text == expected


async def test_llama_cpp_is_refused_for_a_base_model_that_it_cannot_run(manager: PEFTManager, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "base")  # its tokenizer is none that llama.cpp has
    adapter = write_tiny_adapter(tmp_path / "adapter", other, 1)
    with pytest.raises(InferenceError, match="engine = 'llamacpp' cannot be used") as caught:
        await manager.load_adapter(str(adapter), str(other), engine="llamacpp")
    assert caught.value.code == "engine_unavailable"
    loaded = await manager.load_adapter(str(adapter), str(other))
    assert loaded.engine == "torch"
    assert "tokenizer is not converted" in loaded.engine_reason


async def test_a_prompt_beyond_the_context_is_refused(manager: PEFTManager, adapters: list[str], base: str) -> None:
    await manager.load_adapter(adapters[0], base)
    with pytest.raises(InferenceError, match="context of base has 256 tokens"):
        await manager.generate({"prompt": "x" * 300})


def test_the_error_about_a_prompt_that_only_llama_cpp_does_not_take_names_its_limit_and_the_other_engine(
    monkeypatch: pytest.MonkeyPatch, data_dir: Path, base: str
) -> None:
    monkeypatch.setattr(llama_model, "MAX_CONTEXT", 128)
    resolved = resolve(base, Settings(data_dir=data_dir))
    model = llama_model.LlamaModel.load(resolved, data_dir, "it was asked for", lambda _: None)
    with pytest.raises(InvalidArgument, match=r"llama\.cpp is started with 128 of the 256 tokens") as caught:
        encode(GenerationRequest(prompt="x" * 200), model)
    assert "engine='torch'" in str(caught.value)
    with pytest.raises(InvalidArgument, match="the context of base has 256 tokens") as caught:
        encode(GenerationRequest(prompt="x" * 300), model)
    assert "torch" not in str(caught.value)
