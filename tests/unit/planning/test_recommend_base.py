"""Which base models of this machine are recommended, with what reason, and what is said of the others."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.planning import local_bases, recommend_base, target
from peft_core.planning.cost_model import MeasuredRun, flops_per_token
from peft_core.planning.known_bases import KNOWN_BASES
from peft_core.planning.recommend_base import better_base
from peft_core.schemas.recommendation import BaseRecommendation
from peft_core.schemas.training import ContinuedAdapter, DataSelection, TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_base, make_request, make_source
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes, write_cached, write_gguf, write_model

FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CODER = "~/.lmstudio/models/org/coder/tiny-coder-Q8_0.gguf"
LIMITS = Settings()


def no_run(_: str) -> None:
    return None


def recommended(
    training_data: str | None = None,
    *,
    settings: Settings = LIMITS,
    speed: float | None = 1000.0,
    newest: Callable[[str], MeasuredRun | None] = no_run,
) -> BaseRecommendation:
    return recommend_base.recommend_base(training_data, DataSelection(), settings, lambda *_: speed, newest)


def write_coder(home: Path) -> None:
    write_gguf(home / ".lmstudio" / "models" / "org" / "coder" / "tiny-coder-Q8_0.gguf", FIM, name="Tiny Coder")


def test_a_model_for_code_with_fill_in_the_middle_comes_before_the_larger_chat_model(home: Path) -> None:
    write_coder(home)
    first, second = recommended().candidates
    assert (first.base_model, second.base_model) == (CODER, "bundled")
    assert (first.code_model, first.fill_in_the_middle, second.code_model) == (True, True, False)
    assert second.parameters > first.parameters
    assert first.reason == "a model for code, with fill-in-the-middle"
    assert first.basis == "speed of your last run on this base and device"
    assert first.steps == 450  # 900 of 1000 examples twice, 4 at a time
    assert first.seconds is not None
    assert 423 < first.seconds < 700  # 1800 examples of 235 tokens at 1000 tokens a second, and two measurements


def test_at_most_three_are_recommended_and_copies_of_a_model_are_named_beside_the_most_precise(
    home: Path, tmp_path: Path
) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    write_cached(hub, "org/tiny-coder", "0" * 40, write_model(tmp_path / "f32", dtype="F32"))
    write_cached(hub, "org/tiny-coder-bf16", "1" * 40, write_model(tmp_path / "bf16", dtype="BF16"))
    for number in range(3):
        write_cached(
            hub, f"org/chat-{number}", str(number + 2) * 40, write_model(tmp_path / f"{number}", fill=number + 1)
        )
    answer = recommended()
    assert len(answer.candidates) == 3
    assert (answer.candidates[0].base_model, answer.candidates[0].same_model) == (
        "org/tiny-coder",
        ["org/tiny-coder-bf16"],
    )


def test_what_cannot_be_trained_is_named_with_its_reason_briefly_and_models_for_code_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = gguf_bytes(GGUF_METADATA | {"general.architecture": (TEXT, "mamba")})
    for number in range(7):
        path = home / ".cache" / "llama.cpp" / f"chat{number}.gguf"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(other)
    (home / ".cache" / "llama.cpp" / "zcoder\x1b[31m.gguf").write_bytes(other)
    (home / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    monkeypatch.setattr(recommend_base, "_REASON_CHARACTERS", 60)
    answer = recommended()
    assert answer.unusable[0].base_model.startswith("~/.cache/llama.cpp/zcoder")
    assert len(answer.unusable) == 5
    assert answer.omitted == 3
    assert "its architecture is 'mamba'" in answer.unusable[0].reason
    assert all(len(base.reason) <= 60 for base in answer.unusable)
    assert "ada" not in answer.model_dump_json()


def test_a_directory_without_tokenizer_json_is_not_recommended(home: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    write_cached(home / ".cache" / "huggingface" / "hub", "org/tiny-coder", "0" * 40, model)
    (unusable,) = recommended().unusable
    assert (unusable.base_model, unusable.reason) == ("org/tiny-coder", "it has no tokenizer.json")


def test_a_model_too_large_for_this_machine_is_named_with_figures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_bases, "device_memory_bytes", lambda _: 10**8)
    answer = recommended()
    assert answer.candidates == []
    assert answer.next_step is None
    (bundled,) = answer.unusable
    assert "GB of memory; this machine has 0.1 GB" in bundled.reason
    assert answer.download is None
    assert "none can be stored, fits into its memory" in answer.note


def test_a_base_that_does_not_fit_into_the_free_memory_comes_later_and_says_so(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coder(home)
    tiny = {base.base_model: base.memory_bytes for base in recommended().candidates}[CODER]
    monkeypatch.setattr(target, "available_memory_bytes", lambda: tiny)
    first, second = recommended().candidates
    assert (first.base_model, second.base_model) == (CODER, "bundled")
    assert "GB of memory, and" in second.reason
    assert "GB of memory, and" not in first.reason


def test_a_model_for_code_that_two_hours_hardly_train_comes_after_the_bundled_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coder(home)

    def speed(base: Any, _: str) -> float:
        return 1.0 if "coder" in str(base.path) else 1000.0

    first, second = recommend_base.recommend_base(None, DataSelection(), LIMITS, speed, no_run).candidates
    assert (first.base_model, second.base_model) == ("bundled", CODER)
    assert second.steps < 100
    assert "too slow for this machine: the default limit of time ends its training after 3 %" in second.reason


def test_the_users_own_limit_of_steps_speaks_against_no_base(home: Path) -> None:
    write_coder(home)
    first = recommended(settings=Settings(max_training_steps=20)).candidates[0]
    assert (first.base_model, first.steps) == (CODER, 20)
    assert first.reason == "a model for code, with fill-in-the-middle"


def test_the_speed_of_another_base_model_is_scaled_by_size(home: Path) -> None:
    write_coder(home)
    run = MeasuredRun("SmolLM2-135M-Instruct", SMOLLM2_SHAPE, 500.0)
    coder = recommended(speed=None, newest=lambda _: run).candidates[0]
    assert coder.base_model == CODER
    assert coder.basis == "by size, from the speed of your last run on this device, with SmolLM2-135M-Instruct"
    shape = resolve(CODER, LIMITS).shape
    tokens_per_second = 500.0 * SMOLLM2_SHAPE.parameters / shape.parameters
    assert flops_per_token(SMOLLM2_SHAPE) / flops_per_token(shape) == pytest.approx(tokens_per_second / 500.0)
    assert coder.seconds == pytest.approx(15 + 250_000 / tokens_per_second, rel=0.05)


def test_time_is_estimated_for_the_given_code(home: Path, tmp_path: Path) -> None:
    code = tmp_path / "web"
    code.mkdir()
    for number in range(30):
        text = "".join(f"def f{number}_{i}(value):\n    return value + {i}\n\n\n" for i in range(6))
        (code / f"m{number}.py").write_text(text)
    answer = recommended(str(code))
    assert answer.estimated_for.startswith("about ")
    assert answer.estimated_for.endswith(" examples of web")
    assert answer.candidates[0].seconds != recommended().candidates[0].seconds
    assert answer.next_step is not None
    assert answer.next_step.arguments == {"training_data": str(code), "config": {"base_model": "bundled"}}
    assert recommended(str(code), settings=Settings(allowed_roots=(tmp_path,))).estimated_for == answer.estimated_for
    with pytest.raises(InvalidArgument, match="allowed_roots"):
        recommended(str(code), settings=Settings(allowed_roots=(home,)))


def test_conversations_need_a_chat_template(home: Path, tmp_path: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    write_cached(hub, "org/tiny-coder", "0" * 40, write_model(tmp_path / "model"))
    chats = tmp_path / "chats.jsonl"
    turn = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}\n'
    chats.write_text("".join(turn % (number, number) for number in range(60)))
    answer = recommended(str(chats))
    assert [base.base_model for base in answer.candidates] == ["bundled"]
    assert "no chat template" in answer.unusable[0].reason


def test_without_a_model_for_code_the_largest_suitable_one_is_worth_downloading(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_bases, "device_memory_bytes", lambda _: 10**12)
    monkeypatch.setattr(target, "available_memory_bytes", lambda: 10**12)
    monkeypatch.setattr(recommend_base, "_free_disk_bytes", lambda: 10**12)
    largest = recommended().download
    assert largest is not None
    assert (largest.base_model, largest.licence) == ("Qwen/Qwen2.5-Coder-14B", "Apache-2.0")
    assert largest.command == "hf download Qwen/Qwen2.5-Coder-14B"
    monkeypatch.setattr(target, "usable_cores", lambda: 2)
    monkeypatch.setattr(target, "cpu_multiplies_bfloat16", lambda: False)
    slow = recommended(speed=None).download
    assert slow is not None
    assert slow.base_model == "Qwen/Qwen2.5-Coder-0.5B"  # two hours are 67 steps with 1.5B on two cores
    assert "rule of thumb for 2 CPU cores" in slow.basis
    monkeypatch.setattr(target, "available_memory_bytes", lambda: 3 * 10**9)
    small = recommended().download
    assert small is not None
    assert small.base_model == "Qwen/Qwen2.5-Coder-0.5B"
    monkeypatch.setattr(recommend_base, "_free_disk_bytes", lambda: 10**9)
    full = recommended()
    assert full.download is None
    assert full.note
    write_coder(home)
    assert (recommended().download, recommended().note) == (None, "")


def test_the_known_models_have_the_published_numbers_of_parameters() -> None:
    published = {"0.5B": 0.49, "1.5B": 1.54, "7B": 7.61, "14B": 14.7}  # billions, from their model cards
    for known in KNOWN_BASES:
        base = known.described()
        billions = base.shape.parameters / 1e9
        assert billions == pytest.approx(published[known.hub_id.rpartition("-")[2]], rel=0.01)
        assert base.size_bytes == 2 * base.shape.parameters


def test_thirty_models_take_less_than_two_seconds(home: Path, tmp_path: Path) -> None:
    hub = home / ".cache" / "huggingface" / "hub"
    recommended()  # what is imported, and the bundled one
    for number in range(30):
        model = write_model(tmp_path / "model", fill=number)
        write_cached(hub, f"org/coder-{number}", f"{number:040x}", model)
        shutil.rmtree(model)
    started = time.process_time()
    assert recommended().not_examined == 0
    assert time.process_time() - started < 2


def test_what_is_not_read_in_time_is_counted_and_models_for_code_are_read_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_coder(home)
    for number in range(3):
        write_gguf(home / ".lmstudio" / "models" / "a" / "chat" / f"{number}.gguf")
    seconds = iter(range(100))
    monkeypatch.setattr(local_bases, "MAX_SECONDS", 1.5)
    monkeypatch.setattr(local_bases, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    answer = recommended()
    assert [base.base_model for base in answer.candidates] == [CODER, "bundled"]
    assert (answer.not_examined, answer.unusable) == (3, [])


# -- beside the answer of train_adapter --------------------------------------------------------------------------------


def hint(config: TrainingConfig | None = None, settings: Settings = LIMITS, **draft: Any) -> str:
    request = make_request(**{"base": make_base(), "found": make_source(), "device": "cpu", **draft})
    return better_base(request, config or TrainingConfig(), settings, lambda *_: 1000.0, no_run)


def test_a_clearly_better_base_is_one_sentence_beside_the_default(home: Path) -> None:
    assert hint() == ""
    write_coder(home)
    sentence = hint()
    assert sentence.startswith(
        f"{CODER} on this machine suits code better than the default (a model for code, with fill-in-the-middle; its training "
        "takes about "
    )
    assert sentence.endswith(": set config.base_model to use it, or call recommend_base to compare.")
    assert len(sentence) < 400


def test_nothing_is_said_where_the_choice_was_made(home: Path, tmp_path: Path) -> None:
    write_coder(home)
    continued = ContinuedAdapter(adapter_path=tmp_path, adapter_id="a", weights_sha256="0" * 64)
    assert hint(TrainingConfig(base_model="bundled")) == ""
    assert hint(settings=Settings(default_base_model="bundled")) == ""
    assert hint(continued=continued) == ""


def test_a_larger_chat_model_is_not_clearly_better(home: Path, tmp_path: Path) -> None:
    write_cached(home / ".cache" / "huggingface" / "hub", "org/chat", "0" * 40, write_model(tmp_path / "model"))
    assert hint() == ""
