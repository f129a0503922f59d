"""The inference worker's answers to requests, on tiny models: numerics against PEFT, failed loads and cancellation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import AdapterNotLoaded, DataError, InvalidArgument
from peft_core.inference.protocol import Generate, Load, Unload, WorkerConfig
from peft_core.inference.worker.handlers import RequestHandler
from peft_core.inference.worker.torch_model import first_stop
from peft_core.modeling import adapter_model as model_module
from peft_core.modeling.device import Machine, choose
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import ChatMessage, Generation, GenerationRequest
from peft_core.schemas.results import BaseMatch, LoadedAdapter, UnloadedAdapter
from tests.factories import record_base
from tests.tiny_models import VOCABULARY, tiny_model, write_tiny_adapter, write_tiny_base

WEIGHTS = "adapter_model.safetensors"
HELLO = {"prompt": "def f", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def base(base_directory: Path) -> Base:
    return resolve(str(base_directory), Settings())


@pytest.fixture(scope="module")
def adapters(base_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [write_tiny_adapter(place / name, base_directory, seed) for seed, name in enumerate("abc")]


@pytest.fixture
def handler(tmp_path: Path) -> RequestHandler:
    return new_handler(tmp_path)


def new_handler(place: Path, keep: int = 3) -> RequestHandler:
    config = WorkerConfig(base_models_dir=place, max_resident_adapters=keep, idle_s=60)
    return RequestHandler(config, choose("cpu", Machine()))


def ignore_progress(_done: float, _total: float | None, _message: str) -> None:
    """Ignore progress."""


def load(handler: RequestHandler, path: Path, base: Base, **options: Any) -> LoadedAdapter:
    result = handler.answer(Load(adapter_path=path, base=base, **options), ignore_progress)
    assert isinstance(result, LoadedAdapter)
    return result


def unload(handler: RequestHandler, path: Path | None = None) -> UnloadedAdapter:
    result = handler.answer(Unload(adapter_path=path), ignore_progress)
    assert isinstance(result, UnloadedAdapter)
    return result


def generate(
    handler: RequestHandler,
    adapter: Path | None = None,
    *,
    without_adapter: Base | None = None,
    report: Callable[[float, float | None, str], None] = ignore_progress,
    **request: Any,
) -> Generation:
    command = Generate(
        request=GenerationRequest(**(request or HELLO)), adapter_path=adapter, without_adapter=without_adapter
    )
    result = handler.answer(command, report)
    assert isinstance(result, Generation)
    return result


def loaded_paths(handler: RequestHandler) -> list[str]:
    return [Path(adapter.adapter_path).name for adapter in handler.resident.adapters]


# -- load ----------------------------------------------------------------------------------------------------------


def test_a_load_returns_the_measured_effect_of_the_adapter(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    result = load(handler, adapters[0], base)
    assert (result.status, result.how, result.verdict) == ("loaded", "cold", BaseMatch.SAMPLED)
    assert result.effect is not None
    assert result.effect.unmatched_keys == 0
    assert result.effect.max_logit_change > 0.1
    assert result.adapter_path == str(adapters[0])
    assert handler.resident.base_model == base.name


def test_switching_back_to_a_resident_adapter_gives_the_same_text(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    first = generate(handler).text
    assert load(handler, adapters[1], base).how == "warm"
    second = generate(handler).text
    assert load(handler, adapters[0], base).how == "switched"
    assert generate(handler).text == first != second


def test_generated_tokens_equal_those_of_plain_peft(
    handler: RequestHandler, adapters: list[Path], base: Base, base_directory: Path
) -> None:
    load(handler, adapters[1], base)
    load(handler, adapters[0], base)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_directory), str(adapters[0]))
    ids_1T = torch.tensor([[VOCABULARY.index(character) for character in "def f"]])
    written_1T = reference.generate(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    expected = [VOCABULARY[token] for token in written_1T[0, 5:] if token > 2]  # without special tokens
    assert generate(handler).text.replace(" ", "") == "".join(expected).replace(" ", "")


def test_an_adapter_whose_files_changed_is_loaded_again(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", base_directory, seed=1)
    load(handler, adapter, base)
    before = generate(handler).text
    write_tiny_adapter(adapter, base_directory, seed=2)
    assert load(handler, adapter, base).how == "warm"
    assert generate(handler).text != before
    assert len(handler.resident.adapters) == 1


def test_the_least_recently_used_adapter_is_evicted_first(tmp_path: Path, adapters: list[Path], base: Base) -> None:
    handler = new_handler(tmp_path, keep=2)
    load(handler, adapters[0], base)
    load(handler, adapters[1], base)
    generate(handler, adapters[0])
    result = load(handler, adapters[2], base)
    assert result.evicted == [str(adapters[1])]
    assert loaded_paths(handler) == ["a", "c"]
    assert generate(handler).adapter_path == str(adapters[2])


def test_unloading_all_adapters_restores_the_base_bit_for_bit(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    before = generate(handler, without_adapter=base).text
    assert handler._cache.model is not None
    weights = {name: parameter.clone() for name, parameter in handler._cache.model.resident.causal.named_parameters()}
    for adapter in adapters:
        load(handler, adapter, base)
    for adapter in adapters[:2]:
        unload(handler, adapter)
    handler._cache.remove(adapters[2])
    assert generate(handler, without_adapter=base).text == before
    after = dict(handler._cache.model.resident.causal.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_no_parameter_requires_gradients(handler: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(handler, adapters[0], base)
    load(handler, adapters[1], base)
    load(handler, adapters[0], base)
    assert handler._cache.model is not None
    assert not any(parameter.requires_grad for parameter in handler._cache.model.resident.causal.parameters())


def test_bf16_weights_patterns_and_rslora_give_the_logits_of_peft(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(
        tmp_path / "x",
        base_directory,
        seed=3,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"down_proj": 32},
        use_rslora=True,
        layers_to_transform=[1],
    )
    bf16_tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(bf16_tensors, adapter / WEIGHTS)
    record_base(adapter, base)
    result = load(handler, adapter, base)
    assert result.status == "loaded", result.reasons
    assert handler._cache.model is not None
    ids_1T = handler._cache.model.resident.probe_1T
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_directory), str(adapter))
    with torch.inference_mode():
        torch.testing.assert_close(handler._cache.model.resident.causal(ids_1T).logits, reference(ids_1T).logits)


# -- failed loads --------------------------------------------------------------------------------------------------


def test_after_a_failed_first_load_the_base_answers(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    zero = write_tiny_adapter(tmp_path / "zero", base_directory, seed=1, scale=0)
    result = load(handler, zero, base)
    assert (result.status, result.adapter_path) == ("fallback", None)
    assert [reason.code for reason in result.reasons] == ["b_all_zero"]
    assert result.reason
    assert "without adapter" in result.next
    assert generate(handler).adapter_path is None


def test_a_failed_load_keeps_the_active_adapter(
    handler: RequestHandler, adapters: list[Path], base: Base, base_directory: Path, tmp_path: Path
) -> None:
    load(handler, adapters[0], base)
    before = generate(handler).text
    zero = write_tiny_adapter(tmp_path / "zero", base_directory, seed=1, scale=0)
    result = load(handler, zero, base)
    assert (result.status, result.adapter_path) == ("fallback", str(adapters[0]))
    assert generate(handler).text == before


def test_an_adapter_without_effect_is_rejected_although_its_files_are_sound(
    handler: RequestHandler, adapters: list[Path], base: Base, base_directory: Path, tmp_path: Path
) -> None:
    """A is zero and B is not: headers and weights pass the check, but the product is zero."""
    adapter = write_tiny_adapter(tmp_path / "inert", base_directory, seed=1)
    tensors = {
        name: torch.zeros_like(tensor) if "lora_A" in name else tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, adapter / WEIGHTS)
    record_base(adapter, base)
    load(handler, adapters[0], base)
    result = load(handler, adapter, base)
    assert result.status == "fallback"
    assert "no effect" in (result.reason or "")
    assert loaded_paths(handler) == ["a"]
    assert generate(handler).adapter_path == str(adapters[0])


def test_an_adapter_whose_weights_overflow_is_rejected(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "huge", base_directory, seed=1, scale=1e38)
    result = load(handler, adapter, base)
    assert result.status == "fallback"
    assert "NaN" in (result.reason or "")


def test_a_load_that_fails_halfway_leaves_nothing_behind(
    handler: RequestHandler, adapters: list[Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(handler, adapters[0], base)
    before = generate(handler).text

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "set_peft_model_state_dict", fail)
        with pytest.raises(MemoryError):
            load(handler, adapters[1], base)
    assert loaded_paths(handler) == ["a"]
    assert generate(handler).text == before
    assert load(handler, adapters[1], base).status == "loaded"


def test_a_first_load_that_fails_halfway_leaves_the_base_unchanged(
    handler: RequestHandler, adapters: list[Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = generate(handler, without_adapter=base).text

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "set_peft_model_state_dict", fail)
        with pytest.raises(RuntimeError):
            load(handler, adapters[0], base)
    assert generate(handler, without_adapter=base).text == before
    assert load(handler, adapters[0], base).status == "loaded"


@pytest.mark.parametrize("others", [0, 1])
def test_an_error_inside_peft_leaves_nothing_of_the_adapter_behind(
    handler: RequestHandler, adapters: list[Path], base: Base, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """PEFT replaces layers one by one; after an error some are replaced, and PEFT does not restore them."""
    before = generate(handler, without_adapter=base).text
    for adapter in adapters[:others]:
        load(handler, adapter, base)

    def fail_halfway(self: Any, *_: object, **__: object) -> None:
        raise ValueError("no such layer")

    with monkeypatch.context() as patch:
        patch.setattr("peft.tuners.lora.model.LoraModel._mark_only_adapters_as_trainable", fail_halfway)
        with pytest.raises(ValueError, match="no such layer"):
            load(handler, adapters[1], base)
    assert generate(handler, without_adapter=base).text == before
    assert load(handler, adapters[1], base).status == "loaded"
    assert loaded_paths(handler) == ["a", "b"][1 - others :]


def test_a_base_that_cannot_be_restored_raises_base_corrupted(
    handler: RequestHandler, adapters: list[Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(handler, without_adapter=base)

    def damage(model: Any, *_: object, **__: object) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        raise RuntimeError("halfway")

    monkeypatch.setattr(model_module, "set_peft_model_state_dict", damage)
    with pytest.raises(model_module.BaseCorrupted):
        load(handler, adapters[0], base)


def test_a_target_that_is_not_a_linear_layer_is_rejected_before_any_change(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    generate(handler, without_adapter=base)
    assert handler._cache.model is not None
    handler._cache.model.resident.causal.model.layers[0].mlp.down_proj = torch.nn.Identity()  # type: ignore[union-attr]
    result = load(handler, adapters[0], base)
    assert result.status == "fallback"
    assert "is a Identity, not a linear layer" in (result.reason or "")


def test_a_cancelled_load_changes_nothing(handler: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(handler, adapters[0], base)
    before = generate(handler).text

    class Cancelled(Exception):
        """The client cancelled the request."""

    def cancel(_done: float, _total: float | None, message: str) -> None:
        if message == "the adapter takes effect":
            raise Cancelled

    with pytest.raises(Cancelled):
        handler.answer(Load(adapter_path=adapters[1], base=base), cancel)
    assert loaded_paths(handler) == ["a"]
    assert generate(handler).text == before


def test_accepting_an_unproven_base_applies_to_one_load_only(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "foreign", base_directory, seed=1)
    (adapter / "adapter_manifest.json").unlink()
    assert load(handler, adapter, base, insist=True).status == "loaded"
    assert load(handler, adapter, base).status == "fallback"
    assert load(handler, adapter, base, insist=True).how == "switched"


def test_an_unproven_adapter_is_loaded_only_if_that_is_accepted(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "foreign", base_directory, seed=1)
    (adapter / "adapter_manifest.json").unlink()
    result = load(handler, adapter, base)
    assert (result.status, result.verdict) == ("fallback", BaseMatch.SHAPE_ONLY)
    assert "accept_unproven_base" in result.next
    result = load(handler, adapter, base, insist=True)
    assert (result.status, result.verdict) == ("loaded", BaseMatch.SHAPE_ONLY)


def test_accepting_an_unproven_base_does_not_override_errors(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "x", base_directory, seed=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 800}))
    result = load(handler, adapter, base, insist=True)
    assert result.status == "fallback"
    assert [reason.code for reason in result.reasons] == ["altered"]


def test_a_base_is_replaced_only_after_the_new_adapter_works(
    handler: RequestHandler, adapters: list[Path], base: Base, tmp_path: Path
) -> None:
    other_directory = write_tiny_base(tmp_path / "other")
    other_model = tiny_model()
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.mul_(1.5)
    other_model.save_pretrained(other_directory)
    other = resolve(str(other_directory), Settings())
    load(handler, adapters[0], base)
    assert load(handler, adapters[1], other).status == "fallback"
    assert (handler.resident.base_model, loaded_paths(handler)) == ("base", ["a"])
    mine = write_tiny_adapter(tmp_path / "mine", other_directory, seed=9)
    assert load(handler, mine, other).how == "cold"
    assert (handler.resident.base_model, loaded_paths(handler)) == ("other", ["mine"])


# -- unload --------------------------------------------------------------------------------------------------------


def test_unload_removes_the_active_adapter_and_the_base_with_the_last(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    load(handler, adapters[1], base)
    result = unload(handler)
    assert (result.adapter_path, result.base_unloaded) == (str(adapters[1]), False)
    assert str(adapters[0]) in result.next
    with pytest.raises(AdapterNotLoaded, match="No adapter is active"):
        generate(handler)
    result = unload(handler, adapters[0])
    assert (result.adapter_path, result.base_unloaded) == (str(adapters[0]), True)
    assert handler.holds_nothing
    assert unload(handler).status == "nothing_loaded"


def test_unloading_an_adapter_that_is_not_in_memory_is_an_error(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    with pytest.raises(AdapterNotLoaded, match=str(adapters[0])):
        unload(handler, adapters[1])
    assert loaded_paths(handler) == ["a"]


def test_unload_removes_a_base_without_adapters(handler: RequestHandler, base: Base) -> None:
    generate(handler, without_adapter=base)
    result = unload(handler)
    assert (result.status, result.adapter_path, result.base_unloaded) == ("unloaded", None, True)


# -- generate ------------------------------------------------------------------------------------------------------


def test_the_error_without_a_loaded_adapter_names_the_calls_to_make(handler: RequestHandler) -> None:
    with pytest.raises(AdapterNotLoaded, match="load_adapter") as caught:
        generate(handler)
    assert "use_base=true" in str(caught.value)


def test_using_the_base_applies_to_one_request_only(handler: RequestHandler, base: Base) -> None:
    assert generate(handler, without_adapter=base).adapter_path is None
    with pytest.raises(AdapterNotLoaded):
        generate(handler)


def test_a_comparison_gives_the_same_texts_as_separate_requests(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    alone, without = generate(handler).text, generate(handler, without_adapter=base).text
    both = generate(handler, **HELLO, compare_with_base=True)
    assert (both.text, both.base_text) == (alone, without)
    assert alone != without


def test_a_request_can_name_a_resident_adapter_that_is_not_active(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    first = generate(handler).text
    load(handler, adapters[1], base)
    assert generate(handler, adapters[0]).text == first
    assert generate(handler).adapter_path == str(adapters[1])
    with pytest.raises(AdapterNotLoaded, match="c is not in memory"):
        generate(handler, adapters[2])


def test_the_same_seed_gives_the_same_text(handler: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(handler, adapters[0], base)
    sampled = {"prompt": "x", "max_new_tokens": 30, "temperature": 1.5}
    texts = [generate(handler, **sampled, seed=seed).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_generation_ends_before_a_stop_text_and_at_the_limit(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    uncut = generate(handler, prompt="def f", max_new_tokens=12)
    assert (uncut.completion_tokens, uncut.finish_reason) == (12, "length")
    stop = uncut.text[4:7]
    cut = generate(handler, prompt="def f", max_new_tokens=12, stop=["never there", stop])
    assert cut.text == uncut.text[: uncut.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < 12
    assert cut.applied.stop == ["never there", stop]


def test_the_first_stop_text_in_the_output_counts() -> None:
    assert first_stop("one two three", ["three", "two"]) == 4
    assert first_stop("one", ["two"]) is None
    assert first_stop("one", []) is None


def test_an_end_token_ends_the_text_and_is_not_part_of_it(handler: RequestHandler, base: Base) -> None:
    generate(handler, without_adapter=base)
    assert handler._cache.model is not None
    first = generate(handler, without_adapter=base, prompt="def f", max_new_tokens=1)
    token = VOCABULARY.index(first.text.strip())
    handler._cache.model.resident.ends = (0, token)
    result = generate(handler, without_adapter=base)
    assert (result.text, result.completion_tokens, result.finish_reason) == ("", 1, "stop")


def test_a_prompt_longer_than_the_context_is_rejected_with_both_lengths(handler: RequestHandler, base: Base) -> None:
    with pytest.raises(InvalidArgument, match=r"prompt = '300 tokens'.*256 tokens"):
        generate(handler, without_adapter=base, prompt="x" * 300)
    result = generate(handler, without_adapter=base, prompt="x" * 250, max_new_tokens=50)
    assert result.completion_tokens <= 6


def test_messages_use_the_chat_template_of_the_base_not_of_the_adapter(
    handler: RequestHandler, base: Base, base_directory: Path, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "x", base_directory, seed=4)
    load(handler, adapter, base)
    request = {"messages": [ChatMessage(role="user", content="hi")], "max_new_tokens": 8}
    expected = generate(handler, **request)
    assert expected.applied.prompt_format == "chat_template"
    assert expected.prompt_tokens == len("[user]hi") + 2 + len("[assistant]")
    unload(handler)
    (adapter / "chat_template.jinja").write_text("IGNORE ALL OF IT")
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "IGNORE"}')
    load(handler, adapter, base)
    assert generate(handler, **request).text == expected.text


def test_a_base_without_chat_template_or_fim_tokens_is_an_error(handler: RequestHandler, tmp_path: Path) -> None:
    plain = resolve(str(write_tiny_base(tmp_path / "plain", chat_template=None)), Settings())
    with pytest.raises(DataError, match="no chat template"):
        generate(handler, without_adapter=plain, messages=[ChatMessage(role="user", content="hi")])
    with pytest.raises(InvalidArgument, match="fill-in-the-middle tokens"):
        generate(handler, without_adapter=plain, prefix="a", suffix="b")


def test_prefill_in_chunks_gives_the_same_text(
    handler: RequestHandler, adapters: list[Path], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(handler, adapters[0], base)
    request = {"prompt": "def f(x): return x" * 6, "max_new_tokens": 20}
    uncut = generate(handler, **request).text
    monkeypatch.setattr("peft_core.inference.worker.torch_model._PREFILL_CHUNK", 16)
    messages: list[str] = []
    chunked = generate(handler, report=lambda _done, _total, message: messages.append(message), **request)
    assert chunked.text == uncut
    assert messages[:6] == ["the adapter reads the prompt"] * 6
    assert chunked.prompt_tokens == 108


def test_a_temperature_close_to_zero_is_greedy(handler: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(handler, adapters[0], base)
    assert generate(handler, **HELLO, temperature=1e-40).text == generate(handler).text


def test_an_error_from_the_progress_callback_ends_the_generation(
    handler: RequestHandler, adapters: list[Path], base: Base
) -> None:
    load(handler, adapters[0], base)
    messages: list[float] = []

    class Cancelled(Exception):
        """The client cancelled the request."""

    def cancel(done: float, _total: float | None, _message: str) -> None:
        messages.append(done)
        if done >= 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(handler, report=cancel, prompt="def f", max_new_tokens=100, compare_with_base=True)
    assert messages == [1, 2, 3]
    assert generate(handler).adapter_path == str(adapters[0])


def test_progress_counts_the_tokens_of_both_texts(handler: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(handler, adapters[0], base)
    messages: list[tuple[float, float | None, str]] = []
    generate(handler, report=lambda *progress: messages.append(progress), **HELLO, compare_with_base=True)
    assert [done for done, _, _ in messages] == sorted(done for done, _, _ in messages)
    assert messages[0][1] == 24
    assert "by the adapter" in messages[0][2]
    assert "by the base" in messages[-1][2]
