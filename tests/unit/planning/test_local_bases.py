"""Tests of the list of base models on this machine: where they are found, what is said of each, and how little is disclosed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.planning import local_bases
from peft_core.planning.local_bases import list_base_models
from peft_core.schemas.local_bases import LocalBase, LocalBases
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes, write_cached, write_gguf, write_model
from tests.unit.base_models.test_ollama_store import Store

FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


def listed(settings: Settings | None = None, speed: float | None = 1000.0) -> LocalBases:
    return list_base_models(settings or Settings(), lambda base, device: speed)


def by_name(bases: LocalBases) -> dict[str, LocalBase]:
    return {base.base_model: base for base in bases.base_models if base.source != "bundled"}


def test_models_of_every_program_are_listed_by_the_name_that_base_model_takes(home: Path, tmp_path: Path) -> None:
    Store(home / ".ollama" / "models").add()
    write_gguf(home / ".lmstudio" / "models" / "org" / "tiny" / "tiny-Q8_0.gguf")
    write_gguf(home / ".cache" / "llama.cpp" / "org_tiny.gguf")
    hub = home / ".cache" / "huggingface" / "hub"
    write_cached(hub, "org/tiny", "0" * 40, write_model(tmp_path / "model"))
    names = by_name(listed())
    assert {name: base.source for name, base in names.items()} == {
        "ollama:tiny:latest": "ollama",
        "~/.lmstudio/models/org/tiny/tiny-Q8_0.gguf": "lm_studio",
        "~/.cache/llama.cpp/org_tiny.gguf": "llama_cpp",
        "org/tiny": "hugging_face_cache",
    }
    limited = Settings(allowed_roots=(tmp_path / "project",))
    for name, base in names.items():
        assert base.trainable
        assert resolve(name, limited).shape.parameters == base.parameters


def test_a_model_is_described_by_its_headers(home: Path) -> None:
    write_gguf(home / ".lmstudio" / "models" / "org" / "tiny" / "tiny.gguf", FIM)
    base = by_name(listed())["~/.lmstudio/models/org/tiny/tiny.gguf"]
    assert (base.quantisation, base.family, base.context_length) == ("Q8_0", "llama", 128)
    assert (base.fill_in_the_middle, base.chat_template, base.trainable) == (True, True, True)
    assert base.size_bytes is not None
    assert base.memory_bytes is not None
    assert base.memory_bytes > 100e6
    assert base.seconds_per_1000_examples is not None
    assert 235 < base.seconds_per_1000_examples < 400  # 235 000 tokens at 1000 a second, and two measurements


def test_a_token_in_another_text_is_no_fim_token(home: Path) -> None:
    write_gguf(home / ".lmstudio" / "models" / "o" / "m" / "a.gguf", [f"x{token}" for token in FIM])
    assert by_name(listed())["~/.lmstudio/models/o/m/a.gguf"].fill_in_the_middle is False


def test_what_cannot_be_trained_is_listed_with_the_reason_and_without_paths(home: Path) -> None:
    store = Store(home / ".ollama" / "models")
    store.add(layers=[store.layer("model", gguf_bytes()), store.layer("projector", b"x")])
    other = gguf_bytes(GGUF_METADATA | {"general.architecture": (TEXT, "mamba")})
    store.add("manifests/registry.ollama.ai/library/mamba/latest", [store.layer("model", other)])
    bases = by_name(listed())
    assert "vision-language" in bases["ollama:tiny:latest"].reason
    assert "its architecture is 'mamba'" in bases["ollama:mamba:latest"].reason
    for base in bases.values():
        assert base.trainable is False
        assert "ada" not in base.model_dump_json()


def test_a_model_too_large_for_the_limit_is_not_trainable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(home / ".lmstudio" / "models" / "o" / "m" / "a.gguf")
    monkeypatch.setattr(local_bases, "memory_bytes", lambda *_: 10**15)
    name = "~/.lmstudio/models/o/m/a.gguf"
    assert "takes about 1000000.0 GB of memory; this machine has" in by_name(listed())[name].reason
    limited = by_name(listed(Settings(max_memory_mb=300)))[name]
    assert (limited.trainable, limited.memory_bytes) == (False, None)
    assert "estimated to take at least" in limited.reason


def test_the_estimate_is_of_a_training_with_the_settings_of_the_user(home: Path) -> None:
    write_gguf(home / ".lmstudio" / "models" / "o" / "m" / "a.gguf")
    usual, own = (by_name(listed(settings)).popitem()[1] for settings in (Settings(), Settings(lora_rank=256)))
    assert (own.memory_bytes or 0) > (usual.memory_bytes or 0)


def test_projectors_later_parts_and_links_to_the_same_file_are_left_out(home: Path) -> None:
    models = home / ".lmstudio" / "models" / "o" / "m"
    store = Store(home / ".ollama" / "models")
    layer = store.layer("model", gguf_bytes())
    store.add(layers=[layer])
    models.mkdir(parents=True)
    (models / "linked.gguf").symlink_to(store.root / "blobs" / layer["digest"].replace(":", "-"))
    write_gguf(models / "mmproj-a.gguf")
    write_gguf(models / "a-00002-of-00002.gguf")
    assert list(by_name(listed())) == ["ollama:tiny:latest"]


def test_the_list_ends_in_time_and_goes_on_with_the_next_call(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_gguf(home / ".lmstudio" / "models" / "o" / "m" / f"{number}.gguf")
    monkeypatch.setattr(local_bases, "MAX_SECONDS", 0.0)
    bases = by_name(listed())
    assert len(bases) == 3
    assert {base.trainable for base in bases.values()} == {None}
    monkeypatch.setattr(local_bases, "MAX_LISTED", 2)
    assert listed().omitted == 2


def test_twenty_models_take_less_than_a_second(home: Path) -> None:
    for number in range(20):
        write_gguf(home / ".lmstudio" / "models" / "o" / "m" / f"{number}.gguf")
    listed()
    started = time.process_time()
    assert len(by_name(listed())) == 20
    assert time.process_time() - started < 1
