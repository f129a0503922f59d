"""Tests of chunking: no line is lost or repeated, no chunk is too long, and units are those that a person would choose."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import types
from collections.abc import Sequence
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data import syntax
from peft_core.data.chunking import TokenBudget, split_lines
from peft_core.data.examples import Chunk, chunk_file, chunk_record
from peft_core.data.grammars import GRAMMARS
from peft_core.data.languages import LANGUAGES, Language, language_named, language_of_file
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Segment
from tests.unit.data.snippets import EXPECTED, SNIPPETS


class Words:
    """A token counter for which words, punctuation marks and runs of white space are tokens."""

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(re.findall(r"\w+|[^\w\s]|\s+", text)) for text in texts]

    fill_in_the_middle = None

    has_chat_template = True

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        return EstimatedTokenCounter().render_chat(conversation)


def chunks_of(text: str, language: Language, max_length: int = 64, path: str = "src/app.x") -> list[Chunk]:
    return chunk_file(split_lines(text), path=path, language=language, token_counter=Words(), max_length=max_length)[0]


def units_of(chunks: Sequence[Chunk]) -> list[tuple[Chunk, str]]:
    """Return each unit's first chunk with the text of all its chunks."""
    groups = [list(group) for _, group in groupby(chunks, key=lambda chunk: id(chunk.unit))]
    return [(group[0], "".join(chunk.body for chunk in group)) for group in groups]


def visible_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


SPLITTABLE = [language for language in LANGUAGES if language.name != "markdown"]
FRAGMENTS = [
    *(line for snippet in SNIPPETS.values() for line in snippet.split("\n")),
    "", "", "    ", "\t}", "}", "{", "(", ")]", '"""', "/*", "*/", "`${", "é" * 40, "x = " + "1 + " * 90, "\f", "\u2028;",
]  # fmt: skip
CODE = st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("\n".join) | st.text(max_size=300).map(
    lambda text: text.encode("utf-8", "replace").decode().replace("\r", "")
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=CODE, language=st.sampled_from(SPLITTABLE), max_length=st.sampled_from([64, 100, 400]))
def test_every_line_is_in_exactly_one_unit_and_every_chunk_fits(text: str, language: Language, max_length: int):
    chunks = chunks_of(text, language, max_length)
    assert visible_lines("\n".join(body.rstrip("\n") for _, body in units_of(chunks))) == visible_lines(text)
    assert all(chunk.tokens <= max_length for chunk in chunks)
    assert all(text.count(chunk.body) >= 1 for chunk in chunks)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=CODE, language=st.sampled_from(SPLITTABLE), max_length=st.sampled_from([64, 100]))
def test_the_chunks_of_a_unit_add_up_to_the_unit(text: str, language: Language, max_length: int):
    lines = split_lines(text)
    for first, body in units_of(chunks_of(text, language, max_length)):
        assert body == "".join(lines[first.unit.start : first.unit.end])
    chunks_of_record = chunk_record(
        lines, path="", language=language, kind="block", token_counter=Words(), max_length=max_length
    )
    assert "".join(chunk.body for chunk in chunks_of_record) == text


@settings(max_examples=100, deadline=None)
@given(text=CODE, language=st.sampled_from(SPLITTABLE), max_length=st.sampled_from([64, 100]))
def test_only_the_last_chunk_of_a_unit_has_an_end_token(text: str, language: Language, max_length: int):
    chunks = chunks_of(text, language, max_length)
    for _, group in groupby(chunks, key=lambda chunk: id(chunk.unit)):
        *others, last = group
        assert last.ends
        assert not any(chunk.ends for chunk in others)
    for chunk in chunks:
        example = chunk.example("src/app.x", language)
        assert example.ends is chunk.ends
        assert example.tokens == sum(Words().count([segment.text for segment in example.segments])) + chunk.ends


@settings(max_examples=100, deadline=None)
@given(text=CODE, language=st.sampled_from(SPLITTABLE))
def test_line_numbers_say_where_a_chunk_begins(text: str, language: Language):
    lines = split_lines(text)
    for chunk in chunks_of(text, language):
        first = chunk.body.split("\n")[0]
        assert first in lines[chunk.start]
        assert chunk.end - chunk.start == len(split_lines(chunk.body))


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_is_split_where_a_person_would_split_it(name: str):
    units = units_of(chunks_of(SNIPPETS[name], language_named(name), 64))
    actual = [(first.unit.kind, body) for first, body in units]
    for kind, beginning in EXPECTED[name]:
        assert any(k == kind and body.startswith(beginning) for k, body in actual), (kind, beginning, actual)


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language.grammar], ids=lambda it: it.name)
def test_every_node_type_of_a_table_exists_in_its_grammar(language: Language):
    grammar = language.grammar
    assert grammar is not None
    parser = syntax._parser(grammar)
    assert parser is not None
    parsed = parser._parser.language
    assert parsed is not None
    types = {
        name.split(":")[0]
        for field in dataclasses.fields(grammar)
        if field.name not in ("module", "function")
        for name in getattr(grammar, field.name)
    }
    assert [name for name in sorted(types) if parsed.id_for_node_kind(name, True) is None] == []


