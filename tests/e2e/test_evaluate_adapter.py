"""`evaluate_adapter` through the real stdio server: on code that the adapter never saw, and on its own training data.

With a tiny base, because the main job evaluates the bundled one.
"""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

from mcp.client import Client

from tests.clients import stdio_server
from tests.e2e.main_job import SHORT
from tests.e2e.test_main_job import call, wait_for_end


async def evaluate(client: Client, adapter: str, data: object) -> dict[str, Any]:
    queued = await call(client, "evaluate_adapter", adapter_path=adapter, evaluation_data=data)
    assert (queued["status"], queued["kind"]) == ("queued", "evaluation")
    return await wait_for_end(client, queued["project_id"], queued["job_id"])


async def test_an_adapter_is_evaluated_on_unseen_code_and_not_on_its_training_data(
    data_dir: Path, stdlib_repository: Path, tiny_base: str, tmp_path: Path
) -> None:
    methods = Path(html.parser.__file__).read_text().split("\n    def ")[1:]
    unseen_methods = [method for method in methods if 100 < len(method) < 700][:6]
    chunks = [
        {"content": f"    def {part}", "language": "python", "file_path": f"html/part_{number % 4}.py"}
        for number, part in enumerate(unseen_methods)
    ]
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("".join(json.dumps(chunk) + "\n" for chunk in chunks))

    async with Client(stdio_server(data_dir), mode="legacy") as client:
        config = {**SHORT, "base_model": tiny_base}
        request = {"training_data": str(stdlib_repository / "wsgiref"), "config": config}
        await call(client, "train_adapter", project_id="wsgiref", **request)
        assert (await wait_for_end(client, "wsgiref"))["status"] == "completed"

        # 1. Unseen code gives metrics of base and adapter, a verdict and a report.
        status = await evaluate(client, "wsgiref", str(unseen))
        assert status["status"] == "completed", status["summary"]
        evaluation = status["evaluation"]
        assert evaluation["verdict"] in ("helps", "no_difference", "harms")
        assert 0.5 < evaluation["loss"]["base"] < 10
        assert evaluation["loss"]["adapter"] != evaluation["loss"]["base"]
        assert evaluation["examples"] >= 5
        assert evaluation["seen_in_training"] == 0
        report = Path(status["report_path"]).read_text()
        assert str(unseen) in report

        # 2. Training data is refused with the overlap.
        seen = tmp_path / "seen.jsonl"
        seen.write_text("".join(json.dumps({"text": text}) + "\n" for text in trained_on(data_dir, "wsgiref")[:8]))
        status = await evaluate(client, "wsgiref", str(seen))
        assert (status["status"], status["error"]["code"]) == ("failed", "evaluation_overlaps_training")
        assert "overlaps the training data" in status["error"]["message"]


def trained_on(data: Path, project: str) -> list[str]:
    """Return the training texts of a project's adapter."""
    job = (data / "projects" / project / "lora" / "current").resolve().name
    lines = (data / "jobs" / job / "dataset" / "train.jsonl").read_text().splitlines()
    return ["".join(part["text"] for part in json.loads(line)["segments"] if part["learn"]) for line in lines]
