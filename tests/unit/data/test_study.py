"""Study items: what counts as a name of the repository, and which items are used."""

from __future__ import annotations

import json
import keyword
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data.dataset import read_examples
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.prepare import prepare
from peft_core.data.records import parse
from peft_core.data.split import STUDY_PREFIX
from peft_core.data.study.definitions import components, module_of
from peft_core.data.study.index import RepositoryIndex, index_files
from peft_core.data.study.items import Drop, check_item
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import walk
from peft_core.errors import DataError
from peft_core.schemas.dataset import DatasetPurpose, DataSource, SourceKind, StudyUse
from tests.factories import make_dataset_spec

PYTHON = '''\
import json

import requests as web
from dataclasses import dataclass


@dataclass
class Options:
    retries: int = 3


class Client:
    """Talks to the service."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def fetch(self, path: str, *, timeout: float = 1.0) -> dict:
        reply = web.get(path, timeout=timeout)
        return json.loads(reply.text)

    def close(self) -> None:
        pass


def connect(url: str, **settings) -> Client:
    return Client(Options(**settings))


def _retry(action):
    return action()
'''
TYPESCRIPT = """\
export interface Shape { sides: number }

/** Makes a square. */
export function square(size: number): Shape {
  return { sides: 4 };
}

export const area = (shape: Shape): number => shape.sides;
"""
GO = """\
package store

import "fmt"

// Store keeps values.
type Store struct{ values map[string]string }

func (s *Store) Lookup(key string) string { return fmt.Sprint(s.values[key]) }

func Open(path string) *Store { return &Store{} }
"""
RUST = """\
pub struct Parser { depth: usize }

impl Parser {
    pub fn parse_all(&self, text: &str) -> usize { text.len() + self.depth }
}

pub fn make_parser(depth: usize) -> Parser { Parser { depth } }
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study") / "shop"
    files = {
        "src/shop/client.py": PYTHON,
        "src/shop/logging.py": "def setup(level):\n    return level\n",
        "web/shapes.ts": TYPESCRIPT,
        "store/store.go": GO,
        "parser/src/parser.rs": RUST,
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "go.mod").write_text("module example.com/shop\n")
    return root


@pytest.fixture(scope="module")
def index(root: Path) -> RepositoryIndex:
    return index_files(walk(root).files, [root])


def check(index: RepositoryIndex, study: str, answer: str, **more: str) -> str | Drop:
    return check_item(parse({"study": study, "question": "How?", "answer": answer, **more}, "line 1"), index)


def fenced(code: str, label: str = "python") -> str:
    return f"Like this:\n\n```{label}\n{code}\n```\n"


def test_definitions_have_the_names_by_which_people_call_them(index: RepositoryIndex) -> None:
    assert {"shop.client.Client.fetch", "shop.client.connect", "web.shapes.square", "web.shapes.area"} <= set(
        index.definitions
    )
    assert {"store.store.Store", "store.store.Lookup", "parser.src.parser.Parser.parse_all"} <= set(index.definitions)
    fetch = index.definitions["shop.client.Client.fetch"]
    assert (fetch.kind, fetch.documented, fetch.is_public) == ("method", False, True)
    assert fetch.signature == "def fetch(self, path: str, *, timeout: float = 1.0) -> dict"
    assert index.definitions["shop.client.Client"].documented
    assert index.definitions["web.shapes.square"].documented
    assert not index.definitions["shop.client._retry"].is_public


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("src/pkg/client.py", ("pkg", "client")),
        ("pkg/__init__.py", ("pkg",)),
        ("a.ts", ("a",)),
        ("src/index.ts", ("index",)),
    ],
)
def test_a_path_becomes_the_beginning_of_a_name(path: str, module: tuple[str, ...]) -> None:
    assert module_of(path) == module


@pytest.mark.parametrize("name", ["pkg.Client.fetch", "pkg::Client::fetch", "pkg/Client#fetch", "pkg\\Client->fetch()"])
def test_a_name_may_be_written_with_the_separators_of_any_language(name: str) -> None:
    assert components(name) == ("pkg", "Client", "fetch")


@pytest.mark.parametrize(
    "study", ["shop.client.Client.fetch", "Client.fetch", "fetch", "shop.Client.fetch", "Client::fetch"]
)
def test_an_item_may_leave_out_what_leads_to_its_api(index: RepositoryIndex, study: str) -> None:
    assert check(index, study, "Call `Client.fetch(path)`.") == "shop.client.Client.fetch"


GOOD = {
    "code in a fence": fenced(
        "from shop import connect\n\nclient = connect('x', retries=2)\nclient.fetch('/a', timeout=3).get('b')"
    ),
    "a name of a dependency": fenced("import json\nprint(json.dumps(connect('x').fetch('/a'), sort_keys=True))"),
    "what a dependency returns": fenced(
        "from pathlib import Path\np = Path('x')\nwith p.open() as f:\n    f.readinto(connect('x').fetch(p.as_posix()))"
    ),
    "a dependency of the repository": fenced(
        "import requests\nrequests.post('x').raise_for_status()\nconnect('x').fetch('y')"
    ),
    "names of its own": fenced(
        "class Mine:\n    def __init__(self, client):\n        self.inner = client\n\n    def go(self):\n"
        "        return self.inner.fetch('x')\n\nMine(connect('x')).go()"
    ),
    "a module of the language that the repository has, too": fenced(
        "import logging\nfrom shop.logging import setup\nsetup(1)\nlogging.getLogger('x').setLevel(connect('x').fetch('y'))"
    ),
    "a parameter that is called": fenced("def run(action):\n    return action(connect('x').fetch('y'))"),
    "text": "`Client.fetch(path)` returns a dict; see `src/shop/client.py`, `settings.toml` and `True`.",
    "the definition itself": fenced("def fetch(self, path):\n    return path"),
    "a shell command": "Run it after `connect`:\n\n```console\n$ pip install shop\n```",
}


@pytest.mark.parametrize("answer", GOOD.values(), ids=GOOD)
def test_an_answer_whose_names_all_exist_is_used(index: RepositoryIndex, answer: str) -> None:
    assert check(index, "Client.fetch", answer) == "shop.client.Client.fetch"


BAD = {
    "a method": (fenced("connect('x').fetch_everything()"), ExclusionReason.STUDY_UNKNOWN_NAME, "fetch_everything"),
    "a function": (fenced("disconnect(Client)"), ExclusionReason.STUDY_UNKNOWN_NAME, "disconnect"),
    "an import": (fenced("from shop.client import Pool\nconnect('x')"), ExclusionReason.STUDY_UNKNOWN_NAME, "Pool"),
    "a method after a default": (
        fenced("def f(client=None):\n    return client.reset() or connect('x')"),
        ExclusionReason.STUDY_UNKNOWN_NAME,
        "reset",
    ),
    "a package": (fenced("import shoppe\nconnect('x')"), ExclusionReason.STUDY_UNKNOWN_NAME, "shoppe"),
    "a keyword": (
        fenced("Client(None).fetch('x', deadline=1)"),
        ExclusionReason.STUDY_UNKNOWN_NAME,
        "fetch(deadline=…)",
    ),
    "in text": ("Call `fetch` and then `client.shutdown()`.", ExclusionReason.STUDY_UNKNOWN_NAME, "shutdown"),
    "in the second block": (
        fenced("connect('x')") + fenced("destroy()"),
        ExclusionReason.STUDY_UNKNOWN_NAME,
        "destroy",
    ),
    "a syntax error": (fenced("connect('x'"), ExclusionReason.STUDY_BROKEN_CODE, "line 1 of its python code"),
    "nothing": ("It is simple: just call it.", ExclusionReason.STUDY_NAMES_NOTHING, "names nothing"),
    "only the language": (fenced("print(len([1]))"), ExclusionReason.STUDY_NAMES_NOTHING, "names nothing"),
}


@pytest.mark.parametrize(("answer", "reason", "detail"), BAD.values(), ids=BAD)
def test_an_item_is_dropped_with_the_reason_and_the_name(
    index: RepositoryIndex, answer: str, reason: ExclusionReason, detail: str
) -> None:
    dropped = check(index, "Client.fetch", answer)
    assert isinstance(dropped, Drop)
    assert dropped.reason is reason
    assert detail in dropped.detail


@pytest.mark.parametrize(
    ("study", "language", "good", "invented"),
    [
        ("square", "ts", 'import { square } from "shop";\nsquare(2).sides.toFixed(1);', "square(2).corners();"),
        (
            "Open",
            "go",
            'import "fmt"\n\nfunc main() { fmt.Println(store.Open("a").Lookup("b")) }',
            'store.Open("a").Remove("b")',
        ),
        (
            "square",
            "ts",
            "class B {\n  go() {\n    return this.go(square(1));\n  }\n}",
            "class B { go() { return this.vanish(square(1)); } }",
        ),
        ("square", "ts", "async draw(size) {\n  return square(size).sides;\n}", "draw() { return square(1).corners; }"),
        (
            "make_parser",
            "rust",
            'use shop::make_parser;\nlet n = make_parser(2).parse_all("x");',
            "make_parser(2).parse_most()",
        ),
    ],
)
def test_answers_in_other_languages_are_checked_too(
    index: RepositoryIndex, study: str, language: str, good: str, invented: str
) -> None:
    assert isinstance(check(index, study, fenced(good, language)), str)
    dropped = check(index, study, fenced(invented, language))
    assert isinstance(dropped, Drop)
    assert dropped.reason is ExclusionReason.STUDY_UNKNOWN_NAME


def test_an_answer_with_a_language_is_code_as_a_whole(index: RepositoryIndex) -> None:
    assert check(index, "connect", "connect('x').fetch('y')", language="python") == "shop.client.connect"
    dropped = check(index, "connect", "Call connect('x').", language="python")
    assert isinstance(dropped, Drop)
    assert dropped.reason is ExclusionReason.STUDY_BROKEN_CODE


def test_a_name_that_means_several_things_has_to_say_which(root: Path, index: RepositoryIndex) -> None:
    twice = index_files([*walk(root).files], [root])
    other = twice.definitions["shop.client.connect"]._replace(qualified="shop.other.connect")
    twice.by_name["connect"].append(other)
    dropped = check(twice, "connect", "`connect(url)`")
    assert isinstance(dropped, Drop)
    assert "shop.client.connect, shop.other.connect: write more of the name" in dropped.detail
    assert check(index, "nowhere.Client.fetch", "`fetch`") != "shop.client.Client.fetch"


@settings(max_examples=25)
@given(name=st.from_regex(r"zq[a-z]{3,12}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name)))
def test_an_invented_call_never_passes(index: RepositoryIndex, name: str) -> None:
    for code in (f"{name}(1)", f"connect('x').{name}(1)", f"import {name}\nconnect('x')", f"value = Client.{name}"):
        dropped = check(index, "connect", fenced(f"connect('x')\n{code}"))
        assert isinstance(dropped, Drop)
        assert name in dropped.detail


@st.composite
def in_any_fence(draw: st.DrawFn, code: str) -> str:
    """Write code in Markdown, in a fence that may be long, indented, in a list, in a quotation, in another fence, or open."""
    mark, length = draw(st.sampled_from("`~")), draw(st.integers(3, 5))
    label = draw(st.sampled_from(["", "python", " Py", "{.python}", 'python title="a.py"']))
    closing = draw(st.sampled_from(["", mark * (length + draw(st.integers(0, 2)))]))
    indentation, code_indentation = draw(st.integers(0, 9)) * " ", draw(st.sampled_from([None, 0, 2, 6]))
    shown = textwrap.indent(code, indentation if code_indentation is None else code_indentation * " ")
    lines = [f"{indentation}{mark * length}{label}", shown, *([f"{indentation}{closing}"] if closing else [])]
    before = draw(st.sampled_from(["", "First:\n", "First:\n\n", "- First:\n", "1. First:\n\n", "# Title\n", "<p>\n"]))
    after = draw(
        st.sampled_from(["", "\nThat is all.", "\n\nThen call `connect`.", "\n\n```python\nconnect('x')\n```"])
    )
    text = f"{before}{chr(10).join(lines)}{after}"
    return draw(st.sampled_from([text, textwrap.indent(text, "> "), f"- {text}", f"``````md\n{text}\n``````"]))


@settings(max_examples=150)
@given(
    name=st.from_regex(r"zq[a-z]{3,12}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name)),
    data=st.data(),
)
def test_an_invented_call_passes_in_no_form_of_fence(index: RepositoryIndex, name: str, data: st.DataObject) -> None:
    call = data.draw(
        st.sampled_from([f"{name}(1)", f"client = connect('x')\nclient.{name}(1)", f"if connect('x'):\n    {name}()"])
    )
    answer = f"Use `connect`.\n\n{data.draw(in_any_fence(call))}"
    assert isinstance(check(index, "connect", answer), Drop), answer


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("`connect`\n\n```python\nconnect('x')\nclient.invented()\n````", "invented"),  # closed by a longer one
        ("`connect`\n\n1. First\n\n    ```python\n    invented()\n    ```", "invented"),
        ("`connect`\n\n1. First\n       ```\n       invented()\n       ```\nThen more.", "invented"),
        ("`connect`\n\n    invented()", "invented"),
        ("`connect`\n\n````\n```python\ninvented()\n```\n````", "invented"),
        ("`connect` and ``client.invented()``", "invented"),
        ("`connect` and `client.invented(1,\n2)`", "invented"),
        ("`connect`\n\n```python\nconnect('x')", "its fence '```python' is not closed"),
        ("`connect`\n\n```\nTraceback:\n```\n\n`client.invented()`", "invented"),
    ],
)
def test_code_is_found_however_it_is_fenced(index: RepositoryIndex, answer: str, problem: str) -> None:
    dropped = check(index, "connect", answer)
    assert isinstance(dropped, Drop)
    assert problem in dropped.detail


@pytest.mark.parametrize(
    "block",
    [
        "```\nTraceback (most recent call last):\n  File 'a.py', line 3\nKeyError: 3\n```",
        "```text\nclient.invented() failed\n```",
        "    | a table | of names |",
        '````python\ndef f():\n    """Example:\n\n    ```\n    connect(1)\n    ```\n    """\n````',
        '```python\ndef f():\n    """Example:\n\n    ```\n    connect(1)\n    ```\n    """\n```',
        "1. First\n   ```python\n   connect('x')\n   ```\n2. Then\n   - again\n\n     ~~~py\n     connect('y')\n     ~~~~",
    ],
)
def test_text_and_well_formed_fences_are_no_reason_to_drop_an_answer(index: RepositoryIndex, block: str) -> None:
    assert check(index, "connect", f"Call `connect`:\n\n{block}\n") == "shop.client.connect"


@given(answer=st.text(alphabet=st.sampled_from("`~\n ab.(){}:=xé'\"#python"), min_size=1).filter(str.strip))
def test_any_answer_is_used_or_dropped_with_a_reason(index: RepositoryIndex, answer: str) -> None:
    assert isinstance(check(index, "connect", answer), str | Drop)
    assert isinstance(check(index, "connect", answer, language="python"), str | Drop)


# -- in a dataset ------------------------------------------------------------------------------------------------------------


def code(root: Path) -> Path:
    for file in range(6):
        functions = [f"def work_{file}_{n}(total):\n    return total * {n} + {file}\n" for n in range(12)]
        (root / f"module_{file}.py").write_text("\n\n".join(functions))
    return root


def items(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def item(file: int, n: int, question: str) -> dict[str, str]:
    answer = fenced(f"{question} = work_{file}_{n}({file * 17 + n})\nprint({question})")
    return {"study": f"work_{file}_{n}", "question": question, "answer": answer}


def prepared(
    repository: Path, records: Path, out: Path, purpose: DatasetPurpose = DatasetPurpose.TRAINING
) -> StudyUse | None:
    more = (DataSource(path=records, kind=SourceKind.JSONL, name="items.jsonl"),)
    spec = make_dataset_spec(repository, source_name="r", more_sources=more, held_out_fraction=0.2, purpose=purpose)
    data = prepare(spec, directory=out, token_counter=EstimatedTokenCounter(), report=lambda _: None)
    return data.summary.study


def test_items_of_one_api_are_all_trained_on_or_all_held_out(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    lines = [
        item(file, n, question) for file in range(3) for n in range(4) for question in ("first", "second", "third")
    ]
    records = items(tmp_path / "items.jsonl", lines)
    study = prepared(code(tmp_path / "r"), records, tmp_path / "out")
    parts = {
        part: {
            each.path
            for each in read_examples(tmp_path / "out" / f"{part}.jsonl")
            if each.path.startswith(STUDY_PREFIX)
        }
        for part in ("train", "held_out")
    }
    assert parts["train"]
    assert parts["held_out"]
    assert not parts["train"] & parts["held_out"]
    assert f"{STUDY_PREFIX}r.module_0.work_0_0" in parts["train"] | parts["held_out"]
    assert study is not None
    assert (study.items, study.dropped, study.held_out_apis) == (36, (), len(parts["held_out"]))
    assert study.held_out >= study.held_out_apis


def test_dropped_items_are_counted_with_their_reasons(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    broken = {"study": "work_0_0", "question": "?", "answer": fenced("work_0_0(")}
    lines = [
        *(item(1, n, "first") for n in range(8)),
        broken,
        {**broken, "answer": "Just do."},
        {**broken, "study": "play"},
    ]
    study = prepared(code(tmp_path / "r"), items(tmp_path / "items.jsonl", lines), tmp_path / "out")
    assert study is not None
    assert [(each.reason, each.count, each.first) for each in study.dropped] == [
        ("study_item_of_unknown_api", 1, ("line 11",)),
        ("study_item_does_not_parse", 1, ("line 9",)),
        ("study_item_names_nothing", 1, ("line 10",)),
    ]
    assert study.in_words.startswith("Study items: 8 of 11 can be used: ")


def test_a_training_without_a_usable_item_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    lines = [{"study": "play", "question": f"{n}?", "answer": "Just do."} for n in range(9)]
    with pytest.raises(DataError, match="None of the 9 study items can be used") as caught:
        prepared(code(tmp_path / "r"), items(tmp_path / "items.jsonl", lines), tmp_path / "out")
    assert caught.value.code == "no_study_item"
    assert "'play', which the repository does not define" in caught.value.suggestions[0]


def test_without_study_items_nothing_is_said_about_them(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    lines = [{"question": f"{n}?", "answer": f"Number {n}."} for n in range(9)]
    assert prepared(code(tmp_path / "r"), items(tmp_path / "items.jsonl", lines), tmp_path / "out") is None
