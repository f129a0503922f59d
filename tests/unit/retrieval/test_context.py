"""What is put before a prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.languages import LANGUAGES, NO_COMMENT, Language
from peft_core.retrieval.context import QUERY_LINES, as_comment, compose, last_lines
from peft_core.retrieval.units import CodeUnit


def unit(text: str, path: str = "a.py", language: str = "python") -> CodeUnit:
    return CodeUnit(path, language, 1, 1 + text.count("\n"), text)


def words_in(text: str) -> int:
    return len(text.split())


def test_units_are_comments_under_their_path_and_the_best_is_nearest_to_the_prompt() -> None:
    context = compose([unit("x = 1\n"), unit("\ny = 2\n", "b.py")], prompt="z", count=words_in, budget=100)
    assert context.text == "# b.py\n# y = 2\n\n# a.py\n# x = 1\n\n"
    assert [used.path for used, _ in context.units] == ["a.py", "b.py"]
    assert context.tokens == words_in(context.text)


def test_a_unit_that_is_too_long_makes_way_for_a_shorter_one_and_is_counted() -> None:
    context = compose([unit("x = 1\n" * 20), unit("y\n", "b.py")], prompt="", count=words_in, budget=10)
    assert [used.path for used, _ in context.units] == ["b.py"]
    assert context.too_long == 1


def test_what_the_prompt_contains_is_not_repeated() -> None:
    context = compose([unit("x = 1\n")], prompt="import a\nx = 1\n", count=words_in, budget=100)
    assert (context.text, context.units, context.too_long) == ("", (), 0)


@given(
    st.lists(st.text(max_size=60), max_size=5),
    st.integers(min_value=0, max_value=40),
    st.sampled_from(["python", "html", "go", "sql", "css"]),
)
def test_a_context_never_takes_more_than_its_budget(texts: list[str], budget: int, language: str) -> None:
    units = [unit(text, language=language) for text in texts]
    context = compose(units, prompt="prompt", count=words_in, budget=budget)
    assert context.tokens <= budget
    assert len(context.units) + context.too_long <= len(units)


@given(st.text(max_size=80), st.sampled_from([language for language in LANGUAGES if language.comment != NO_COMMENT]))
def test_no_code_escapes_from_its_comment(text: str, language: Language) -> None:
    opens, closes = language.comment
    lines = as_comment(unit(text), language).splitlines()
    for line in filter(None, lines):
        assert line.startswith(opens.rstrip())
        if closes:
            assert line.index(closes.strip(), len(opens.rstrip())) == len(line) - len(closes.strip())


def test_a_language_without_known_comments_gets_code() -> None:
    assert as_comment(unit("x"), Language("unheard of", NO_COMMENT)) == "x\n\n"


def test_a_prompt_is_searched_for_by_its_last_lines() -> None:
    lines = [f"line {number}" for number in range(QUERY_LINES + 5)]
    assert last_lines("\n\n".join(lines)) == "\n".join(lines[5:])
