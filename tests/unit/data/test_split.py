"""Tests of the split: what is held out, and that neither duplicates nor near duplicates remain."""

from __future__ import annotations

import hashlib
import inspect
import json.decoder
import os
import random
import re
import subprocess
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data.git import last_change_times
from peft_core.data.minhash import THRESHOLD, MinHashIndex
from peft_core.data.split import HELD_OUT_MAX_EXAMPLES, ExampleKey, Split, count_distinct, split
from peft_core.errors import DataError
from peft_core.schemas.dataset import DatasetPurpose


def split_distinct(keys: Sequence[ExampleKey], *, held_out_fraction: float, seed: int) -> Split:
    """Split examples that are either equal or entirely different."""
    return split(keys, signatures_of([None] * len(keys)), held_out_fraction=held_out_fraction, seed=seed)


def signatures_of(texts: Sequence[str | None]) -> MinHashIndex:
    signatures = MinHashIndex()
    for text in texts:
        signatures.add(text)
    return signatures


KEYS = st.lists(
    st.builds(
        ExampleKey, st.sampled_from("abcdefghij"), st.binary(min_size=1, max_size=1), st.integers(1, 500), st.just(b"")
    ),
    max_size=80,
)
KEYS_WITH_ANSWERS = st.lists(
    st.builds(
        ExampleKey,
        st.integers(0, 40).map("record {}".format),
        st.binary(min_size=2, max_size=2),
        st.integers(1, 500),
        st.sampled_from([b"", b"a", b"b", b"c", b"d"]),
    ),
    max_size=80,
)


@given(keys=KEYS, seed=st.integers(0, 99), fraction=st.floats(0.02, 0.5))
def test_each_file_is_on_one_side_no_side_has_duplicates_and_no_side_is_empty(
    keys: list[ExampleKey], seed: int, fraction: float
):
    result = split_distinct(keys, held_out_fraction=fraction, seed=seed)
    remaining = [*result.train, *result.held_out]
    assert len(set(remaining)) == len(remaining) == len({key.digest for key in keys}) == len(keys) - result.duplicates
    assert {keys[n].file for n in result.train}.isdisjoint({keys[n].file for n in result.held_out})
    if count_distinct(keys)[1] >= 2:
        assert result.train
        assert result.held_out


@given(keys=KEYS_WITH_ANSWERS, seed=st.integers(0, 99), fraction=st.floats(0.02, 0.5))
def test_the_same_answer_is_never_on_both_sides(keys: list[ExampleKey], seed: int, fraction: float):
    keys = [*keys, ExampleKey("other", b"other", 100, b"")]  # so that at least two groups exist
    result = split_distinct(keys, held_out_fraction=fraction, seed=seed)
    trained, held_out = ({keys[n].answer for n in part} - {b""} for part in (result.train, result.held_out))
    assert trained.isdisjoint(held_out)
    assert {keys[n].file for n in result.train}.isdisjoint({keys[n].file for n in result.held_out})


def test_examples_are_held_out_even_if_all_files_share_an_answer():
    files = [f"file {n}" for n in range(10)]
    own = [ExampleKey(file, f"{file} {n}".encode(), 50, f"{file} {n}".encode()) for file in files for n in range(10)]
    result = split_distinct(
        [*own, *(ExampleKey(file, f"stock {file}".encode(), 50, b"stock") for file in files)],
        held_out_fraction=0.1,
        seed=0,
    )
    assert len(result.held_out_files) == 1
    assert len(result.train) == 99


def test_one_large_file_is_held_out_only_up_to_the_limit():
    keys = [ExampleKey("large file", str(n).encode(), 50, b"") for n in range(1500)]
    result = split(
        keys, signatures_of([None] * len(keys)), held_out_fraction=1.0, seed=0, purpose=DatasetPurpose.EVALUATION
    )
    assert len(result.held_out) == HELD_OUT_MAX_EXAMPLES
    assert (result.held_out[0], result.held_out[-1] > 1400) == (0, True)


