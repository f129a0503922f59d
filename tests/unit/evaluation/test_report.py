"""The report page and the loss curve."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.card import render_card
from peft_core.evaluation.loss_curve import HEIGHT, MAX_POINTS, WIDTH, LossCurve, layout_chart, loss_curve, render_png
from peft_core.evaluation.report import render_report, write_training_report
from peft_core.schemas.evaluation import Comparison, Continuation, Keep, Memorisation, Repetition, Verdict
from peft_core.schemas.events import Evaluated, Event, HeldOutMeasured, RateLowered, StepCompleted
from peft_core.schemas.training import TrainingConfig
from server.status_text import evaluation_text
from tests.factories import make_base, make_comparison, make_evaluation, make_manifest

VOID = {"meta", "br", "hr", "line", "circle", "polyline"}
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e{{ 7*7 }}\"'&"


def step_events(steps: int) -> list[Event]:
    return [
        StepCompleted(
            step=n, loss=2.5 - n / steps, learning_rate=1e-3, tokens=n, tokens_per_second=1, eta_s=1, memory_bytes=1
        )
        for n in range(1, steps + 1)
    ]


EVENTS = [
    HeldOutMeasured(step=0, loss=2.4),
    HeldOutMeasured(step=0, loss=2.3, whole_set=True),
    *step_events(40),
    HeldOutMeasured(step=20, loss=2.0),
]


class Page(HTMLParser):
    """Parses a page and checks that every tag is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(**changes: Any) -> tuple[str, Page]:
    request: dict[str, Any] = {
        "title": "web on SmolLM2",
        "subtitle": "Adapter a-01",
        "result": make_evaluation(),
        "curve": loss_curve(EVENTS),
        "tables": {"Data": {"files": "12"}},
        **changes,
    }
    text = render_report(**request)
    return text, Page(text)


def test_the_page_shows_verdict_measurements_and_quoted_completions() -> None:
    _, page = page_of()
    for expected in ("The adapter helps", "2.200", "1.800", "-0.400", "-0.500 to -0.300", "+5.0", "too little data"):
        assert expected in page.text
    assert "src/app.py, line 12" in page.text
    assert "return a + b" in page.text
    assert page.tags.count("polyline") == 3


def test_the_page_loads_no_resources_and_runs_no_scripts() -> None:
    text, page = page_of()
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\son[a-z]+=", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("verdict", list(Verdict))
def test_hostile_names_and_code_are_escaped_on_the_page(verdict: Verdict) -> None:
    hostile = Continuation(
        file=HOSTILE,
        line=1,
        prompt=HOSTILE,
        expected=HOSTILE,
        base=HOSTILE,
        adapter=HOSTILE,
        base_similarity=0,
        adapter_similarity=1,
    )
    evaluation = make_evaluation(verdict, gains=(hostile,), losses=(hostile,), reason=HOSTILE)
    tables = {"Data": {HOSTILE: HOSTILE}}
    text, page = page_of(title=HOSTILE, subtitle=HOSTILE, result=evaluation, tables=tables)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7*7 }}" in page.text


def test_the_page_of_a_comparison_has_columns_for_base_and_both_adapters() -> None:
    text, page = page_of(result=make_comparison(cautions=("The two were trained on different code",)), curve=None)
    for expected in (
        "Keep adapter B",
        "Keep web/b-02: its held-out loss is lower.",
        "The two were trained on different code",
        "base model, 60 % similar",
        "A, 50 % similar",
        "B, 100 % similar",
        "-0.400 to -0.200",
        "B is better",
        "-2.0 to +4.0 points",
        "A is web/a-01, B is web/b-02.",
        "3 that only A was trained on, 12 that both were trained on",
    ):
        assert expected in page.text
    (loss,) = [row for row in text.split("<tr>") if "Held-out loss" in row]
    assert re.findall(r'class="figure">(\S+?)<', loss) == ["2.200", "1.800", "1.500", "-0.300"]
    assert page.text.count("B is better") == 1, "only the loss differs by more than chance"


@pytest.mark.parametrize("keep", list(Keep))
def test_every_recommendation_has_a_heading_and_advice(keep: Keep) -> None:
    _, page = page_of(result=make_comparison(keep=keep, reason=HOSTILE), curve=None)
    assert not {"script", "img"} & set(page.tags)
    assert "Keep " in page.text


