"""Lexical search over units."""

from __future__ import annotations

from peft_core.retrieval.units import CodeUnit
from peft_core.retrieval.worker.index import UnitIndex

UNITS = [
    CodeUnit("store.py", "python", 1, 2, "def open_store(path):\n    return Store(path)\n"),
    CodeUnit("web.py", "python", 1, 2, "def sendRequest(url):\n    return HTTPClient().send(url)\n"),
    CodeUnit("odd.py", "python", 1, 1, "1 + 1\n"),
]


def test_units_with_the_words_of_the_query_come_first() -> None:
    index = UnitIndex(UNITS)
    assert index.best("client.send_request(", 2)[0].path == "web.py"
    assert index.best("the store is opened: open_store", 2)[0].path == "store.py"


def test_a_unit_is_found_by_its_path() -> None:
    assert UnitIndex(UNITS).best("odd", 3) == [UNITS[2]]


def test_nothing_is_found_that_shares_no_word() -> None:
    index = UnitIndex(UNITS)
    assert index.best("zebra", 3) == []
    assert index.best("", 3) == []
    assert UnitIndex([]).best("store", 3) == []
