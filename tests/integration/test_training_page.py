"""The training page in a real browser, with a host of MCP Apps around it and the real server behind that."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import pytest
from mcp.client import Client
from playwright.async_api import Browser, expect

from peft_core.config import Settings
from peft_core.jobs.store import Store
from peft_core.schemas.evaluation import Evaluation, InFileMetric, Share
from peft_core.schemas.events import (
    AdaptersCompared,
    CheckpointSaved,
    Evaluated,
    HeldOutMeasured,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobStarted,
    PhaseStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import ErrorInfo, Metrics, Phase, Status
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.system.lock import FileLock
from server.app import build_server
from tests.app_host import BROWSER, AppHost, app_host, chromium
from tests.factories import make_comparison, make_evaluation, make_job, make_request, make_source
from tests.integration.test_report_in_browser import CONTRAST
from tests.unit.evaluation.test_report import HOSTILE

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
expect.set_options(timeout=60_000)

JOB = "20260101-000000-abcdef"
STEPS = 40
STATUS = ("get_training_status", {"project_id": "web", "wait_s": 0})


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@pytest.fixture
def settings(data_dir) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """A store whose jobs advance by the events that a test appends: the runner's lock keeps any runner from them."""
    settings.paths.database.parent.mkdir(parents=True, exist_ok=True)
    store = Store(settings.paths.database, time.time)
    store.create()
    with FileLock(settings.paths.runner_lock) as lock:
        assert lock.acquire()
        yield store


@pytest.fixture
async def client(settings: Settings, store: Store) -> AsyncIterator[Client]:
    async with Client(build_server(settings)) as client:
        yield client


def step_completed(step: int) -> StepCompleted:
    return StepCompleted(
        step=step,
        loss=2.4 - 0.9 * step / STEPS,
        learning_rate=1e-3,
        tokens=step,
        tokens_per_second=145.0,
        eta_s=100.0,
        memory_bytes=10**9,
    )


def start(store: Store, *, until: int, job_id: str = JOB) -> None:
    """Insert a job that has trained for some steps."""
    store.insert(make_job(job_id, created_at=time.time()))
    store.append(job_id, JobStarted())
    store.append(job_id, RunPlanned(device="cpu", total_steps=STEPS, start_step=0))
    store.append(job_id, PhaseStarted(phase=Phase.EVALUATING_BASE))
    store.append(job_id, HeldOutMeasured(step=0, loss=2.36, whole_set=True))
    store.append(job_id, HeldOutMeasured(step=0, loss=2.5))
    store.append(job_id, PhaseStarted(phase=Phase.TRAINING))
    for step in range(1, until + 1):
        store.append(job_id, step_completed(step))
    store.append(job_id, HeldOutMeasured(step=until, loss=2.125))


def complete(store: Store, evaluation: Evaluation, *, job_id: str = JOB) -> None:
    store.append(job_id, PhaseStarted(phase=Phase.EVALUATING_ADAPTER))
    store.append(job_id, Evaluated(evaluation=evaluation))
    store.append(job_id, JobCompleted(adapter_path="/a", metrics=Metrics(base_loss=2.36, adapter_loss=1.924)))


async def overflow(host: AppHost) -> int:
    """Return how far the page is wider than its frame, in pixels."""
    return int(await host.app.locator("html").evaluate("root => root.scrollWidth - innerWidth"))