def test_missing_measurements_are_omitted_from_the_page() -> None:
    bare = make_evaluation(
        next_line=None, edit_similarity=None, general_loss=None, gains=(), losses=(), seen_in_training=None
    )
    text, page = page_of(result=bare, curve=None)
    assert "Loss during training" not in text
    assert "The adapter's training data is unknown" in page.text
    assert "none of which the adapter was trained on" not in text


def test_caveats_appear_on_page_card_and_status_line() -> None:
    general = Comparison(base=1.0, adapter=1.4, change=0.4, low=0.3, high=0.5)
    evaluation = make_evaluation(general_loss=general, forgets=True, chosen_on_part=True, seen_in_training=0.0)
    _, page = page_of(result=evaluation)
    for caveat in (
        "It forgets: the loss on general code rises by 0.400",
        "Early stopping chose the best state on a part",
    ):
        assert caveat in page.text
        assert caveat in evaluation_text(evaluation)
        assert caveat in render_card(
            make_manifest("a-01", config=TrainingConfig(rank=16, learning_rate=5e-4), evaluation=evaluation)
        )
    assert "training data is unknown" not in page.text
    assert make_evaluation().caveats == ()


def test_what_an_adapter_repeats_is_on_page_card_and_in_the_answer(tmp_path: Path) -> None:
    memorisation = Memorisation(
        prompts=48,
        tokens=50,
        base=Repetition(prompts=0, longest_tokens=14, longest_lines=1, text="import sys"),
        adapter=Repetition(prompts=3, longest_tokens=50, longest_lines=6, text=HOSTILE),
    )
    sentence = (
        "Of 48 beginnings of training units, the adapter continues 3 with 50 tokens of training text word for word "
        "(base model: 0). The longest run that it repeats is 50 tokens or more in 6 lines (base model: 14 tokens)."
    )
    evaluation = make_evaluation(memorisation=memorisation)
    path = write_training_report(tmp_path, make_manifest("a-01"), [*EVENTS, Evaluated(evaluation=evaluation)])
    assert path is not None
    page = Page(path.read_text())
    assert sentence in page.text
    assert "<script>alert(1)</script>" in page.text
    assert "script" not in page.tags
    assert sentence in evaluation_text(evaluation)
    assert HOSTILE not in evaluation_text(evaluation)
    config = TrainingConfig(rank=16, learning_rate=5e-4)
    card = render_card(make_manifest("a-01", config=config, evaluation=evaluation.without_texts))
    assert sentence in card
    assert "alert" not in evaluation.without_texts.model_dump_json()


def test_a_report_says_that_memorisation_was_not_measured(tmp_path: Path) -> None:
    path = write_training_report(tmp_path, make_manifest("a-01"), [*EVENTS, Evaluated(evaluation=make_evaluation())])
    assert path is not None
    assert "the training was too short for it" in Page(path.read_text()).text


@pytest.mark.parametrize(
    ("name", "named"), [("Qwen/Qwen2.5-Coder-0.5B", True), ("qwen2.5-coder:1.5b", False), ("hf.co/org/x:Q4_K_M", False)]
)
def test_a_card_names_a_base_only_as_the_hub_takes_it(name: str, named: bool) -> None:
    card = render_card(
        make_manifest("a-01", base=make_base(name=name), config=TrainingConfig(rank=16, learning_rate=5e-4))
    )
    assert (f"base_model: {name}\n" in card) is named
    assert f"a LoRA adapter for {name}" in card


def test_the_curve_of_a_run_with_a_rollback_contains_every_step_once() -> None:
    lowered = RateLowered(step=41, back_to_step=10, factor=0.25, reason="the loss is nan")
    again = [event.model_copy(update={"loss": 1.0}) for event in step_events(12)[10:]]
    curve = loss_curve([*EVENTS, lowered, *again])
    assert [step for step, _ in curve.steps] == list(range(1, 13))
    assert curve.steps[-1] == (12, 1.0)
    assert curve.held_out == ((0, 2.4),)
    assert loss_curve([]).is_empty


losses = st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=True)), min_size=1, max_size=50)


@given(losses, losses)
def test_every_point_of_a_chart_is_on_the_canvas(
    steps: list[tuple[int, float]], held_out: list[tuple[int, float]]
) -> None:
    bounded = [(step, loss) for step, loss in steps if not abs(loss) > 1e300]
    points = tuple(sorted(bounded))
    measured = tuple(sorted((step, loss) for step, loss in held_out if not abs(loss) > 1e300))
    chart = layout_chart(LossCurve(points, points, measured))
    for positions in chart.lines.values():
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in positions)
    assert len(chart.x_ticks) <= 12
    assert len(chart.y_ticks) <= 12


