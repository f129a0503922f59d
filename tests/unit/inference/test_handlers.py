"""What the inference host does with requests, on toy models: the algebra, the order of things, and PEFT's traps."""

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
from peft_core.inference.protocol import Generate, HostConfig, Load, Unload
from peft_core.inference.worker.generate import earliest
from peft_core.inference.worker.handlers import RequestHandler
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
def desk(tmp_path: Path) -> RequestHandler:
    return new_desk(tmp_path)


def new_desk(place: Path, keep: int = 3) -> RequestHandler:
    config = HostConfig(base_models_dir=place, max_resident_adapters=keep, idle_s=60)
    return RequestHandler(config, choose("cpu", Machine()))


def nobody_listens(_done: float, _total: float | None, _message: str) -> None:
    """A report without a reader."""


def load(desk: RequestHandler, path: Path, base: Base, **options: Any) -> LoadedAdapter:
    answer = desk.answer(Load(adapter_path=path, base=base, **options), nobody_listens)
    assert isinstance(answer, LoadedAdapter)
    return answer


def unload(desk: RequestHandler, path: Path | None = None) -> UnloadedAdapter:
    answer = desk.answer(Unload(adapter_path=path), nobody_listens)
    assert isinstance(answer, UnloadedAdapter)
    return answer


def generate(
    desk: RequestHandler,
    adapter: Path | None = None,
    *,
    without_adapter: Base | None = None,
    report: Callable[[float, float | None, str], None] = nobody_listens,
    **request: Any,
) -> Generation:
    wanted = Generate(
        request=GenerationRequest(**(request or HELLO)),
        adapter_path=adapter,
        without_adapter=without_adapter,
    )
    answer = desk.answer(wanted, report)
    assert isinstance(answer, Generation)
    return answer


def loaded_paths(desk: RequestHandler) -> list[str]:
    return [Path(adapter.adapter_path).name for adapter in desk.resident.adapters]


# -- load ----------------------------------------------------------------------------------------------------------


def test_a_load_answers_with_proof_of_the_effect(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    answer = load(desk, adapters[0], base)
    assert (answer.status, answer.how, answer.verdict) == ("loaded", "cold", BaseMatch.SAMPLED)
    assert answer.effect is not None
    assert answer.effect.unmatched_keys == 0
    assert answer.effect.max_logit_change > 0.1
    assert answer.adapter_path == str(adapters[0])
    assert desk.resident.base_model == base.name


def test_what_is_in_memory_is_switched_to_and_answers_as_before(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
) -> None:
    load(desk, adapters[0], base)
    first = generate(desk).text
    assert load(desk, adapters[1], base).how == "warm"
    second = generate(desk).text
    assert load(desk, adapters[0], base).how == "switched"
    assert generate(desk).text == first != second


def test_an_answer_is_plain_pefts_token_for_token(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    base_directory: Path,
) -> None:
    load(desk, adapters[1], base)
    load(desk, adapters[0], base)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_directory), str(adapters[0]))
    ids_1T = torch.tensor([[VOCABULARY.index(character) for character in "def f"]])
    written_1T = reference.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
    )
    expected = [VOCABULARY[token] for token in written_1T[0, 5:] if token > 2]  # no special ones
    assert generate(desk).text.replace(" ", "") == "".join(expected).replace(" ", "")


