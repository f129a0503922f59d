"""Tests of how a base model is found in Ollama's store by its name, and of what is refused there and why."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_core.base_models.ollama_store import PREFIX, find_ollama, installed_names, parse_ollama_name
from peft_core.base_models.resolve import candidates, resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, InvalidArgument
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes, write_model

SETTINGS = Settings(allow_downloads=False, default_base_model=None)
IMAGE = "application/vnd.ollama.image."
LIST = "application/vnd.ollama.manifest.list.v2+json"


class Store:
    """A store as Ollama writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(content)
        return f"sha256:{digest}"

    def layer(self, kind: str, content: bytes) -> dict[str, Any]:
        return {"mediaType": IMAGE + kind, "digest": self.blob(content), "size": len(content)}

    def add(
        self,
        place: str = "manifests/registry.ollama.ai/library/tiny/latest",
        layers: list[Any] | None = None,
        *,
        manifest: object = None,
    ) -> Path:
        if layers is None:
            layers = [self.layer("model", gguf_bytes()), self.layer("template", b"{{ .Prompt }}{{ .Suffix }}")]
        path = self.root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schemaVersion": 2, "layers": layers} if manifest is None else manifest
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    return Store(tmp_path / "store")


def error_of(name: str) -> str:
    with pytest.raises((BaseCheckpointError, InvalidArgument)) as caught:
        resolve(name, SETTINGS)
    return str(caught.value)


@pytest.mark.parametrize("name", ["ollama:tiny", "ollama:tiny:latest", "tiny", "tiny:latest", "OLLAMA:Tiny:LATEST"])
def test_a_model_is_found_by_its_name_without_a_server(store: Store, name: str) -> None:
    store.add()
    base = resolve(name, SETTINGS)
    assert (base.ref, base.name, base.format) == ("ollama:tiny:latest", "tiny:latest", "gguf")
    assert base.path.parent == store.root / "blobs"
    assert base.shape.layers == 2


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("manifests/registry.ollama.ai/library/qwen2.5-coder/1.5b", "qwen2.5-coder:1.5b"),
        ("manifests/registry.ollama.ai/ada/tiny/q4_K_M", "ada/tiny:q4_K_M"),
        ("manifests/hf.co/org/Tiny-GGUF/Q4_K_M", "hf.co/org/Tiny-GGUF:Q4_K_M"),
        ("manifests/localhost:5000/library/tiny/latest", "localhost:5000/library/tiny:latest"),
        ("manifests-v2/ollama.com/library/tiny/latest", "tiny:latest"),
        ("manifests/default.example/library/tiny/latest", "tiny:latest"),
    ],
)
def test_names_of_every_form_are_found_and_listed(store: Store, place: str, name: str) -> None:
    store.add(place)
    assert resolve(f"ollama:{name}", SETTINGS).name == name
    assert resolve(name, SETTINGS).ref == f"ollama:{name}"
    assert [str(listed) for listed in installed_names()] == [name]


def test_the_later_form_goes_first_and_is_listed_once(store: Store) -> None:
    newer = store.layer("model", gguf_bytes(GGUF_METADATA | {"general.name": (TEXT, "Newer")}))
    store.add()
    store.add("manifests-v2/ollama.com/library/tiny/latest", [newer])
    assert resolve("ollama:tiny", SETTINGS).path.name == newer["digest"].replace(":", "-")
    assert [str(name) for name in installed_names()] == ["tiny:latest"]


@pytest.mark.parametrize("inline", [True, False])
def test_of_a_list_of_manifests_that_for_gguf_files_is_taken(store: Store, inline: bool) -> None:
    manifest = {"schemaVersion": 2, "layers": [store.layer("model", gguf_bytes())]}
    child = manifest if inline else {"digest": store.blob(json.dumps(manifest).encode())}
    mlx = {"runner": "mlx", "format": "safetensors", "digest": "sha256:" + "0" * 64}
    gguf = {"runner": "llamacpp", "format": "gguf", **child}
    store.add(manifest={"mediaType": LIST, "manifests": [mlx, gguf]})
    assert resolve("tiny", SETTINGS).shape.layers == 2
    store.add(manifest={"mediaType": LIST, "manifests": [mlx]})
    assert "MLX engine" in error_of("tiny")


def test_a_tag_may_be_a_link_inside_the_store_only(store: Store, tmp_path: Path) -> None:
    path = store.add()
    path.with_name("v1").symlink_to("latest")
    assert resolve("tiny:v1", SETTINGS).shape.layers == 2
    (tmp_path / "outside").write_text(path.read_text())
    path.with_name("v2").symlink_to(tmp_path / "outside")
    assert "leads out of the store" in error_of("ollama:tiny:v2")


def test_the_blobs_may_be_on_another_disk(store: Store, tmp_path: Path) -> None:
    store.add()
    (store.root / "blobs").rename(tmp_path / "disk")
    (store.root / "blobs").symlink_to(tmp_path / "disk")
    limited = SETTINGS.model_copy(update={"allowed_roots": (tmp_path / "project",)})
    base = resolve("tiny", limited)
    assert resolve(str(base.path), limited).shape == base.shape