async def test_the_page_follows_a_job_from_training_to_its_verdict(
    browser: Browser, client: Client, store: Store
) -> None:
    start(store, until=20)
    async with app_host(browser, client) as host:
        await host.open(*STATUS)
        app = host.app
        await expect(app.locator("#headline")).to_have_text("Training")
        await expect(app.locator("#subject")).to_have_text("web · SmolLM2-135M-Instruct")
        await expect(app.locator("#remaining")).to_contain_text("left")
        await expect(app.locator("#pace")).to_have_text(f"step 20 of {STEPS} · 145 tokens/s")
        await expect(app.locator(".phases [aria-current]")).to_have_text("Training")
        await expect(app.locator("#trained")).to_contain_text("Training loss: 1.9")
        await expect(app.locator("#sampled")).to_have_text("Held-out loss (a sample): 2.125")
        await expect(app.locator("#base-loss")).to_contain_text("2.360")
        assert {"nats per token", "step", "2.13"} <= set(await app.locator("#chart text").all_text_contents())
        for line in ("smooth", "held"):
            box = await app.locator(f"polyline.{line}").bounding_box()
            assert box is not None
            assert box["width"] > 200
        frame_height = await host.page.locator("iframe").evaluate("frame => frame.clientHeight")
        assert abs(frame_height - await app.locator("html").evaluate("root => root.clientHeight")) <= 1

        store.append(JOB, step_completed(21))
        await expect(app.locator("#pace")).to_contain_text("step 21")
        assert (await host.calls("get_training_status"))[0] == {"project_id": "web", "job_id": JOB, "wait_s": 0}

        lines = Share(base=0.1, adapter=0.15, change=0.05, low=0.01, high=0.09, positions=269, files=6)
        complete(store, make_evaluation(in_file={InFileMetric.LINES: lines}))
        await expect(app.locator("#headline")).to_have_text("The adapter helps")
        await expect(app.locator("#progress")).to_be_hidden()
        await expect(app.locator("#cancel")).to_be_hidden()
        perplexity, exact_lines, similarity, general = await app.locator("#metrics tr").all_inner_texts()
        assert "9.00\n6.00" in re.sub(r"\s+", "\n", perplexity)
        assert "33 %" in perplexity
        assert "of 269 in whole files" in exact_lines
        assert "10.0 %" in exact_lines
        assert "+5.0 points" in exact_lines
        assert "too little data" in similarity
        assert "+0.050" in general
        await expect(app.locator("#adapter-loss")).to_contain_text("1.924")
        await expect(app.locator(".quotes pre")).to_have_text(
            ["def add(a, b):", "    return a + b", "    return a", "    return a + b"]
        )
        await expect(app.locator("#advice")).not_to_be_empty()
        (sent,) = await host.received("ui/update-model-context")
        assert "completed" in sent["content"][0]["text"]
        assert host.complaints == []


async def test_a_training_is_cancelled_and_resumed_after_confirmation(
    browser: Browser, client: Client, store: Store
) -> None:
    start(store, until=5)
    store.append(JOB, CheckpointSaved(step=5))
    async with app_host(browser, client) as host:
        await host.open(*STATUS)
        app = host.app
        await app.locator("#cancel").press("Enter")
        await expect(app.locator("#no")).to_be_focused()
        await app.locator("#no").press("Escape")
        await expect(app.locator("#confirm")).to_be_hidden()
        await expect(app.locator("#cancel")).to_be_focused()
        assert not store.cancel_requested(JOB)

        await app.locator("#cancel").click()
        await app.locator("#yes").click()
        await expect(app.locator("#headline")).to_have_text("Stopping")
        await expect(app.locator("#cancel")).to_be_hidden()
        with anyio.fail_after(60):
            while not store.cancel_requested(JOB):  # noqa: ASYNC110 -- another process would not wake this one either
                await anyio.sleep(0.02)
        store.append(JOB, JobCancelled())
        await expect(app.locator("#headline")).to_have_text("Training cancelled")
        assert await host.calls("cancel_training") == [{"project_id": "web", "job_id": JOB}]

        await app.locator("#resume").click()
        await app.locator("#yes").click()
        await expect(app.locator("#headline")).to_have_text("Waiting in the queue")
        assert store.get(JOB).status is Status.QUEUED
        assert host.complaints == []