@given(keys=st.one_of(KEYS, KEYS_WITH_ANSWERS), seed=st.integers(0, 99))
def test_an_evaluation_has_no_training_set(keys: list[ExampleKey], seed: int):
    signatures = signatures_of([None] * len(keys))
    result = split(keys, signatures, held_out_fraction=1, seed=seed, purpose=DatasetPurpose.EVALUATION)
    assert result.train == []
    assert len(result.held_out) == len({key.digest for key in keys})


@given(keys=st.one_of(KEYS, KEYS_WITH_ANSWERS), seed=st.integers(0, 99))
def test_the_split_does_not_depend_on_the_order(keys: list[ExampleKey], seed: int):
    shuffled = keys.copy()
    random.Random(seed).shuffle(shuffled)  # noqa: S311 - no cryptography here
    first, second = (
        split_distinct(order, held_out_fraction=0.2, seed=seed).held_out_files for order in (keys, shuffled)
    )
    assert first == second


def keys_of(files: int, examples: int, tokens: int = 100) -> list[ExampleKey]:
    return [
        ExampleKey(f"f{f}", hashlib.sha256(f"{f} {e}".encode()).digest(), tokens)
        for f in range(files)
        for e in range(examples)
    ]


def test_about_the_requested_fraction_is_held_out():
    for seed in range(20):
        assert 0.08 <= len(split_distinct(keys_of(60, 10), held_out_fraction=0.1, seed=seed).held_out) / 600 <= 0.13


def test_an_additional_file_does_not_reshuffle_the_others():
    for seed in range(20):
        before = set(split_distinct(keys_of(100, 5), held_out_fraction=0.1, seed=seed).held_out_files)
        after = set(split_distinct(keys_of(101, 5), held_out_fraction=0.1, seed=seed).held_out_files)
        assert len(before - after) <= 1


@pytest.mark.slow
def test_the_held_out_set_stays_small_for_a_large_source():
    assert (
        len(split_distinct(keys_of(5_000, 5), held_out_fraction=0.1, seed=0).held_out) <= HELD_OUT_MAX_EXAMPLES * 1.25
    )


def test_another_seed_holds_out_other_files():
    assert (
        len(
            {
                tuple(split_distinct(keys_of(50, 5), held_out_fraction=0.1, seed=seed).held_out_files)
                for seed in range(10)
            }
        )
        > 5
    )


# --- near duplicates -----------------------------------------------------------------------------------------------


