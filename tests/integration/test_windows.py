"""Whole held-out files in windows: each position is measured once, with enough before it, as greedy decoding would write it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.evaluation.worker.windows import Window, choose_windows, score_windows
from peft_core.modeling.objective import probe_fast_paths
from peft_core.schemas.dataset import HeldOutFile
from peft_core.schemas.evaluation import InFileMetric
from peft_core.system.cancellation import StopFlag
from tests.tiny_models import VOCABULARY, tiny_model, write_tiny_tokenizer

NAMES = frozenset({"read_unit", "unit_of"})


def make_file(number: int, functions: int = 12) -> HeldOutFile:
    text = "".join(
        f"def walk_{number}_{n}(path):\n    unit = read_unit(path)\n    return unit_of(unit)\n\n"
        for n in range(functions)
    )
    return HeldOutFile(path=f"m{number}.py", language="python", text=text, rows=((0, 4 * functions - 8),))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def model(tokenizer: BaseTokenizer) -> PreTrainedModel:
    """A model that has learned some of the lines."""
    model = tiny_model()
    model.requires_grad_(requires_grad=True)
    text = make_file(0).text
    ids_BT = torch.tensor([tokenizer.ids(text[start : start + 220]) for start in range(0, 180, 30)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    return model.requires_grad_(requires_grad=False).eval()


def choose(tokenizer: BaseTokenizer, *, budget: int = 100_000, length: int = 240) -> list[Window]:
    files = [make_file(number) for number in range(3)]
    return choose_windows(files, NAMES, tokenizer, length=length, budget=budget, seed=0)


def text_of(ids: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in ids)


def test_each_position_is_measured_once_with_half_a_window_before_it(tokenizer: BaseTokenizer) -> None:
    windows = choose(tokenizer)
    long = [window for window in windows if InFileMetric.LINES_AFTER_20 not in window.targets[0].metrics]
    measured = [(window.path, target.row, target.is_name) for window in long for target in window.targets]
    assert len(measured) == len(set(measured))
    assert {row for path, row, _ in measured if path == "m1.py"} == {r for r in range(1, 40) if r % 4 != 3}
    for window in long:
        assert len(window.document) <= 240
        header = len(tokenizer.ids(f"# {window.path}\n"))
        for target in window.targets:
            whole_prefix = sum(map(len, make_file(int(window.path[1])).text.splitlines(keepends=True)[: target.row]))
            assert target.first - header >= min(whole_prefix, (240 - header) // 2)


def test_windows_with_little_context_have_twenty_lines_and_no_path(tokenizer: BaseTokenizer) -> None:
    windows = choose(tokenizer, length=900)
    short = [window for window in windows if InFileMetric.LINES_AFTER_20 in window.targets[0].metrics]
    assert short
    for window in short:
        first = window.targets[0]
        before = text_of(window.document.ids_T[: first.first].tolist())
        assert before.count("\n") == 20
        assert not before.startswith("#")


def test_the_budget_is_spread_over_the_files(tokenizer: BaseTokenizer) -> None:
    windows = choose(tokenizer, budget=1200)
    assert sum(len(window.document) for window in windows) <= 1200
    assert {window.path for window in windows} == {"m0.py", "m1.py", "m2.py"}
    assert [w.path for w in windows] == [w.path for w in choose(tokenizer, budget=1200)]
    assert choose(tokenizer, budget=10) == []


def greedy(model: PreTrainedModel, window: Window, first: int, tokens: int) -> list[int]:
    """Write tokens after the first tokens of a window, one by one."""
    ids = window.document.ids_T[:first].tolist()
    for _ in range(tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[first:]


def test_a_line_is_exact_if_greedy_decoding_writes_it(tokenizer: BaseTokenizer, model: PreTrainedModel) -> None:
    windows = choose(tokenizer, budget=900)
    objective = probe_fast_paths(model, 240)
    with torch.no_grad():
        scores = score_windows(objective, windows, tokenizer, Accelerator(cpu=True), StopFlag())
        expected = dict.fromkeys(InFileMetric, 0)
        for window in windows:
            for target in window.targets:
                written = text_of(greedy(model, window, target.first, target.last - target.first + 1))
                real = text_of(window.document.ids_T[target.first : target.last].tolist())
                after = written.removeprefix(real)
                ends = not (after[:1].isalnum() or after[:1] == "_") if target.is_name else after.startswith("\n")
                for metric in target.metrics:
                    expected[metric] += written.startswith(real) and ends
    counted = {metric: sum(score.right for score in scores if score.metric is metric) for metric in InFileMetric}
    assert counted == expected
    assert 0 < counted[InFileMetric.LINES] < sum(s.positions for s in scores if s.metric is InFileMetric.LINES)
