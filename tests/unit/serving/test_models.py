"""Served names: each model has its own, whatever projects and base models are called."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.names import base_model_name
from peft_core.schemas.results import AdapterSummary
from peft_core.serving.models import served_models


def adapter_of(project_id: str, base_model: str, base_id: str = "") -> AdapterSummary:
    return AdapterSummary(
        adapter_id="a-01",
        project_id=project_id,
        current=True,
        created_at="",
        base_model=base_model,
        base_id=base_id,
        base_perplexity=None,
        adapter_perplexity=None,
        adapter_bytes=1,
        adapter_path="/a",
    )


Served = dict[tuple[str | None, str], str]


def names_of(*projects: tuple[str, str]) -> Served:
    models = served_models([adapter_of(*project) for project in projects])
    return {(model.project_id, model.base_model): model.name for model in models}


CODER = "Qwen/Qwen2.5-Coder-1.5B"
CLASHES = {
    "what a name leaves out": (("web", CODER), ("web-", CODER), ("web--", CODER)),
    "long ids": (("x" * 60, CODER), ("x" * 61, CODER), ("x" * 60 + "yz", CODER)),
    "a project called as the rest of a base model": (("instruct", CODER), ("web", f"{CODER}-Instruct")),
    "one basename": (("web", CODER), ("api", "copies/qwen2.5-coder-1.5b")),
    "two ways to divide a name": (("coder-web", "Qwen"), ("web", "Qwen-Coder")),
}


@pytest.mark.parametrize("projects", CLASHES.values(), ids=CLASHES)
def test_each_model_has_a_name_of_its_own_in_any_order(projects: tuple[tuple[str, str], ...]) -> None:
    served = names_of(*projects)
    assert set(served) == {*projects, *((None, base) for _, base in projects)}
    assert len(set(served.values())) == len(served)
    assert all(name.startswith(base_model_name(base)) for (_, base), name in served.items())
    assert all(names_of(*order) == served for order in permutations(projects))


def test_a_base_model_and_a_project_written_in_full_keep_their_names() -> None:
    served = names_of(("instruct", CODER), ("web", f"{CODER}-Instruct"), ("web-", f"{CODER}-Instruct"))
    assert served[None, f"{CODER}-Instruct"] == "qwen2.5-coder-1.5b-instruct"
    assert served["web", f"{CODER}-Instruct"] == "qwen2.5-coder-1.5b-instruct-web"


def test_two_base_models_that_are_called_the_same_are_both_served_beside_their_adapters() -> None:
    adapters = [adapter_of("new", "base", "1"), adapter_of("web", "base", "2"), adapter_of("old", "base", "1")]
    models = served_models(adapters)
    assert [model.name for model in models[:3]] == ["base-new", "base-web", "base-old"]
    assert [(model.loaded_with, model.project_id) for model in models[3:]] == [("new", None), ("web", None)]
    assert len({model.name for model in models}) == 5


PROJECT = st.from_regex(r"[ab-]{1,4}|a{59,62}", fullmatch=True)
BASE = st.from_regex(r"([ab]/)?[abAB-]{1,4}", fullmatch=True)


@given(st.dictionaries(PROJECT, BASE, max_size=8))
def test_names_are_unique(projects: dict[str, str]) -> None:
    served = names_of(*projects.items())
    assert len(set(served.values())) == len(served) == len(projects) + len(set(projects.values()))