def similarity(first: str, second: str) -> float:
    """Return the exact similarity that the signatures estimate."""
    runs = [
        {tuple(words[n : n + 5]) for n in range(max(1, len(words) - 4))}
        for words in (re.findall(r"\w+|[^\w\s]", text) for text in (first, second))
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def is_near(first: str, second: str) -> bool:
    return signatures_of([first, second]).representatives([0, 1])[1] == 0


CODE = textwrap.dedent(inspect.getsource(json.decoder.JSONObject))


@pytest.mark.parametrize(
    "change",
    [
        lambda code: code,
        lambda code: code.replace("    ", "\t"),
        lambda code: code.replace("\n\n", "\n"),
        lambda code: re.sub(r"def \w+", "def renamed", code, count=1),
        lambda code: code + "\n# one more comment\n",
        lambda code: "@cached\n" + code,
        lambda code: code.replace("end += 1", "end += 2", 1),
    ],
)
def test_a_copied_and_slightly_edited_function_is_a_near_duplicate(change):
    assert is_near(CODE, change(CODE))


@pytest.mark.parametrize(
    "other",
    [
        textwrap.dedent(inspect.getsource(json.decoder.JSONArray)),
        textwrap.dedent(inspect.getsource(json.decoder.py_scanstring)),
        CODE[: len(CODE) // 2],
        re.sub(r"\bend\b", "position", CODE),  # a variable renamed throughout teaches another name
        "",
    ],
)
def test_other_code_is_not_a_near_duplicate(other: str):
    assert not is_near(CODE, other)


@pytest.mark.parametrize("words", [1, 3, 5, 8])
def test_short_texts_are_near_duplicates_only_if_they_are_equal(words: int):
    text = " ".join(f"word{n}" for n in range(words))
    assert is_near(text, text)
    assert not is_near(text, text.replace("word0", "other"))


def test_an_example_without_text_has_no_near_duplicates():
    assert signatures_of([None, None, "", "  \n"]).representatives(range(4)) == {0: 0, 1: 1, 2: 2, 3: 3}


def family(seed: int, members: int = 12) -> list[str]:
    """Return texts each of which is made from an earlier one by changing some words."""
    draw = random.Random(seed)  # noqa: S311 - no cryptography here
    texts = [[f"w{draw.randrange(10_000)}" for _ in range(60)] for _ in range(3)]
    while len(texts) < members:
        words = draw.choice(texts).copy()
        for _ in range(draw.choice([0, 1, 2, 4, 10, 30])):
            words[draw.randrange(len(words))] = f"w{draw.randrange(10_000)}"
        texts.append(words)
    return [" ".join(words) for words in texts]


def test_minhash_agrees_with_exact_jaccard_up_to_its_error():
    missed = spurious = 0
    for seed in range(40):
        texts = family(seed)
        representatives = signatures_of(texts).representatives(range(len(texts)))
        for position, text in enumerate(texts):
            nearest = max((similarity(text, earlier) for earlier in texts[:position]), default=0.0)
            missed += nearest >= THRESHOLD + 0.15 and representatives[position] == position
            spurious += representatives[position] != position and nearest < THRESHOLD - 0.15
    assert (missed, spurious) == (0, 0)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), files=st.integers(2, 6))
def test_no_two_remaining_examples_are_near_duplicates(seed: int, files: int):
    texts = [text for part in range(4) for text in family(4 * seed + part)]
    draw = random.Random(seed)  # noqa: S311 - no cryptography here
    keys = [ExampleKey(f"f{draw.randrange(files)}", hashlib.sha256(text.encode()).digest(), 60) for text in texts]
    signatures = signatures_of(texts)
    result = split(keys, signatures, held_out_fraction=0.3, seed=seed)
    remaining = [*result.train, *result.held_out]
    assert signatures.representatives(remaining) == {position: position for position in remaining}
    for position in set(range(len(texts))) - set(remaining):
        copied = any(keys[position].digest == keys[other].digest for other in remaining)
        assert copied or any(is_near(texts[other], texts[position]) for other in remaining), (
            "the example was excluded without a reason"
        )
    assert len(remaining) + result.duplicates + result.near_duplicates == len(texts)
    assert {keys[n].file for n in result.train}.isdisjoint({keys[n].file for n in result.held_out})


def test_a_near_duplicate_of_a_training_example_is_never_held_out():
    texts = [*family(1, members=3), *family(2, members=3)]
    near_copy = texts[0].replace(texts[0].split()[7], "changed")
    keys = [
        ExampleKey(f"f{n}", hashlib.sha256(text.encode()).digest(), 60) for n, text in enumerate([*texts, near_copy])
    ]
    for seed in range(20):
        result = split(keys, signatures_of([*texts, near_copy]), held_out_fraction=0.5, seed=seed)
        assert {0, 6}.isdisjoint(result.held_out)
        assert (result.train.count(0), result.train.count(6), result.near_duplicates) == (1, 0, 1)