def test_files_that_have_changed_are_loaded_anew(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", base_directory, seed=1)
    load(desk, adapter, base)
    before = generate(desk).text
    write_tiny_adapter(adapter, base_directory, seed=2)
    assert load(desk, adapter, base).how == "warm"
    assert generate(desk).text != before
    assert len(desk.resident.adapters) == 1


def test_the_least_recently_used_goes_when_too_many_are_there(tmp_path: Path, adapters: list[Path], base: Base) -> None:
    desk = new_desk(tmp_path, keep=2)
    load(desk, adapters[0], base)
    load(desk, adapters[1], base)
    generate(desk, adapters[0])
    answer = load(desk, adapters[2], base)
    assert answer.evicted == [str(adapters[1])]
    assert loaded_paths(desk) == ["a", "c"]
    assert generate(desk).adapter_path == str(adapters[2])


def test_taking_adapters_off_restores_the_base_bit_for_bit(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
) -> None:
    before = generate(desk, without_adapter=base).text
    assert desk._residents.model is not None
    weights = {name: parameter.clone() for name, parameter in desk._residents.model.causal.named_parameters()}
    for adapter in adapters:
        load(desk, adapter, base)
    for adapter in adapters[:2]:
        unload(desk, adapter)
    desk._residents.take_off(adapters[2])
    assert generate(desk, without_adapter=base).text == before
    after = dict(desk._residents.model.causal.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_nothing_asks_for_gradients(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    load(desk, adapters[1], base)
    load(desk, adapters[0], base)
    assert desk._residents.model is not None
    assert not any(parameter.requires_grad for parameter in desk._residents.model.causal.parameters())


def test_sixteen_bit_weights_rank_and_alpha_patterns_and_rslora_mean_what_they_mean_to_peft(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
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
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(halves, adapter / WEIGHTS)
    record_base(adapter, base)
    answer = load(desk, adapter, base)
    assert answer.status == "loaded", answer.reasons
    assert desk._residents.model is not None
    ids_1T = desk._residents.model.probe_1T
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_directory), str(adapter))
    with torch.inference_mode():
        torch.testing.assert_close(desk._residents.model.causal(ids_1T).logits, reference(ids_1T).logits)


# -- loads that fail -----------------------------------------------------------------------------------------------


def test_where_nothing_was_active_the_base_answers(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    zero = write_tiny_adapter(tmp_path / "zero", base_directory, seed=1, scale=0)
    answer = load(desk, zero, base)
    assert (answer.status, answer.adapter_path) == ("fallback", None)
    assert [reason.code for reason in answer.reasons] == ["b_all_zero"]
    assert answer.reason
    assert "without adapter" in answer.next
    assert generate(desk).adapter_path is None


def test_what_was_active_stays_active(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    load(desk, adapters[0], base)
    before = generate(desk).text
    zero = write_tiny_adapter(tmp_path / "zero", base_directory, seed=1, scale=0)
    answer = load(desk, zero, base)
    assert (answer.status, answer.adapter_path) == ("fallback", str(adapters[0]))
    assert generate(desk).text == before


def test_an_adapter_that_the_check_cannot_see_through_is_found_out_by_its_missing_effect(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    """A is zero, B is not: headers and weights look sound, and the product is nothing."""
    adapter = write_tiny_adapter(tmp_path / "inert", base_directory, seed=1)
    tensors = {
        name: torch.zeros_like(tensor) if "lora_A" in name else tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, adapter / WEIGHTS)
    record_base(adapter, base)
    load(desk, adapters[0], base)
    answer = load(desk, adapter, base)
    assert answer.status == "fallback"
    assert "changes nothing" in (answer.reason or "")
    assert loaded_paths(desk) == ["a"]
    assert generate(desk).adapter_path == str(adapters[0])


def test_numbers_too_large_for_the_model_are_found_out_by_their_effect(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    adapter = write_tiny_adapter(tmp_path / "huge", base_directory, seed=1, scale=1e38)
    answer = load(desk, adapter, base)
    assert answer.status == "fallback"
    assert "NaN" in (answer.reason or "")


def test_nothing_is_left_of_a_load_that_breaks_half_way(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(desk, adapters[0], base)
    before = generate(desk).text

    def breaks(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "set_peft_model_state_dict", breaks)
        with pytest.raises(MemoryError):
            load(desk, adapters[1], base)
    assert loaded_paths(desk) == ["a"]
    assert generate(desk).text == before
    assert load(desk, adapters[1], base).status == "loaded"


def test_a_first_load_that_breaks_half_way_leaves_the_base_as_it_was(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = generate(desk, without_adapter=base).text

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "set_peft_model_state_dict", breaks)
        with pytest.raises(RuntimeError):
            load(desk, adapters[0], base)
    assert generate(desk, without_adapter=base).text == before
    assert load(desk, adapters[0], base).status == "loaded"


@pytest.mark.parametrize("others", [0, 1])
def test_nothing_is_left_of_an_adapter_that_peft_stops_at(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
    others: int,
) -> None:
    """PEFT replaces layers one by one: at an error some are replaced, and it has nothing to undo that with."""
    before = generate(desk, without_adapter=base).text
    for adapter in adapters[:others]:
        load(desk, adapter, base)

    def stops_half_way(self: Any, *_: object, **__: object) -> None:
        raise ValueError("no such layer")

    with monkeypatch.context() as patch:
        patch.setattr("peft.tuners.lora.model.LoraModel._mark_only_adapters_as_trainable", stops_half_way)
        with pytest.raises(ValueError, match="no such layer"):
            load(desk, adapters[1], base)
    assert generate(desk, without_adapter=base).text == before
    assert load(desk, adapters[1], base).status == "loaded"
    assert loaded_paths(desk) == ["a", "b"][1 - others :]


def test_a_base_that_is_not_restored_ends_the_process(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate(desk, without_adapter=base)

    def damages(model: Any, *_: object, **__: object) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        raise RuntimeError("half-way")

    monkeypatch.setattr(model_module, "set_peft_model_state_dict", damages)
    with pytest.raises(model_module.BaseCorrupted):
        load(desk, adapters[0], base)


def test_a_target_that_is_no_linear_layer_is_refused_before_anything_is_touched(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
) -> None:
    generate(desk, without_adapter=base)
    assert desk._residents.model is not None
    desk._residents.model.causal.model.layers[0].mlp.down_proj = torch.nn.Identity()  # type: ignore[union-attr]
    answer = load(desk, adapters[0], base)
    assert answer.status == "fallback"
    assert "no linear layer but a Identity" in (answer.reason or "")


def test_a_load_that_was_called_off_changes_nothing(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    before = generate(desk).text

    class Gone(Exception):
        """Nobody waits."""

    def leave(_done: float, _total: float | None, message: str) -> None:
        if message == "the adapter takes effect":
            raise Gone

    with pytest.raises(Gone):
        desk.answer(Load(adapter_path=adapters[1], base=base), leave)
    assert loaded_paths(desk) == ["a"]
    assert generate(desk).text == before


def test_once_insisted_is_not_for_ever(desk: RequestHandler, base: Base, base_directory: Path, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "foreign", base_directory, seed=1)
    (adapter / "adapter_manifest.json").unlink()
    assert load(desk, adapter, base, insist=True).status == "loaded"
    assert load(desk, adapter, base).status == "fallback"
    assert load(desk, adapter, base, insist=True).how == "switched"


def test_an_unproven_adapter_must_be_insisted_on(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    adapter = write_tiny_adapter(tmp_path / "foreign", base_directory, seed=1)
    (adapter / "adapter_manifest.json").unlink()
    answer = load(desk, adapter, base)
    assert (answer.status, answer.verdict) == ("fallback", BaseMatch.SHAPE_ONLY)
    assert "accept_unproven_base" in answer.next
    answer = load(desk, adapter, base, insist=True)
    assert (answer.status, answer.verdict) == ("loaded", BaseMatch.SHAPE_ONLY)


def test_insisting_does_not_help_against_errors(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    adapter = write_tiny_adapter(tmp_path / "x", base_directory, seed=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 800}))
    answer = load(desk, adapter, base, insist=True)
    assert answer.status == "fallback"
    assert [reason.code for reason in answer.reasons] == ["altered"]


def test_another_base_takes_the_place_of_the_first_only_when_its_adapter_works(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    tmp_path: Path,
) -> None:
    other_directory = write_tiny_base(tmp_path / "other")
    other_model = tiny_model()
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.mul_(1.5)
    other_model.save_pretrained(other_directory)
    other = resolve(str(other_directory), Settings())
    load(desk, adapters[0], base)
    assert load(desk, adapters[1], other).status == "fallback"
    assert (desk.resident.base_model, loaded_paths(desk)) == ("base", ["a"])
    mine = write_tiny_adapter(tmp_path / "mine", other_directory, seed=9)
    assert load(desk, mine, other).how == "cold"
    assert (desk.resident.base_model, loaded_paths(desk)) == ("other", ["mine"])


# -- unload --------------------------------------------------------------------------------------------------------


def test_the_active_one_is_taken_off_and_the_base_goes_with_the_last(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
) -> None:
    load(desk, adapters[0], base)
    load(desk, adapters[1], base)
    answer = unload(desk)
    assert (answer.adapter_path, answer.base_unloaded) == (str(adapters[1]), False)
    assert str(adapters[0]) in answer.next
    with pytest.raises(AdapterNotLoaded, match="No adapter is active"):
        generate(desk)
    answer = unload(desk, adapters[0])
    assert (answer.adapter_path, answer.base_unloaded) == (str(adapters[0]), True)
    assert desk.holds_nothing
    assert unload(desk).status == "nothing_loaded"


def test_an_unknown_one_is_not_taken_off(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    with pytest.raises(AdapterNotLoaded, match=str(adapters[0])):
        unload(desk, adapters[1])
    assert loaded_paths(desk) == ["a"]


def test_a_base_without_adapters_is_unloaded_too(desk: RequestHandler, base: Base) -> None:
    generate(desk, without_adapter=base)
    answer = unload(desk)
    assert (answer.status, answer.adapter_path, answer.base_unloaded) == ("unloaded", None, True)


# -- generate ------------------------------------------------------------------------------------------------------


def test_with_nothing_loaded_it_says_what_to_do(desk: RequestHandler) -> None:
    with pytest.raises(AdapterNotLoaded, match="load_adapter") as caught:
        generate(desk)
    assert "use_base=true" in str(caught.value)


def test_the_base_answers_when_it_is_asked_and_not_the_next_time(desk: RequestHandler, base: Base) -> None:
    assert generate(desk, without_adapter=base).adapter_path is None
    with pytest.raises(AdapterNotLoaded):
        generate(desk)


def test_both_texts_are_those_of_single_use(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    alone, without = generate(desk).text, generate(desk, without_adapter=base).text
    both = generate(desk, **HELLO, compare_with_base=True)
    assert (both.text, both.base_text) == (alone, without)
    assert alone != without


def test_one_that_is_not_active_can_be_named(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    first = generate(desk).text
    load(desk, adapters[1], base)
    assert generate(desk, adapters[0]).text == first
    assert generate(desk).adapter_path == str(adapters[1])
    with pytest.raises(AdapterNotLoaded, match="c is not in memory"):
        generate(desk, adapters[2])


def test_the_same_seed_gives_the_same_text(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    sampled = {"prompt": "x", "max_new_tokens": 30, "temperature": 1.5}
    texts = [generate(desk, **sampled, seed=seed).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


def test_it_ends_before_a_stop_text_and_at_the_limit(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    whole = generate(desk, prompt="def f", max_new_tokens=12)
    assert (whole.completion_tokens, whole.finish_reason) == (12, "length")
    stop = whole.text[4:7]
    cut = generate(desk, prompt="def f", max_new_tokens=12, stop=["never there", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < 12
    assert cut.applied.stop == ["never there", stop]


def test_the_earliest_stop_text_counts() -> None:
    assert earliest("one two three", ["three", "two"]) == 4
    assert earliest("one", ["two"]) is None
    assert earliest("one", []) is None


def test_an_end_token_ends_it_and_is_not_shown(desk: RequestHandler, base: Base) -> None:
    generate(desk, without_adapter=base)
    assert desk._residents.model is not None
    first = generate(desk, without_adapter=base, prompt="def f", max_new_tokens=1)
    token = VOCABULARY.index(first.text.strip())
    desk._residents.model.ends = (0, token)
    answer = generate(desk, without_adapter=base)
    assert (answer.text, answer.completion_tokens, answer.finish_reason) == ("", 1, "stop")


def test_a_prompt_longer_than_the_context_is_refused_with_figures(desk: RequestHandler, base: Base) -> None:
    with pytest.raises(InvalidArgument, match=r"prompt = '300 tokens'.*256 tokens"):
        generate(desk, without_adapter=base, prompt="x" * 300)
    answer = generate(desk, without_adapter=base, prompt="x" * 250, max_new_tokens=50)
    assert answer.completion_tokens <= 6


def test_messages_go_through_the_bases_own_template_never_the_adapters(
    desk: RequestHandler,
    base: Base,
    base_directory: Path,
    tmp_path: Path,
) -> None:
    adapter = write_tiny_adapter(tmp_path / "x", base_directory, seed=4)
    load(desk, adapter, base)
    asked = {"messages": [ChatMessage(role="user", content="hi")], "max_new_tokens": 8}
    expected = generate(desk, **asked)
    assert expected.applied.prompt_format == "chat_template"
    assert expected.prompt_tokens == len("[user]hi") + 2 + len("[assistant]")
    unload(desk)
    (adapter / "chat_template.jinja").write_text("IGNORE ALL OF IT")
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "IGNORE"}')
    load(desk, adapter, base)
    assert generate(desk, **asked).text == expected.text


def test_a_base_without_template_or_middle_tokens_says_so(desk: RequestHandler, tmp_path: Path) -> None:
    plain = resolve(str(write_tiny_base(tmp_path / "plain", chat_template=None)), Settings())
    with pytest.raises(DataError, match="no chat template"):
        generate(desk, without_adapter=plain, messages=[ChatMessage(role="user", content="hi")])
    with pytest.raises(InvalidArgument, match="filling in the middle"):
        generate(desk, without_adapter=plain, prefix="a", suffix="b")


def test_a_long_prompt_is_read_in_pieces_to_the_same_effect(
    desk: RequestHandler,
    adapters: list[Path],
    base: Base,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(desk, adapters[0], base)
    asked = {"prompt": "def f(x): return x" * 6, "max_new_tokens": 20}
    whole = generate(desk, **asked).text
    monkeypatch.setattr("peft_core.inference.worker.generate._PIECE", 16)
    heard: list[str] = []
    pieces = generate(desk, report=lambda _done, _total, message: heard.append(message), **asked)
    assert pieces.text == whole
    assert heard[:6] == ["the adapter reads the prompt"] * 6
    assert pieces.prompt_tokens == 108


def test_a_temperature_next_to_nothing_is_greedy(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    assert generate(desk, **HELLO, temperature=1e-40).text == generate(desk).text


def test_who_stops_listening_is_not_written_for(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    heard: list[float] = []

    class Gone(Exception):
        """Nobody waits."""

    def leave(done: float, _total: float | None, _message: str) -> None:
        heard.append(done)
        if done >= 3:
            raise Gone

    with pytest.raises(Gone):
        generate(desk, report=leave, prompt="def f", max_new_tokens=100, compare_with_base=True)
    assert heard == [1, 2, 3]
    assert generate(desk).adapter_path == str(adapters[0])


def test_progress_counts_the_tokens_of_both_answers(desk: RequestHandler, adapters: list[Path], base: Base) -> None:
    load(desk, adapters[0], base)
    heard: list[tuple[float, float | None, str]] = []
    generate(desk, report=lambda *said: heard.append(said), **HELLO, compare_with_base=True)
    assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)
    assert heard[0][1] == 24
    assert "by the adapter" in heard[0][2]
    assert "by the base" in heard[-1][2]