def test_a_method_has_its_path_and_class_header_as_context():
    chunks = chunks_of(SNIPPETS["python"], language_named("python"), 64, "src/shape.py")
    area = next(chunk for chunk in chunks if "def area" in chunk.body)
    assert area.context == "# src/shape.py\nclass Shape(Base):\n"
    example = area.example("src/shape.py", language_named("python"))
    assert [segment.learn for segment in example.segments] == [False, True]


def test_a_class_that_fits_is_one_unit():
    chunks = chunks_of(SNIPPETS["python"], language_named("python"), 400)
    assert any("@decorated" in chunk.body and "def deep" in chunk.body for chunk in chunks)


def test_a_continuation_of_a_long_function_has_its_header_as_context():
    text = "def long(a, b):\n" + "".join(f"    total += compute(a, {n})\n" for n in range(60))
    chunks = chunks_of(text, language_named("python"), 100, "x.py")
    assert len(chunks) > 5
    assert {chunk.context for chunk in chunks[1:]} == {"# x.py\ndef long(a, b):\n"}


def test_a_long_function_is_broken_between_statements_not_inside_one():
    statement = "    if a:\n        call(a, b, c)\n        call(d, e, f)\n"
    for chunk in chunks_of("def long():\n" + statement * 20, language_named("python"), 100)[1:]:
        assert chunk.body.startswith("    if a:")


def test_one_line_functions_share_an_example():
    text = "".join(f"def f{n}(): return {n}\n\n\n" for n in range(100))
    assert len(chunks_of(text, language_named("python"), 300)) < 20


def test_a_licence_header_is_a_unit_of_its_own():
    assert chunks_of(SNIPPETS["python"], language_named("python"), 400)[0].body == "# Copyright 2024 Someone\n"


def test_a_single_giant_line_is_split_by_characters():
    text = "x = [" + ", ".join(map(str, range(2_000))) + "]\n"
    chunks = chunks_of(text, language_named("python"), 64)
    assert "".join(chunk.body for chunk in chunks) == text
    assert {chunk.start for chunk in chunks} == {0}


def test_a_path_that_is_longer_than_the_example_is_shortened_from_the_left():
    chunks = chunks_of("x = 1\n", language_named("python"), 64, "/".join(["deep"] * 200) + "/app.py")
    assert chunks[0].context.endswith("/app.py\n")
    assert chunks[0].context.startswith("# \N{HORIZONTAL ELLIPSIS}/")
    assert chunks[0].tokens <= 64


def test_a_path_cannot_leave_its_comment():
    chunks = chunks_of("SELECT 1 FROM everything;\n", language_named("sql"), 64, "a\nDROP TABLE b;--.sql")
    assert chunks[0].context.count("\n") == 1
    assert chunks_of("<p>hello</p>\n", language_named("html"), 64, "a-->b.html")[0].context.count("-->") == 1


@pytest.mark.parametrize(
    ("name", "header"),
    [("a.py", "# a.py\n"), ("a.go", "// a.go\n"), ("a.sql", "-- a.sql\n"), ("a.html", "<!-- a.html -->\n"),
     ("a.css", "/* a.css */\n")],
)  # fmt: skip
def test_the_header_is_a_comment_of_the_language(name: str, header: str):
    language = language_of_file(name)
    assert language is not None
    assert chunks_of("x y z\n", language, 64, name)[0].context == header


def test_markdown_contributes_its_code_and_not_its_prose():
    text = "# Title\n\nProse.\n\n```python\nimport a\n```\n\n~~~\nno language\n~~~\n\n```sh\n$ ls\n"
    assert [chunk.body for chunk in chunks_of(text, language_named("markdown"))] == ["```python\nimport a\n```\n"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("python", "".join("    " * n + f"class C{n}:\n" for n in range(300))),
        ("python", "x = " + "(" * 5_000 + ")" * 5_000 + "\n"),
        ("python", "(\n" * 20_000),
        ("javascript", "class A { a = class {\n" * 3_000),
        ("cpp", "namespace a {\n" * 3_000 + "}\n" * 3_000),
        ("c", "#ifdef A\n" * 2_000 + "int x;\n" + "#endif\n" * 2_000),
    ],
)
def test_deep_nesting_is_split_in_reasonable_time(name: str, text: str):
    started = time.process_time()
    chunks = chunks_of(text, language_named(name))
    assert visible_lines("".join(body for _, body in units_of(chunks))) == visible_lines(text)
    assert time.process_time() - started < 20


def test_a_token_budget_keeps_the_innermost_heads():
    budget = TokenBudget.of([5] * 20, max_length=64, overhead=2)
    heads = tuple(range(n, n + 1) for n in range(10))
    assert budget.context(heads) == heads[-3:]
    assert budget.free_tokens(heads) == 64 - 2 - 15