def test_the_texts_of_a_model_are_read(store: Store) -> None:
    store.add()
    name = parse_ollama_name("tiny")
    assert name is not None
    model = find_ollama(name)
    assert model is not None
    assert model.text("template") == "{{ .Prompt }}{{ .Suffix }}"
    assert model.text("system") is None


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (["model", "adapter"], "a base model with a LoRA adapter"),
        (["model", "projector"], "a vision-language model"),
        (["tensor", "json"], "Apple's MLX engine"),
        (["license"], "it has no weights on this machine"),
        (["model", "model"], "2 layers with weights"),
    ],
)
def test_models_that_are_no_single_gguf_file_are_refused_with_the_reason(
    store: Store, kinds: list[str], reason: str
) -> None:
    store.add(layers=[store.layer(kind, gguf_bytes()) for kind in kinds])
    message = error_of("ollama:tiny")
    assert message.startswith("The Ollama model tiny:latest cannot be used: ")
    assert reason in message


def test_missing_and_incomplete_weights_are_refused_with_the_command_that_fetches_them(store: Store) -> None:
    layer = store.layer("model", gguf_bytes())
    blob = store.root / "blobs" / layer["digest"].replace(":", "-")
    store.add(layers=[layer])
    blob.write_bytes(gguf_bytes()[:-10])
    assert "bytes instead of" in error_of("tiny")
    blob.unlink()
    message = error_of("tiny")
    assert f"its weights are missing (blobs/{blob.name})" in message
    assert "`ollama pull tiny:latest`" in message


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "no JSON object"),
        ("{}", "no list of layers"),
        ('{"layers": [1]}', "no list of layers"),
        ("[" * 100_000, "is damaged"),
        ('{"layers": [' + "[]," * 300_000 + "[]]}", "more than 200000 names and values"),
        (" " * (5 << 20), "must be at most"),
        ({"layers": [{"mediaType": IMAGE + "model", "digest": "sha256:../../../etc/passwd"}]}, "is no digest"),
        ({"layers": [{"mediaType": IMAGE + "model", "digest": ["sha256"]}]}, "is no digest"),
        ({"layers": [{"mediaType": IMAGE + "model"}]}, "is no digest"),
        ({"mediaType": LIST, "manifests": [{"format": "gguf", "digest": "../x"}]}, "is no digest"),
        ({"mediaType": LIST, "manifests": 7}, "MLX"),
    ],
)
def test_hostile_and_damaged_manifests_are_refused(store: Store, manifest: object, reason: str) -> None:
    store.add(manifest=manifest)
    message = error_of("ollama:tiny")
    assert reason in message
    assert len(message) < 600


def test_a_blob_that_leads_out_of_the_store_is_refused(store: Store, tmp_path: Path) -> None:
    layer = store.layer("model", gguf_bytes())
    store.add(layers=[layer])
    blob = store.root / "blobs" / layer["digest"].replace(":", "-")
    blob.rename(tmp_path / "private")
    blob.symlink_to(tmp_path / "private")
    assert "leads out of the store" in error_of("tiny")


@pytest.mark.parametrize("name", ["", "a/b/c/d", "../x", "tiny:", "tiny:a/b", "a.b/tiny", "-tiny", "tiny name", "t\0y"])
def test_what_is_no_name_is_refused(store: Store, name: str) -> None:
    assert parse_ollama_name(name) is None
    assert "must be ollama:[NAMESPACE/]NAME[:TAG]" in error_of(f"ollama:{name}")


def test_an_absent_model_is_answered_with_similar_ones_and_the_command(store: Store) -> None:
    store.add("manifests/registry.ollama.ai/library/qwen2.5-coder/1.5b")
    message = error_of("ollama:qwen2.5-coder")
    assert "Similar names: ollama:qwen2.5-coder:1.5b." in message
    assert "`ollama pull qwen2.5-coder`" in message
    assert "ollama:qwen2.5-coder:1.5b" in error_of("qwen2.5-coder:7b")


def test_a_path_and_a_cached_hub_id_go_before_a_model_in_ollama(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add()
    write_model(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny", SETTINGS).format == "huggingface"
    assert resolve("ollama:tiny", SETTINGS).format == "gguf"


def test_an_adapter_finds_its_base_by_the_recorded_name(store: Store) -> None:
    store.add()
    found = next(call() for call in candidates("tiny:latest", None, SETTINGS))
    assert found.ref == "ollama:tiny:latest"


def test_allowed_roots_do_not_exclude_the_store(store: Store, tmp_path: Path) -> None:
    store.add()
    limited = SETTINGS.model_copy(update={"allowed_roots": (tmp_path / "project",)})
    base = resolve("tiny", limited)
    assert resolve(str(base.path), limited).path == base.path


@given(st.text(max_size=80))
@example("OLLAMA")
def test_a_parsed_name_is_no_path_and_reads_back(text: str) -> None:
    name = parse_ollama_name(text)
    if name is not None:
        assert parse_ollama_name(f"{PREFIX}{name}") == name  # without the prefix, "ollama:x" is x
        for part in (name.host or "x", name.namespace, name.model, name.tag):
            assert "/" not in part
            assert not part.startswith(".")