async def test_a_refused_action_is_explained(browser: Browser, client: Client, store: Store) -> None:
    start(store, until=1)
    store.append(JOB, JobCancelled())
    async with app_host(browser, client) as host:
        await host.open(*STATUS)
        await host.app.locator("#resume").click()
        store.delete_ended(JOB)
        await host.app.locator("#yes").click()
        await expect(host.app.locator("#problem")).to_contain_text(JOB)
        await expect(host.app.locator("#headline")).to_have_text("Training cancelled")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_the_page_is_legible_in_the_hosts_theme_at_350_pixels(
    browser: Browser, client: Client, store: Store, theme: str
) -> None:
    start(store, until=STEPS)
    complete(store, make_evaluation(forgets=True))
    async with app_host(browser, client, width=350) as host:
        await host.open(*STATUS, context={"theme": "dark" if theme == "light" else "light"})
        await host.app.locator(".quotes").first.wait_for()
        await host.notify("ui/notifications/host-context-changed", {"theme": theme})
        await host.app_frame.wait_for_function(
            "theme => document.documentElement.style.colorScheme === theme", arg=theme
        )
        ratios = await host.app_frame.evaluate(CONTRAST)
        assert ratios["paper"] < 0.1 if theme == "dark" else ratios["paper"] > 0.9
        assert ratios["least"] >= 4.5, ratios  # WCAG 2.2, level AA, for text
        assert await overflow(host) <= 0
        assert host.complaints == []


async def test_the_page_wears_the_hosts_colours_only_if_they_are_complete(
    browser: Browser, client: Client, store: Store
) -> None:
    start(store, until=1)
    async with app_host(browser, client) as host:
        await host.open(*STATUS, context={"styles": {"variables": {"--color-background-primary": "rgb(1, 2, 3)"}}})
        await host.app.locator("#cancel").wait_for()
        background = "getComputedStyle(document.body).backgroundColor"
        assert await host.app_frame.evaluate(background) != "rgb(1, 2, 3)"
        colours = {"--color-background-primary": "rgb(1, 2, 3)", "--color-text-primary": "white"}
        await host.notify("ui/notifications/host-context-changed", {"styles": {"variables": colours}})
        await host.app_frame.wait_for_function(f"{background} === 'rgb(1, 2, 3)'")


async def test_a_comparison_shows_base_and_both_adapters_side_by_side(
    browser: Browser, client: Client, store: Store
) -> None:
    evaluated = EvaluatedAdapter(adapter_path=Path("/a"), compared_with=Path("/b"))
    store.insert(make_job(created_at=time.time(), request=make_request(evaluated=evaluated)))
    for event in (
        JobStarted(),
        AdaptersCompared(comparison=make_comparison(cautions=("They differ.",))),
        JobCompleted(adapter_path="/b", metrics=Metrics(base_loss=2.2)),
    ):
        store.append(JOB, event)
    async with app_host(browser, client, width=350) as host:
        await host.open("get_training_status", {"project_id": "web", "job_id": JOB, "wait_s": 0})
        app = host.app
        await expect(app.locator("#headline")).to_have_text("Keep adapter B")
        await expect(app.locator("#message")).to_have_text("Keep web/b-02: its held-out loss is lower. They differ.")
        row = app.locator("#metrics tr").first
        await expect(row.locator("td[data-of]")).to_have_text(["9.00", "6.00", "6.00"])
        await expect(row).to_contain_text("B is better")
        await expect(app.locator("#basis")).to_contain_text("A is web/a-01, B is web/b-02. All on the same 40 examples")
        await expect(app.locator(".quotes figcaption")).to_have_text(
            ["Prompt", "Original", "Base model, 60 % similar", "A, 50 % similar", "B, 100 % similar"]
        )
        assert await overflow(host) <= 0
        assert host.complaints == []


async def test_hostile_texts_are_shown_as_text(browser: Browser, client: Client, store: Store) -> None:
    found = make_source(languages={HOSTILE: 1})
    store.insert(make_job("failed", "failed", created_at=time.time(), request=make_request(found=found)))
    store.append("failed", JobStarted())
    store.append("failed", JobFailed(error=ErrorInfo(code="odd", message=HOSTILE, suggestions=(HOSTILE,))))
    start(store, until=3)
    quote = make_evaluation().gains[0]
    hostile = dict.fromkeys(("file", "prompt", "expected", "base", "adapter"), HOSTILE)
    complete(store, make_evaluation(reason=HOSTILE, gains=(quote.model_copy(update=hostile),)))
    marker = "<img src=x onerror=alert(2)>"
    for project in ("web", "failed"):
        async with app_host(browser, client, width=350) as host:
            await host.open("get_training_status", {"project_id": project, "wait_s": 0})
            app = host.app
            if project == "web":
                await expect(app.locator(".quotes pre")).to_contain_text([marker] * 4)
                await expect(app.locator("#message")).to_contain_text(marker)
            else:
                await expect(app.locator("#problem")).to_contain_text(marker)
            await app.locator("#facts summary").click()
            await expect(app.locator("#facts dd")).not_to_have_count(0)
            assert await app.locator("main :is(img, script, iframe, object, a)").count() == 0
            assert await overflow(host) <= 0
            assert host.complaints == []