def test_a_language_whose_grammar_is_not_installed_is_split_at_blank_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(syntax, "_parser", lambda grammar: None)
    chunks = chunks_of(SNIPPETS["kotlin"], language_named("kotlin"), 64)
    assert {chunk.unit.kind for chunk in chunks} == {"block"}
    assert visible_lines("".join(body for _, body in units_of(chunks))) == visible_lines(SNIPPETS["kotlin"])


def test_a_package_that_is_missing_or_made_for_another_tree_sitter_gives_no_parser(monkeypatch: pytest.MonkeyPatch):
    missing = dataclasses.replace(GRAMMARS["go"], module="tree_sitter_of_nobody")
    assert syntax._parser(missing) is None
    broken = types.SimpleNamespace(
        language=lambda: (_ for _ in ()).throw(ValueError("Incompatible Language version 99"))
    )
    monkeypatch.setitem(sys.modules, "tree_sitter_of_tomorrow", broken)
    assert syntax._parser(dataclasses.replace(GRAMMARS["go"], module="tree_sitter_of_tomorrow")) is None


@pytest.mark.parametrize("name", ["shell", "csharp", "html"])
def test_a_text_that_takes_too_long_to_parse_is_split_at_blank_lines(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(syntax, "_PARSE_LIMIT_S", 0.05)
    syntax._parser.cache_clear()
    text = "<a>" * 100_000 + "\n\nx\n"
    started = time.process_time()
    chunks = chunks_of(text, language_named(name), 400)
    syntax._parser.cache_clear()  # a grammar that refused texts is not used any more
    assert "".join(body for _, body in units_of(chunks)).split() == text.split()
    assert time.process_time() - started < 20


def test_a_grammar_that_took_too_long_several_times_is_not_asked_again(monkeypatch: pytest.MonkeyPatch):
    syntax._parser.cache_clear()
    monkeypatch.setattr(syntax, "_PARSE_LIMIT_S", -1.0)
    for _ in range(syntax._MAX_REFUSALS):
        assert syntax.parse_syntax(b"x = 1\n", GRAMMARS["python"]) is None
    monkeypatch.setattr(syntax, "_PARSE_LIMIT_S", 5.0)
    assert syntax.parse_syntax(b"x = 1\n", GRAMMARS["python"]) is None
    syntax._parser.cache_clear()
    assert syntax.parse_syntax(b"x = 1\n", GRAMMARS["python"]) is not None


DEFINITIONS = {  # functions, methods and classes of the snippets
    "python": 6, "javascript": 5, "typescript": 5, "go": 3, "rust": 5, "java": 5, "c": 3, "cpp": 4, "csharp": 8, "kotlin": 8,
    "php": 8, "ruby": 7, "shell": 2, "lua": 4, "sql": 3, "solidity": 9, "dart": 9, "elixir": 6, "haskell": 6, "zig": 5,
    "swift": 8, "scala": 7, "julia": 3, "vue": 4, "svelte": 2, "scss": 5, "terraform": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_functions_methods_and_classes_of_a_file_are_counted_however_they_are_merged(name: str):
    for max_length in (64, 4_000):
        _, definitions = chunk_file(
            split_lines(SNIPPETS[name]),
            path="",
            language=language_named(name),
            token_counter=Words(),
            max_length=max_length,
        )
        assert definitions == DEFINITIONS[name]


@pytest.mark.parametrize(
    ("name", "text", "definitions"),
    [
        ("python", "".join(f"def f{n}(): return {n}\n\n\n" for n in range(64)), 64),
        ("python", "print('a script without functions')\n", 1),
        ("python", "def outer():\n    def inner():\n        return 1\n    return inner\n", 1),
        ("protobuf", "message A {\n  int32 x = 1;\n\n  int32 y = 2;\n}\n\nmessage B {\n}\n", 2),
        ("markdown", "Text.\n\n```python\nimport a\n```\n\n```python\nimport b\n```\n", 2),
        ("python", "\n\n", 0),
    ],
)
def test_definitions_are_counted_as_a_person_counts_them(name: str, text: str, definitions: int):
    counted = chunk_file(
        split_lines(text), path="", language=language_named(name), token_counter=Words(), max_length=400
    )
    assert counted[1] == definitions


def test_a_script_in_a_page_is_split_in_its_own_language_and_its_rows_are_those_of_the_page():
    page = '<main></main>\n<script type="application/json">\n{"a": 1}\n</script>\n' + SNIPPETS["vue"]
    units = units_of(chunks_of(page, language_named("vue"), 64))
    add = next(first for first, body in units if body.startswith("// Adds a line."))
    assert add.unit.kind == "function"
    assert add.context.endswith('<script setup lang="ts">\n')
    assert split_lines(page)[add.start] == "// Adds a line.\n"
