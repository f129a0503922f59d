"""Tests of what is excluded from a dataset: licence headers, data tables, and the excess of large files."""

from __future__ import annotations

import encodings.cp1251
import html.entities
import inspect
import json.decoder
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data.examples import FileResult, examples_from_file, is_data_table, keep_secrets
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.languages import language_of_file
from peft_core.data.split import FILE_MIN_TOKENS, FILE_SHARE, ExampleKey, cap_per_file, file_limit
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import File


def examples_of(path: Path) -> FileResult:
    language = language_of_file(path.name)
    assert language is not None
    file = File(path=path, name=path.name, language=language, size=path.stat().st_size)
    return examples_from_file(file, token_counter=EstimatedTokenCounter(), max_length=512, redact=keep_secrets)


def learned(result: FileResult) -> str:
    return "".join(segment.text for example in result.examples for segment in example.segments if segment.learn)


LICENCES = {
    "a.py": "#!/usr/bin/env python3\n# Copyright 2026 Some One\n#\n# Licensed under the Apache License, Version 2.0\n",
    "a.js": "/*\n * Copyright (c) Some One and affiliates.\n * This source code is licensed under the MIT license.\n */\n",
    "a.go": "// SPDX-License-Identifier: MIT\n// Copyright Some One\n",
    "a.rs": "// Copyright 2026 The Project Developers. See the COPYRIGHT file.\n",
    "a.rb": "# Copyright 2026 Some One\n# See the LICENSE for the rest of these words\n",
}
CODE = {
    "a.py": "import os\n\n\ndef area(width, height):\n    return width * height + os.getpid()\n",
    "a.js": "export function area(width, height) {\n  return width * height + process.pid;\n}\n",
    "a.go": "package shape\n\nfunc Area(width, height int) int {\n\treturn width * height\n}\n",
    "a.rs": "pub fn area(width: u32, height: u32) -> u32 {\n    width * height\n}\n",
    "a.rb": "def area(width, height)\n  width * height + Process.pid\nend\n",
}


@pytest.mark.parametrize("between", ["", "\n"])
@pytest.mark.parametrize("name", LICENCES)
def test_a_licence_header_is_not_learned_but_the_code_below_it_is(tmp_path: Path, name: str, between: str):
    if name == "a.rb" and not between:
        pytest.skip("without a grammar and a blank line, the header and the code are one paragraph")
    (tmp_path / name).write_text(LICENCES[name] + between + CODE[name])
    result = examples_of(tmp_path / name)
    assert result.left_out[ExclusionReason.LICENCE] == 1
    assert "opyright" not in learned(result)
    assert "width * height" in learned(result)


@pytest.mark.parametrize("name", CODE)
def test_all_code_of_a_file_without_a_licence_is_learned(tmp_path: Path, name: str):
    (tmp_path / name).write_text(CODE[name])
    result = examples_of(tmp_path / name)
    assert result.left_out == {}
    assert learned(result).split() == CODE[name].split()


def test_code_that_mentions_licences_is_learned(tmp_path: Path):
    (tmp_path / "a.py").write_text(
        "def licence_of(copyright):\n    # Copyright holders come first\n    return sorted(copyright)\n"
    )
    assert examples_of(tmp_path / "a.py").left_out == {}


@pytest.mark.parametrize("module", [encodings.cp1251, html.entities])
def test_data_tables_are_excluded_but_the_functions_next_to_them_are_not(module):
    result = examples_of(Path(inspect.getfile(module)))
    assert result.left_out[ExclusionReason.DATA] >= 5
    text = learned(result)
    assert text.count("\n") < 100
    if module is encodings.cp1251:
        assert "class IncrementalEncoder" in text


TABLES = {
    "numbers": "CODES = [\n" + "    0x10, 0x22, 0x35, 0x44, 17, 18, 19, 20,\n" * 8 + "]\n",
    "words": "NAMES = {\n" + "\n".join(f"    'name_{n}': 'value {n}'," for n in range(20)) + "\n}\n",
    "encoded": 'IMAGE = "' + "iVBORw0KGgoAAAANSUhEUgAA" * 20 + '"\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_literals_is_a_data_table(name: str):
    assert is_data_table(TABLES[name])


@pytest.mark.parametrize(
    "text",
    [
        inspect.getsource(json.decoder),
        inspect.getsource(test_a_licence_header_is_not_learned_but_the_code_below_it_is),
        "COLOURS = ['red', 'green', 'blue']\n",
        "__all__ = [\n    'area',\n    'width',\n]\n",
        "",
    ],
)
def test_code_is_not_a_data_table(text: str):
    assert not is_data_table(text)


def keys_of(files: dict[str, list[int]]) -> list[ExampleKey]:
    return [
        ExampleKey(file, f"{file} {n}".encode(), size) for file, sizes in files.items() for n, size in enumerate(sizes)
    ]


def test_a_giant_file_does_not_dominate_the_training_set():
    keys = keys_of({"giant": [500] * 4000, **{f"f{n}": [200] * 20 for n in range(100)}})
    remaining = cap_per_file(keys, range(len(keys)))
    of_giant = [position for position in remaining if keys[position].file == "giant"]
    total_tokens = sum(keys[position].tokens for position in remaining)
    assert sum(keys[position].tokens for position in of_giant) == pytest.approx(
        max(FILE_MIN_TOKENS, FILE_SHARE * total_tokens), rel=0.02
    )
    assert len(remaining) - len(of_giant) == 2000
    assert of_giant[0] < 40, "the beginning of the file is missing"
    assert of_giant[-1] > 3960, "the end of the file is missing"


def test_the_file_limit_does_not_cut_a_small_project():
    keys = keys_of({"one": [400] * 100, "two": [400] * 40, "three": [100]})
    assert sum(key.tokens for key in keys if key.file == "one") <= FILE_MIN_TOKENS
    assert cap_per_file(keys, range(len(keys))) == list(range(len(keys)))


SIZES = st.lists(st.integers(1, 100_000_000) | st.integers(1, 200_000), min_size=1, max_size=60)


@given(SIZES)
def test_the_file_limit_is_the_largest_by_which_no_file_exceeds_its_share(sizes: list[int]):
    def allowed(limit: float) -> float:
        return max(FILE_MIN_TOKENS, FILE_SHARE * sum(min(size, limit) for size in sizes))

    limit = file_limit(sizes)
    assert limit <= allowed(limit) * (1 + 1e-9)
    if limit < max(sizes):
        assert all(allowed(limit * more) < limit * more for more in (1.001, 1.5, 10, 1000))


def test_a_giant_file_next_to_small_ones_gives_the_guaranteed_minimum():
    assert file_limit([900_000, *[1_000] * 100]) == FILE_MIN_TOKENS
    assert file_limit([9_000_000, *[10_000] * 100]) == pytest.approx(1_000_000 / 9)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(8, 8192), max_size=200), min_size=1))
def test_no_file_gives_much_more_than_its_share(files: dict[str, list[int]]):
    keys = keys_of(files)
    remaining = cap_per_file(keys, range(len(keys)))
    limit = file_limit([sum(sizes) for sizes in files.values()])
    for file, sizes in files.items():
        count = sum(keys[position].file == file for position in remaining)
        assert count == len(sizes) or count <= len(sizes) * limit / sum(sizes)
        assert bool(count) == bool(sizes)
