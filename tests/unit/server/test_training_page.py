"""The training page as a file (small, alone, no way to parse text as HTML) and as an extension that clients find."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError

import server.training_page
from peft_core.config import Settings
from peft_core.jobs.store import Store
from peft_core.schemas.events import JobCancelled, JobStarted, PhaseStarted, RunPlanned, StepCompleted
from peft_core.schemas.results import Phase
from server.app import TOOLS, build_server
from server.training_page import PAGE_URI
from tests.factories import make_job

PAGE = Path(server.training_page.__file__).with_name("page.html").read_text(encoding="utf-8")


def test_the_page_is_small() -> None:
    assert len(PAGE.encode()) < 32_000


def test_the_page_refers_to_nothing_else() -> None:
    assert set(re.findall(r"https?://[^\"' ]+", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", PAGE)


@pytest.mark.parametrize(
    "sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_the_page_parses_no_text_as_html_or_code(sink: str) -> None:
    assert sink not in PAGE


def test_the_tools_that_answer_with_a_job_name_the_page() -> None:
    shown = {tool.name for tool in TOOLS if tool.meta}
    assert shown == {"train_adapter", "evaluate_adapter", "compare_adapters", "get_training_status", "resume_training"}


async def test_clients_find_the_page_by_the_extension(data_dir: Path, era: str) -> None:
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era) as client:
        (document,) = (await client.read_resource(PAGE_URI)).contents
        assert document.text == PAGE  # type: ignore[union-attr]
        assert document.mime_type == "text/html;profile=mcp-app"
        assert document.meta == {"ui": {"prefersBorder": True}}


async def test_the_extension_is_declared(data_dir: Path) -> None:
    async with Client(build_server(Settings(data_dir=data_dir)), mode="auto") as client:
        assert "io.modelcontextprotocol/ui" in (client.server_capabilities.extensions or {})


async def test_the_report_of_a_job_leaves_out_losses_that_are_not_finite(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    store = Store(settings.paths.database, time.time)
    store.create()
    store.insert(make_job("job"))
    store.append("job", JobStarted())
    store.append("job", RunPlanned(device="cpu", total_steps=9, start_step=0))
    store.append("job", PhaseStarted(phase=Phase.TRAINING))
    for step, loss in ((1, 2.5), (2, math.nan), (3, 2.0)):
        values = {"learning_rate": 1e-3, "tokens": 1, "tokens_per_second": 1.0, "eta_s": 1.0, "memory_bytes": 1}
        store.append("job", StepCompleted(step=step, loss=loss, **values))
    store.append("job", JobCancelled())
    async with Client(build_server(settings)) as client:
        (document,) = (await client.read_resource("training://job/report")).contents
        report = json.loads(document.text)  # type: ignore[union-attr]
        assert report["steps"] == [[1, 2.5], [3, 2.0]]
        assert report["status"]["status"] == "cancelled"
        assert report["gains"] == report["held_out"] == []
        with pytest.raises(MCPError, match="unknown"):
            await client.read_resource("training://unknown/report")
