"""Codebase Gardener on one page: add a project to its registry, train it, switch to it, and keep it up to date.

Three short steps show that it works; for a real run, omit the settings of QUICK but for the time limit.
"""

import json
import sys
import uuid
from pathlib import Path

import anyio

from peft_core import PEFTManager, TrainingStatus

QUICK = {
    "training_timeout_minutes": 30,
    "max_training_steps": 3,
    "lora_rank": 8,
    "max_length": 128,
    "make_current": "always",  # three steps may harm
}


def add_project(registry: Path, source: Path) -> str:
    """Add a project, as Codebase Gardener does."""
    content = json.loads(registry.read_text()) if registry.exists() else {"version": "1.0", "projects": {}}
    project_id = str(uuid.uuid4())
    content["projects"][project_id] = {
        "name": source.name,
        "source_path": str(source),
        "training_status": "not_started",
    }
    registry.parent.mkdir(parents=True, exist_ok=True)
    registry.write_text(json.dumps(content, indent=2))
    return project_id


async def main(source: Path) -> None:
    async with PEFTManager() as manager:
        registry = manager.settings.data_dir / "registry.json"
        project_id = add_project(registry, source)

        def show(status: TrainingStatus) -> None:
            there = json.loads(registry.read_text())["projects"][project_id]["training_status"]
            print(f"{status.progress_percent:5.1f} %  {status.phase}  step {status.step}  in the registry: {there}")

        job = await manager.start_training(
            project_id, config=QUICK, on_progress=show
        )  # its code is where the registry says
        status = await job  # raises TrainingError if it fails, or the time limit is reached
        print(f"trained: {status.adapter_path}")

        loaded = await manager.switch_project(project_id)  # if this fails, the adapter that was active stays active
        generation = await manager.generate({"prompt": "def main(", "max_new_tokens": 40})
        print(f"switched in {loaded.elapsed_s:.2f} s; it writes:\n{generation.text}")

        refreshed = await manager.refresh_project(project_id)  # whenever the code has changed
        print(f"refresh: {refreshed.outcome}. {refreshed.reason}")


if __name__ == "__main__":
    anyio.run(main, Path(sys.argv[1]).resolve())
