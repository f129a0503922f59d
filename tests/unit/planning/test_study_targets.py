"""Which parts of an API a study plan proposes, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.data.prepare import prepare
from peft_core.data.records import parse
from peft_core.data.study.index import index_files
from peft_core.data.study.items import check_item
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import walk
from peft_core.errors import DataError, InvalidArgument
from peft_core.planning.planner import plan
from peft_core.planning.study_targets import MAX_TARGETS, study_plan
from peft_core.schemas.dataset import DataSource, SourceKind
from peft_core.schemas.study import StudyPlan, StudyPlanRequest
from peft_core.schemas.training import TrainingConfig
from tests.factories import make_dataset_spec

CORE = '''\
import json


def load(path):
    return parse(path, key="AKIAIOSFODNN7EXAMPLE")


def parse(text, key=None):
    """Parse it."""
    return json.loads(text)


def save(value):
    """Save it."""
    return load(str(value)), parse("x")


def _hidden():
    return load("a"), parse("b")
'''
TESTS = "from core import load\n\n\ndef test_load():\n    assert load('x')\n    assert load('y')\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    (root / "tests").mkdir(parents=True)
    (root / "core.py").write_text(CORE)
    (root / "tests" / "test_core.py").write_text(TESTS)
    return root


def plan_of(root: Path, **further: Any) -> StudyPlan:
    repository = DataSource(path=root, kind=SourceKind.REPOSITORY)
    data_dir = root.parent / "data"
    return study_plan(StudyPlanRequest(project_id="p", repositories=(repository,), data_dir=data_dir, **further))


def test_what_is_called_most_and_undocumented_comes_first(root: Path) -> None:
    plan = plan_of(root)
    assert [target.study for target in plan.targets] == ["core.load", "core.parse", "core._hidden", "core.save"]
    load = plan.targets[0]
    assert load.reasons == ["called 4 times in the repository", "undocumented"]
    assert load.signature == "def load(path)"
    assert load.callers == [
        "core.save (core.py:15)",
        "core._hidden (core.py:19)",
        "tests.test_core.test_load (tests/test_core.py:5)",
    ]
    assert load.usage == ['return load(str(value)), parse("x")', 'return load("a"), parse("b")', "assert load('x')"]
    assert [(pair.first, pair.second, pair.together) for pair in plan.pairs] == [("core.load", "core.parse", 2)]


def test_calls_of_a_name_that_the_language_has_say_little(root: Path) -> None:
    (root / "shelf.py").write_text(
        "class Shelf:\n    def exists(self):\n        return True\n\n    def put_on(self, book):\n        return book\n"
    )
    uses = "".join(f"def use_{n}(path, shelf):\n    return path.exists(), shelf.put_on({n})\n\n" for n in range(9))
    (root / "use.py").write_text(uses)
    plan = plan_of(root)
    names = [target.study for target in plan.targets]
    assert names.index("shelf.Shelf.put_on") < names.index("shelf.Shelf.exists")
    exists = next(target for target in plan.targets if target.study == "shelf.Shelf.exists")
    assert exists.reasons[0] == "called 9 times in the repository (a name that the language has as well)"
    assert all("exists" not in pair.first + pair.second for pair in plan.pairs)


def test_no_secret_and_no_test_is_proposed(root: Path) -> None:
    plan = plan_of(root)
    assert "AKIA" not in plan.model_dump_json()
    assert not any("test" in target.study for target in plan.targets)


def test_the_example_passes_the_check(root: Path) -> None:
    example = plan_of(root).example
    assert check_item(parse(example, "example"), index_files(walk(root).files, [root])) == example["study"]


def test_a_plan_is_bounded(root: Path) -> None:
    (root / "many.py").write_text("\n\n".join(f"def work_{n}(total):\n    return total * {n}" for n in range(200)))
    plan = plan_of(root)
    assert len(plan.targets) == MAX_TARGETS
    assert plan.definitions == 204


def test_what_is_new_since_the_training_comes_first(root: Path, tmp_path: Path) -> None:
    (root / "more.py").write_text("\n\n".join(f"def work_{n}(total):\n    return total * {n}" for n in range(20)))
    adapter = tmp_path / "adapter"
    prepare(make_dataset_spec(root), directory=adapter, token_counter=EstimatedTokenCounter(), report=lambda _: None)
    (root / "core.py").write_text(
        CORE.replace("return load(str(value))", "return load(repr(value))") + "\n\ndef fresh(a):\n    pass\n"
    )
    plan = plan_of(root, adapter=adapter)
    changed = {target.study for target in plan.targets if target.changed}
    assert changed == {"core.fresh", "core.save"}
    assert plan.compared_with == "adapter"
    assert plan.targets[0].reasons[0] == "new or changed since the latest training"


def test_a_directory_without_an_api_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "run.py").write_text("print(1)\n")
    with pytest.raises(DataError, match="defines no function") as caught:
        plan_of(tmp_path / "code")
    assert caught.value.code == "no_api"


def test_a_forbidden_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "inside").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match="the data directory of peft-mcp"):
        study_plan(
            StudyPlanRequest(
                project_id="p",
                repositories=(DataSource(path=tmp_path / "data" / "inside", kind=SourceKind.REPOSITORY),),
                data_dir=tmp_path / "data",
            )
        )


def test_study_items_without_their_repository_are_refused(tmp_path: Path) -> None:
    records = [{"study": f"work_{n}", "question": "How?", "answer": f"Call `work_{n}`."} for n in range(60)]
    with pytest.raises(InvalidArgument, match="must be trained on together with it") as caught:
        plan(records, TrainingConfig(), Settings(data_dir=tmp_path), lambda *_: None)
    assert "config.more_sources" in caught.value.suggestions[0]
