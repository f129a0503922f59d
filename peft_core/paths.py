"""Every path under the data directory.

{data_dir}/
  peft.db                               jobs and events
  runner.lock                           held by the process that works on the queue
  registry.json, active_project.json    Codebase Gardener's projects, if it is used (gardener/)
  .registry.lock                        held while one of those two is changed
  exports.lock                          held by the process that exports an adapter
  serving.lock                          held by the endpoint's process
  serving.json, serving.token           the endpoint's address and its token
  inference.used                        locked while a loaded model answers a request
  logs/                                 runner.log
  device_checks/{key}.json              whether an accelerator of this machine computes what the CPU does (devices/)
  inspections/                          temporary files of inspect_training_data
  base_models/{key}/                    base models converted from GGUF
  base_models/{key}.f16.gguf            base models in F16 for llama.cpp
  jobs/{job_id}/                        task.json, records.jsonl, dataset/, base_scores.json, checkpoint/,
                                        cluster.json (on a cluster), adapter/ (until published), report.html (of an evaluation),
                                        train.log
  projects/{project_id}/project.json    what the project is trained on, and when to retrain it
  projects/{project_id}/.project.lock   held while project.json is changed
  projects/{project_id}/lora/
    {adapter_id}/                       a published adapter; never changes
    current -> {adapter_id}             moves atomically
    .lock                               held while an adapter is published or deleted
  projects/{project_id}/exports/
    {adapter_id}/{target}/              an exported adapter
  cluster/runs/, cluster/bases/         on a node of a cluster: runs that take place there, base models that were sent
  .NAME.in_use                          beside a converted base, an adapter or a job: held by processes that read it
  .freed.*                              renamed there to be deleted (storage/)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The files of an adapter, as PEFT names them.
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class JobPaths:
    root: Path

    @property
    def task(self) -> Path:
        return self.root / "task.json"

    @property
    def records(self) -> Path:
        return self.root / "records.jsonl"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def base_scores(self) -> Path:
        return self.root / "base_scores.json"

    @property
    def parent_scores(self) -> Path:
        return self.root / "parent_scores.json"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def cluster(self) -> Path:
        return self.root / "cluster.json"


def adapter_names(adapters: Sequence[Path]) -> list[str]:
    """Return what people call these adapters: PROJECT/ADAPTER, or the name of a directory; if two are equal, the paths."""
    names = [f"{path.parent.parent.name}/{path.name}" if path.parent.name == "lora" else path.name for path in adapters]
    return names if len(set(names)) == len(names) else [str(path) for path in adapters]


@dataclass(frozen=True)
class DataPaths:
    root: Path

    @property
    def database(self) -> Path:
        return self.root / "peft.db"

    @property
    def runner_lock(self) -> Path:
        return self.root / "runner.lock"

    @property
    def gardener_registry(self) -> Path:
        return self.root / "registry.json"

    @property
    def gardener_active(self) -> Path:
        return self.root / "active_project.json"

    @property
    def gardener_lock(self) -> Path:
        return self.root / ".registry.lock"

    @property
    def serving_lock(self) -> Path:
        return self.root / "serving.lock"

    @property
    def serving_state(self) -> Path:
        return self.root / "serving.json"

    @property
    def serving_token(self) -> Path:
        return self.root / "serving.token"

    @property
    def model_activity(self) -> Path:
        return self.root / "inference.used"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def device_checks(self) -> Path:
        return self.root / "device_checks"

    @property
    def inspections(self) -> Path:
        return self.root / "inspections"

    @property
    def base_models(self) -> Path:
        return self.root / "base_models"

    @property
    def cluster_runs(self) -> Path:
        return self.root / "cluster" / "runs"

    @property
    def cluster_bases(self) -> Path:
        return self.root / "cluster" / "bases"

    @property
    def projects(self) -> Path:
        """The projects, with symbolic links resolved, because paths below it are compared."""
        return Path(os.path.realpath(self.root / "projects"))

    def job(self, job_id: str) -> JobPaths:
        return JobPaths(self.root / "jobs" / job_id)

    def adapters(self, project_id: str) -> Path:
        return self.projects / project_id / "lora"

    def registration(self, project_id: str) -> Path:
        return self.projects / project_id / "project.json"

    def exports(self, project_id: str) -> Path:
        return self.projects / project_id / "exports"

    @property
    def exports_lock(self) -> Path:
        return self.root / "exports.lock"

    def adapter(self, project_id: str, adapter_id: str) -> Path:
        return self.adapters(project_id) / adapter_id

    def current(self, project_id: str) -> Path:
        return self.adapters(project_id) / "current"