def test_a_chain_of_near_duplicates_does_not_empty_the_held_out_set():
    """The middle text is similar to the first and to the last, but the first and the last differ."""
    words = [f"w{n}" for n in range(200)]
    first, last = words.copy(), words.copy()
    for n in range(4):
        first[10 + 20 * n] = f"first{n}"
        last[100 + 20 * n] = f"last{n}"
    texts = [" ".join(text) for text in (first, words, last)]
    assert is_near(texts[0], texts[1])
    assert is_near(texts[1], texts[2])
    signatures = signatures_of([*texts, *family(3, members=3)])
    keys = [ExampleKey(file, bytes([n]), 200) for n, file in enumerate(("a", "b", "c", "d", "e", "f"))]
    for seed in range(30):
        result = split(keys, signatures, held_out_fraction=0.5, seed=seed)
        assert result.held_out
        assert signatures.representatives([*result.train, *result.held_out]).items() == {
            (n, n) for n in (*result.train, *result.held_out)
        }


@pytest.mark.slow
def test_many_variations_of_one_text_do_not_take_quadratic_time():
    words = [f"w{n}" for n in range(300)]
    texts = [" ".join([*words[:n], f"x{n}", *words[n + 1 :]]) for n in range(300)] * 10
    representatives = signatures_of(texts).representatives(range(len(texts)))
    assert set(representatives.values()) == {0}


# --- by time -------------------------------------------------------------------------------------------------------


def test_a_split_by_time_holds_out_uncommitted_files_and_then_the_newest():
    keys = keys_of(20, 5)
    changed = {f"f{n}": 1000 + n for n in range(20) if n != 3}
    result = split(keys, signatures_of([None] * len(keys)), held_out_fraction=0.15, seed=0, changed=changed)
    assert set(result.held_out_files) == {"f3", "f19", "f18"}


def committed(root: Path, *commits: Sequence[str]) -> Path:
    root.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-C", root]
    subprocess.run([*git, "init"], check=True, capture_output=True)
    for number, names in enumerate(commits):
        for name in names:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(f"{name} = {number}\n")
        at = {**os.environ, "GIT_COMMITTER_DATE": f"2026-01-{number + 1:02}T00:00:00Z"}
        subprocess.run([*git, "add", "."], check=True, capture_output=True)
        subprocess.run([*git, "commit", "-m", "x"], check=True, capture_output=True, env=at)
    return root


def test_last_change_times_come_from_the_git_history(tmp_path: Path):
    names = ["a.py", "with space.py", "ünïcode.py", "sub/b.py"]
    root = committed(tmp_path / "r", names, ["a.py"], ["sub/b.py", "line\nend.py"])
    (root / "new.py").write_text("new = 1\n")
    times = last_change_times([root])[0]
    order = sorted(times, key=lambda name: (times[name], name))
    assert order == ["with space.py", "ünïcode.py", "a.py", "line\nend.py", "sub/b.py"]
    assert set(last_change_times([root])[0]) == set(times)
    with pytest.raises(DataError, match="a single commit was the last"):
        last_change_times([root / "sub"])


def test_deleted_files_do_not_count_for_a_split_by_time(tmp_path: Path):
    root = committed(tmp_path / "r", ["old.py"], ["a.py", "b.py"])
    assert set(last_change_times([root])[0]) == {"old.py", "a.py", "b.py"}
    (root / "old.py").unlink()
    with pytest.raises(DataError, match="a single commit was the last to change all of them") as caught:
        last_change_times([root])
    assert caught.value.code == "no_history"


def test_a_split_by_time_without_a_history_is_refused(tmp_path: Path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"has none.*held_out_by = 'file'") as caught:
        last_change_times([tmp_path / "plain"])
    assert caught.value.code == "no_history"


def test_a_shallow_history_is_refused(tmp_path: Path):
    root = committed(tmp_path / "r", ["a.py"], ["b.py"], ["a.py"])
    clone = ["git", "clone", "--depth", "1", f"file://{root}", str(tmp_path / "clone")]
    subprocess.run(clone, check=True, capture_output=True)
    with pytest.raises(DataError, match="fetch --unshallow") as caught:
        last_change_times([tmp_path / "clone"])
    assert caught.value.code == "shallow_history"