def test_a_long_curve_is_thinned_out_and_keeps_its_last_point() -> None:
    curve = loss_curve(step_events(5000))
    assert len(curve.steps) <= MAX_POINTS + 1
    assert curve.steps[-1][0] == 5000


def test_the_curve_has_the_loss_on_all_held_out_examples_before_and_after() -> None:
    measured = [HeldOutMeasured(step=step, loss=loss, whole_set=True) for step, loss in ((0, 2.5), (9, 1.5))]
    assert loss_curve([*EVENTS, *measured]).whole == ((0, 2.5), (9, 1.5))


def test_the_ticks_of_an_axis_have_equal_decimals() -> None:
    points = ((1, 2.5), (2, 3.0), (3, 3.5))
    assert [tick.label for tick in layout_chart(LossCurve(points, points, ())).y_ticks] == [
        "2.6",
        "2.8",
        "3.0",
        "3.2",
        "3.4",
    ]


def test_the_loss_curve_renders_to_a_small_png() -> None:
    png = render_png(loss_curve(EVENTS), f"web: {HOSTILE}")
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) < 100_000
    assert render_png(loss_curve(step_events(1)), "one step").startswith(b"\x89PNG\r\n")


def test_the_report_of_a_training_contains_its_curve_and_completions(tmp_path: Path) -> None:
    manifest = make_manifest("a-01", evaluation=make_evaluation().without_texts)
    run = manifest.run.model_copy(update={"device_check": "mps failed when it was checked; continued on the CPU"})
    manifest = manifest.model_copy(update={"run": run})
    path = write_training_report(tmp_path, manifest, [*EVENTS, Evaluated(evaluation=make_evaluation())])
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    assert "Adapter a-01" in page.text
    assert "return a + b" in page.text
    assert "9 examples, 900 tokens" in page.text
    assert "mps failed when it was checked; continued on the CPU" in page.text
    assert write_training_report(tmp_path, make_manifest("a-01"), EVENTS) is None


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({}, ""),
        ({"best_step": 2}, "those of step 2, the best on a held-out sample"),
        ({"scaled_by": 0.8}, "those of step 3; what they add to the base model was multiplied by 0.8, because"),
        ({"share_of_parent": 0.5}, "50 % those of the adapter that it continues, and 50 % those of step 3"),
        (
            {"share_of_parent": 0.5, "best_step": 2},
            "50 % those of the adapter that it continues, and 50 % those of step 2, the best on a held-out sample",
        ),
    ],
)
def test_page_and_card_say_which_weights_were_saved(run: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config = TrainingConfig(rank=16, learning_rate=5e-4)
    manifest = make_manifest("a-02", evaluation=make_evaluation().without_texts, config=config)
    if "share_of_parent" in run:
        run = {**run, "continued_from": "a-01"}
    manifest = manifest.model_copy(update={"run": manifest.run.model_copy(update=run)})
    path = write_training_report(tmp_path, manifest, EVENTS)
    assert path is not None
    page = Page(path.read_text()).text
    card = render_card(manifest)
    if not expected:
        assert "weights" not in page.replace("frozen weights", "")
        assert "the weights are" not in card
        return
    assert expected in page
    assert f"- the weights are {expected}" in card
    assert ("a-01" in page) == ("continued from a-01" in card) == ("share_of_parent" in run)


def test_page_and_card_count_the_examples_that_a_short_training_has_seen(tmp_path: Path) -> None:
    config = TrainingConfig(rank=16, learning_rate=5e-4)
    manifest = make_manifest("a-01", evaluation=make_evaluation().without_texts, config=config)
    run = manifest.run.model_copy(update={"examples_seen": 4, "tokens_seen": 380})
    short = manifest.model_copy(update={"run": run})
    seen = "4 of the 9 examples that were prepared, 380 tokens"
    assert f"- trained on {seen}\n" in render_card(short)
    path = write_training_report(tmp_path, short, EVENTS)
    assert path is not None
    assert seen in Page(path.read_text()).text
    whole = manifest.model_copy(update={"run": run.model_copy(update={"examples_seen": 9})})
    for known in (whole, manifest):
        assert "- trained on 9 examples, 900 tokens\n" in render_card(known)
