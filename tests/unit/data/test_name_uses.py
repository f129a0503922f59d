"""Where names are used, and where they are chosen; and which rows are prose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.languages import language_named
from peft_core.data.name_uses import NameUse, read_syntax


def uses_of(text: str, language: str = "python") -> list[NameUse]:
    return read_syntax(text, language_named(language)).uses


def test_uses_are_identifiers_and_not_words_in_comments_or_strings() -> None:
    text = 'def open_all(file):\n    # open_all is \u00e4 comment\n    return open_all(file, "open_all")\n'
    found = [(text[use.start : use.end], use.is_definition) for use in uses_of(text)]
    assert found == [("open_all", True), ("file", True), ("open_all", False), ("file", False)]


@pytest.mark.parametrize(
    ("language", "text", "used", "chosen"),
    [
        ("python", "call(max_size=2)\nsome.value_of(x_y)\n", "call max_size some value_of x_y", ""),
        ("python", "LIMIT = 3\nLIMIT = LIMIT + 1\n", "LIMIT LIMIT", "LIMIT"),
        ("python", "class Pool:\n    size_of: int\n", "int", "Pool size_of"),
        (
            "python",
            "def f(self, key: Kind = DEFAULT):\n    self.at_end = key\n",
            "Kind DEFAULT self key",
            "f self key at_end",
        ),
        (
            "java",
            "class A { void go(Order order) { client.fetchOrders(order); } }",
            "Order client fetchOrders order",
            "A go order",
        ),
        ("rust", "fn go(frame: Frame) -> usize { Frame::parse_it(frame) }", "Frame Frame parse_it frame", "go frame"),
        ("go", "package p\nfunc goOn(w http.Writer) { w.WriteAll(w) }", "p http Writer w WriteAll w", "goOn w"),
        ("c", "int frame_open(struct frame *f) { return frame_size(f); }", "frame frame_size f", "frame_open f"),
        (
            "typescript",
            "class A { load(key: Token) { return this.store.readKey(key); } }",
            "Token store readKey key",
            "A load key",
        ),
        (
            "php",
            "<?php function go_on($order) { return $order->fetchAll($order); }",
            "order order fetchAll order",
            "go_on",
        ),
    ],
)
def test_a_use_is_no_definition_in_any_language(language: str, text: str, used: str, chosen: str) -> None:
    uses = uses_of(text, language)
    assert [text[use.start : use.end] for use in uses if not use.is_definition] == used.split()
    assert [text[use.start : use.end] for use in uses if use.is_definition] == chosen.split()


def test_comments_docstrings_and_the_inside_of_long_strings_are_prose() -> None:
    text = "'''Doc.\n\nMore.\n'''\nx = '''a\nb'''  # c\n# d\ny = {\n    'e': 1,\n}\n"
    assert read_syntax(text, language_named("python")).prose == {0, 1, 2, 3, 5, 6}
    text = "/* a\n * b\n */\nint x = 1; /* c */\n// d\n"
    assert read_syntax(text, language_named("c")).prose == {0, 1, 2, 4}


@given(st.lists(st.sampled_from(["x_1", "\u00e4\u00f6_u", "=", "\n", "'\U0001f600'", " "])).map("".join))
def test_the_places_of_uses_are_characters_of_the_text(text: str) -> None:
    for use in uses_of(text):
        assert text[use.start : use.end].strip("_1\u00e4\u00f6ux") == ""
        assert use.start < use.end
