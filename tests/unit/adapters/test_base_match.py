"""Unit tests of base_match: the verdicts, and the search for the base model that an adapter was trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import constants

from peft_core.adapters.base_match import find_base
from peft_core.adapters.manifest import MANIFEST_NAME, BaseRecord, read_manifest
from peft_core.adapters.verify import verify
from peft_core.base_models.fingerprint import content_hash
from peft_core.base_models.resolve import candidates, resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, InvalidArgument
from peft_core.schemas.base_model import Base, Fingerprint
from peft_core.schemas.results import BaseMatch
from tests.factories import record_base
from tests.model_files import gguf_bytes, weights, write_adapter, write_cached, write_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
Values = Mapping[str, Sequence[float]]
MakeBase = Callable[[Path], str]  # writes a base model below a directory and returns a reference to it


def directory(values: Values | None = None, *, dtype: str = "F32", shards: int = 1, **config: object) -> MakeBase:
    def make(path: Path) -> str:
        return str(write_model(path / "tiny", values=values or weights(), dtype=dtype, shards=shards, **config))

    return make


def gguf(values: Values | None = None, *, quantised: bool = False) -> MakeBase:
    def make(path: Path) -> str:
        path.mkdir(parents=True)
        (path / "tiny.gguf").write_bytes(gguf_bytes(values=values or weights(), quantised=quantised))
        return str(path / "tiny.gguf")

    return make


def cached(values: Values | None = None, commit: str = COMMIT, *, dtype: str = "F32") -> MakeBase:
    def make(path: Path) -> str:
        model = write_model(path / "source", values=values or weights(), dtype=dtype)
        return str(write_cached(path / "hub", "org/tiny", commit, model))

    return make


def resolved(make: MakeBase, path: Path) -> Base:
    return resolve(make(path), Settings())


MERGED = weights(seed=1)  # a merged or fine-tuned model may have the same norms
OTHER_MODEL = weights(norms=1)


@pytest.mark.parametrize(
    ("trained_on", "given", "verdict", "code"),
    [
        pytest.param(cached(), cached(), BaseMatch.EXACT, None, id="the same snapshot"),
        pytest.param(
            cached(), cached(commit=OTHER_COMMIT), BaseMatch.EXACT, None, id="another commit with the same blobs"
        ),
        pytest.param(directory(), directory(), BaseMatch.SAMPLED, None, id="a copy"),
        pytest.param(directory(), directory(shards=3), BaseMatch.SAMPLED, None, id="a copy in shards"),
        pytest.param(cached(), directory(), BaseMatch.SAMPLED, None, id="a copy outside the cache"),
        pytest.param(gguf(), gguf(), BaseMatch.SAMPLED, None, id="a copy of a GGUF file"),
        pytest.param(
            gguf(quantised=True), directory(), BaseMatch.SAME_FAMILY, "other_storage", id="the source of a GGUF file"
        ),
        pytest.param(
            directory(dtype="BF16"), gguf(quantised=True), BaseMatch.SAME_FAMILY, "other_storage", id="a GGUF file"
        ),
        pytest.param(gguf(), gguf(quantised=True), BaseMatch.SAME_FAMILY, "other_storage", id="another quantisation"),
        pytest.param(directory(dtype="BF16"), cached(), BaseMatch.SAME_FAMILY, "other_storage", id="another precision"),
        pytest.param(
            cached(), cached(MERGED, OTHER_COMMIT), BaseMatch.SHAPE_ONLY, "other_weights", id="another revision"
        ),
        pytest.param(
            directory(), directory(MERGED, shards=3), BaseMatch.SHAPE_ONLY, "other_weights", id="a merged model"
        ),
        pytest.param(gguf(), gguf(MERGED), BaseMatch.SHAPE_ONLY, "other_weights", id="a merged GGUF file"),
        pytest.param(directory(), directory(OTHER_MODEL), BaseMatch.SHAPE_ONLY, "other_model", id="another model"),
        pytest.param(
            gguf(), directory(OTHER_MODEL), BaseMatch.SHAPE_ONLY, "other_model", id="another model in another format"
        ),
        pytest.param(
            directory(), directory(rope_theta=5e5), BaseMatch.SHAPE_ONLY, "other_architecture", id="another rotary base"
        ),
        pytest.param(
            directory(),
            directory(model_type="mistral"),
            BaseMatch.SHAPE_ONLY,
            "other_architecture",
            id="another model type",
        ),
    ],
)
def test_the_verdict_states_how_certain_the_base_is(
    tmp_path: Path, trained_on: MakeBase, given: MakeBase, verdict: BaseMatch, code: str | None
) -> None:
    adapter = record_base(write_adapter(tmp_path / "adapter"), resolved(trained_on, tmp_path / "a"))
    result = verify(adapter, resolved(given, tmp_path / "b"), scan_weights=True)
    assert result.verdict is verdict
    assert [reason.code for reason in result.reasons] == ([code] if code else [])
    assert result.compatible == (verdict is not BaseMatch.SHAPE_ONLY)
    assert ("accept_unproven_base" in result.next) == (verdict is BaseMatch.SHAPE_ONLY)


def test_a_copy_is_exact_once_the_content_of_both_bases_is_hashed(tmp_path: Path) -> None:
    original, copy = resolved(directory(), tmp_path / "a"), resolved(directory(), tmp_path / "b")
    hashes = {base.path: content_hash(base.path) for base in (original, copy)}
    hashed_original, hashed_copy = (
        base.model_copy(update={"fingerprint": base.fingerprint.model_copy(update={"content": hashes[base.path]})})
        for base in (original, copy)
    )
    adapter = record_base(write_adapter(tmp_path / "adapter"), hashed_original)
    assert verify(adapter, copy).verdict is BaseMatch.SAMPLED
    assert verify(adapter, hashed_copy).verdict is BaseMatch.EXACT


def test_name_and_commit_prove_nothing_if_the_samples_differ(tmp_path: Path) -> None:
    adapter = record_base(write_adapter(tmp_path / "adapter"), resolved(cached(), tmp_path / "a"))
    result = verify(adapter, resolved(cached(MERGED), tmp_path / "b"))
    assert (result.verdict, result.reasons[0].code) == (BaseMatch.SHAPE_ONLY, "other_weights")


def test_a_record_without_a_family_hash_never_matches_by_family(tmp_path: Path) -> None:
    base = resolved(directory(dtype="BF16"), tmp_path / "a")
    old = Fingerprint(architecture=base.fingerprint.architecture, sample=base.fingerprint.sample)
    adapter = record_base(write_adapter(tmp_path / "adapter"), base.model_copy(update={"fingerprint": old}))
    assert verify(adapter, base).verdict is BaseMatch.SAMPLED
    result = verify(adapter, resolved(gguf(), tmp_path / "b"))
    assert (result.verdict, result.reasons[0].code) == (BaseMatch.SHAPE_ONLY, "other_weights")


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (None, "it has no readable adapter_manifest.json"),
        ("/models/Tiny/", "which may be this base model"),
        ("meta/Llama-3-70B", "which seems to be another base model"),
    ],
)
def test_an_adapter_without_a_manifest_is_unproven_whatever_its_configuration_names(
    tmp_path: Path, hint: str | None, expected: str
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=hint)
    result = verify(adapter, resolved(directory(), tmp_path / "a"))
    assert (result.verdict, result.compatible) == (BaseMatch.SHAPE_ONLY, False)
    (reason,) = result.reasons
    assert (reason.code, reason.severity) == ("base_not_recorded", "warning")
    assert expected in reason.message


@pytest.mark.parametrize("damage", ["link", "large", "deep", "other version", "directory"])
def test_an_invalid_manifest_is_ignored(tmp_path: Path, damage: str) -> None:
    base = resolved(directory(), tmp_path / "a")
    adapter = record_base(write_adapter(tmp_path / "adapter"), base)
    path = adapter / MANIFEST_NAME
    text = path.read_text()
    path.unlink()
    match damage:
        case "link":
            (tmp_path / "elsewhere.json").write_text(text)
            path.symlink_to(tmp_path / "elsewhere.json")
        case "large":
            path.write_text(text + " " * (1 << 20))
        case "deep":
            path.write_text("[" * 200_000)
        case "other version":
            path.write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
        case _:
            path.mkdir()
    result = verify(adapter, base)
    assert [reason.code for reason in result.reasons] == ["base_not_recorded"]


def record_of(base: Base) -> BaseRecord:
    return BaseRecord.model_validate(base.model_dump(include=set(BaseRecord.model_fields)))


def test_find_base_prefers_equal_weights_to_another_number_format(tmp_path: Path) -> None:
    trained = resolved(directory(dtype="BF16"), tmp_path / "a")
    copy = resolved(directory(dtype="BF16", shards=3), tmp_path / "b")
    converted, other = resolved(gguf(), tmp_path / "c"), resolved(directory(OTHER_MODEL), tmp_path / "d")

    def broken() -> Base:
        raise BaseCheckpointError("missing")

    def candidates_of(*bases: Base) -> list[Callable[[], Base]]:
        return [broken, *(lambda base=base: base for base in bases)]

    record = record_of(trained)
    assert find_base(record, candidates_of(other, converted, copy)) == copy
    assert find_base(record, candidates_of(other, converted)) == converted
    assert find_base(record, candidates_of(other)) is None
    assert find_base(record, []) is None


def test_find_base_resolves_no_candidate_after_a_match(tmp_path: Path) -> None:
    base = resolved(directory(), tmp_path / "a")
    assert find_base(record_of(base), [lambda: base, lambda: pytest.fail("resolved")]) == base


def existing(calls: Iterable[Callable[[], Base]]) -> list[Base]:
    """Return the candidates that exist; a name may also be that of a model in Ollama."""
    bases = []
    for call in calls:
        with suppress(InvalidArgument):
            bases.append(call())
    return bases


def test_candidates_are_local_and_start_with_the_recorded_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys.modules["peft_core.base_models.resolve"], "download", lambda ref: pytest.fail("downloaded"))
    source = write_model(tmp_path / "source", values=weights())
    old = write_cached(tmp_path / "hub", "org/tiny", OTHER_COMMIT, source)
    new = write_cached(tmp_path / "hub", "org/tiny", COMMIT, write_model(tmp_path / "newer", values=MERGED))
    default = write_model(tmp_path / "default", values=OTHER_MODEL)
    settings = Settings(default_base_model=str(default), allow_downloads=True)
    paths = [base.path for base in existing(candidates("org/tiny", OTHER_COMMIT, settings))]
    assert paths[:3] == [old, new, default]
    assert paths[3].suffix == ".gguf"  # the bundled base model

    adapter = record_base(write_adapter(tmp_path / "adapter"), resolve(f"org/tiny@{OTHER_COMMIT}", Settings()))
    manifest = read_manifest(adapter)
    assert manifest is not None
    base = find_base(manifest.base, candidates(manifest.base.name, manifest.base.revision, settings))
    assert base is not None
    assert base.path == old
    assert verify(adapter, base).verdict is BaseMatch.EXACT


@pytest.mark.parametrize("name", ["tiny", "/etc", "../../x", "a/b/c", "org/tiny@main", "", "~/x", "x\0y", "no/where"])
def test_a_recorded_name_is_never_used_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    write_model(tmp_path / "tiny")
    write_model(tmp_path / "no" / "where")
    write_cached(tmp_path / "hub", "org/tiny", COMMIT, write_model(tmp_path / "source"))
    assert [base.ref for base in existing(candidates(name, "../x", Settings()))] == ["bundled"]


def test_a_default_base_that_is_not_cached_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sys.modules["peft_core.base_models.resolve"], "download", lambda ref: pytest.fail("downloaded"))
    record = record_of(resolved(directory(), tmp_path / "a"))
    settings = Settings(default_base_model="org/absent", allow_downloads=True)
    assert find_base(record, candidates("org/also-absent", None, settings)) is None