async def test_a_call_without_a_result_yet_shows_the_new_job_and_no_earlier_one(
    browser: Browser, client: Client, store: Store
) -> None:
    start(store, until=2, job_id="20260101-000000-earlier")
    complete(store, make_evaluation(), job_id="20260101-000000-earlier")
    async with app_host(browser, client) as host:
        await host.open("train_adapter", {"project_id": "web", "training_data": "/code/web"}, gives_result=False)
        await host.page.wait_for_function("received.some(message => message.params?.name === 'get_training_status')")
        await expect(host.app.locator("#headline")).to_have_text("Waiting for the job")
        start(store, until=2, job_id="20260102-000000-newer0")
        await expect(host.app.locator("#headline")).to_have_text("Training")
        assert host.complaints == []
        await expect(host.app.locator("#headline")).to_have_text("Training")


@pytest.mark.parametrize(
    "call", [("train_adapter", {"project_id": "web", "training_data": "/code"}), ("resume_training", {"job_id": JOB})]
)
async def test_a_task_is_followed_by_its_id(
    browser: Browser, client: Client, store: Store, call: tuple[str, dict[str, str]]
) -> None:
    start(store, until=2)
    async with app_host(browser, client) as host:
        await host.open(*call, gives_result=False)
        await host.notify("ui/notifications/tool-result", {"resultType": "task", "taskId": JOB, "status": "working"})
        await expect(host.app.locator("#headline")).to_have_text("Training")
        store.append(JOB, step_completed(3))
        await expect(host.app.locator("#pace")).to_contain_text("step 3")
        assert (await host.calls("get_training_status"))[-1]["job_id"] == JOB


async def test_a_host_that_passes_nothing_on_gets_no_buttons_and_no_calls(
    browser: Browser, client: Client, store: Store
) -> None:
    start(store, until=2)
    async with app_host(browser, client) as host:
        await host.open(*STATUS, capabilities={})
        await expect(host.app.locator("#headline")).to_have_text("Training")
        await expect(host.app.locator("#headline")).to_have_text("Training")
        await expect(host.app.locator("#cancel")).to_be_hidden()
        await host.page.evaluate("ask('ui/resource-teardown')")
        await host.page.wait_for_function("received.some(message => message.id === 'host-1')")
        assert await host.received("tools/call") == await host.received("resources/read") == []
        assert host.complaints == []


async def test_a_poll_that_fails_is_explained_and_repeated(browser: Browser, client: Client, store: Store) -> None:
    start(store, until=2)
    async with app_host(browser, client) as host:
        await host.open(*STATUS)
        await expect(host.app.locator("#trained")).to_be_visible()  # then nothing but the next poll is to come
        await host.page.evaluate("""() => {
            const toServer = window.toServer;
            window.toServer = async () => {
                window.toServer = toServer;
                return { error: { code: -32000, message: "The line is down." } };
            };
        }""")
        await expect(host.app.locator("#problem")).to_have_text("The line is down.")
        store.append(JOB, step_completed(3))
        await expect(host.app.locator("#pace")).to_contain_text("step 3")
        await expect(host.app.locator("#problem")).to_be_hidden()


async def test_an_error_of_the_call_is_shown(browser: Browser, client: Client, store: Store) -> None:
    async with app_host(browser, client) as host:
        await host.open("get_training_status", {"project_id": "nothing here", "wait_s": 0})
        await expect(host.app.locator("#headline")).to_have_text("No job to show")
        await expect(host.app.locator("#problem")).to_contain_text("project_id")
