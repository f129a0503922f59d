"""Where in a job's life a process is killed: before or after a call of a function of the product, or of the small child."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Process = Literal["server", "runner", "child", "host"]


@dataclass(frozen=True)
class Point:
    process: Process  # that comes by
    module: str
    function: str
    when: Literal["before", "after"]
    what: str  # for people
    count: int = 1

    def __str__(self) -> str:
        return f"{self.process}, {self.what}"


_SERVICE, _SUPERVISOR, _STORE = (f"peft_core.jobs.{name}" for name in ("service", "supervisor", "store"))
SERVER = [
    Point("server", "peft_core.planning.planner", "plan", "before", "asked to train"),
    Point("server", "peft_core.planning.planner", "plan", "after", "planned, nothing is written"),
    Point("server", _STORE, "Store.create", "after", "database is there"),
    Point("server", _STORE, "Store.insert", "before", "just before the job is queued"),
    Point("server", _STORE, "Store.insert", "after", "queued, nobody works"),
    Point("server", _SUPERVISOR, "RunnerSupervisor._spawn_runner", "before", "queued, about to start a runner"),
    Point("server", _SUPERVISOR, "RunnerSupervisor._spawn_runner", "after", "runner started, not answered yet"),
    Point("server", _SERVICE, "JobService._to_status", "before", "about to answer"),
]

_RUNNER, _REGISTRY = "peft_core.jobs.runner", "peft_core.adapters.registry"
RUNNER = [
    Point("runner", _RUNNER, "recover", "before", "lock taken, job queued"),
    Point("runner", _RUNNER, "Runner.drain", "before", "about to look at the queue"),
    Point("runner", _RUNNER, "Runner._run", "before", "job said to be started, nothing done"),
    Point("runner", _RUNNER, "Runner._run_worker", "before", "about to start the child"),
    Point("runner", _RUNNER, "Runner._follow", "before", "child started"),
    Point("runner", _STORE, "Store.append", "before", "about to record what the child said", count=3),
    Point("runner", _STORE, "Store.append", "after", "recorded what the child said", count=8),
    Point("runner", _RUNNER, "Runner._outcome", "before", "child ended with its adapter written"),
    Point("runner", _RUNNER, "Runner._publish", "before", "about to publish"),
    Point("runner", "peft_core.adapters.verify", "verify", "before", "phase is publishing, adapter unchecked"),
    Point("runner", _REGISTRY, "Registry.publish", "before", "adapter checked"),
    Point("runner", _REGISTRY, "fsync_file", "after", "first file of the adapter synced"),
    Point("runner", _REGISTRY, "fsync_file", "before", "some files of the adapter read-only", count=3),
    Point("runner", _REGISTRY, "Registry.set_current", "before", "published, not current yet"),
    Point("runner", _REGISTRY, "Registry.set_current", "after", "published and current"),
    Point("runner", _REGISTRY, "Registry.publish", "after", "between publish and completed"),
    Point("runner", _RUNNER, "delete_checkpoint", "before", "completed, checkpoint still there"),
]

_SMALL, _PREPARE, _DATASET = "tests.survival.small_job", "peft_core.data.prepare", "peft_core.data.dataset"
SMALL_CHILD = [
    Point("child", _SMALL, "run", "before", "starting"),
    Point("child", _SMALL, "prepare_data", "before", "about to prepare data"),
    Point("child", _PREPARE, "DatasetBuilder.fill", "after", "data spooled"),
    Point("child", _DATASET, "write_examples", "after", "data split, without manifest"),
    Point("child", _SMALL, "prepare_data", "after", "data prepared"),
    Point("child", _SMALL, "load", "before", "loading"),
    Point("child", _SMALL, "evaluate", "before", "evaluating the base"),
    Point("child", _SMALL, "train_step", "before", "before the first step"),
    Point("child", _SMALL, "train_step", "before", "in a later step", count=2),
    Point("child", _SMALL, "save_checkpoint", "before", "about to write a checkpoint"),
    Point("child", _SMALL, "replace", "before", "checkpoint written, not in its place"),
    Point("child", _SMALL, "save_checkpoint", "after", "checkpoint written"),
    Point("child", _SMALL, "evaluate", "before", "evaluating the adapter", count=2),
    Point("child", _SMALL, "save_adapter", "before", "about to write the adapter"),
    Point("child", _SMALL, "write_adapter", "after", "adapter written, without manifest"),
    Point("child", _SMALL, "save_adapter", "after", "adapter complete, not yet told"),
    Point("child", _SMALL, "leave", "before", "last word said"),
]

_LOOP, _ENGINE, _CHECKPOINT = "peft_core.training.loop", "peft_core.training.run", "peft_core.training.checkpoint"
REAL_CHILD = [
    Point("child", "peft_core.modeling.environment", "prepare_environment", "before", "starting"),
    Point("child", _DATASET, "write_examples", "after", "data split, without manifest"),
    Point("child", _ENGINE, "load_planned", "before", "about to load the base"),
    Point("child", _ENGINE, "load_planned", "after", "base loaded"),
    Point("child", "peft_core.evaluation.worker.scoring", "held_out_loss", "before", "evaluating the base"),
    Point("child", "peft_core.training.lora", "attach", "after", "adapter attached"),
    Point("child", "torch.serialization", "save", "after", "start to go back to written, not in its place"),
    Point("child", _CHECKPOINT, "RollbackStates.save", "after", "start to go back to written"),
    Point("child", _LOOP, "TrainingLoop.train_step", "before", "before a step", count=2),
    Point("child", _LOOP, "TrainingLoop.all_reduce_gradients", "before", "in a step, gradients there", count=2),
    Point("child", _LOOP, "TrainingLoop.train_step", "after", "after a step", count=3),
    # The first is the start; the checkpoint follows.
    Point("child", _CHECKPOINT, "save_checkpoint", "before", "about to write a checkpoint", count=2),
    Point("child", "torch.serialization", "save", "after", "checkpoint written, not in its place", count=2),
    Point("child", _CHECKPOINT, "save_checkpoint", "after", "checkpoint written", count=2),
    Point("child", _CHECKPOINT, "RollbackStates.set_checkpointed", "after", "states that no checkpoint names are gone"),
    Point("child", _LOOP, "TrainingLoop.run", "after", "all steps done"),
    Point("child", "peft_core.training.save", "write_adapter", "before", "about to write the adapter"),
    Point("child", "safetensors.torch", "save_file", "after", "weights written, no configuration"),
    Point("child", "peft_core.adapters.manifest", "write_manifest", "before", "everything but the manifest written"),
    Point("child", "peft_core.adapters.manifest", "write_manifest", "after", "adapter complete, not yet told"),
    Point("child", _ENGINE, "run", "after", "last word said"),
]

_DESK, _MODEL, _RESIDENTS = (f"peft_core.inference.worker.{name}" for name in ("desk", "model", "residents"))
_ADD_WEIGHTS = "set_peft_model_state_dict"
HOST = {  # by the tool whose call is under way
    "load_adapter": [
        Point("host", "peft_core.modeling.environment", "prepare_environment", "before", "starting"),
        Point("host", _MODEL, "ResidentModel.load", "before", "about to load the base"),
        Point("host", _MODEL, "load_base", "after", "base loaded"),
        Point("host", _MODEL, "ResidentModel.add", "before", "about to load the adapter"),
        Point("host", _MODEL, _ADD_WEIGHTS, "before", "layers wrapped, without the adapter's weights"),
        Point("host", _MODEL, "_require_effect", "before", "proving the effect"),
        Point("host", _DESK, "RequestHandler._put_on", "after", "effect proved, adapter not active"),
        Point("host", _DESK, "RequestHandler._load", "after", "loaded, not answered yet"),
    ],
    "generate": [
        Point("host", _DESK, "RequestHandler._generate", "before", "asked to generate"),
        Point("host", "peft_core.inference.worker.generate", "_Watch.__call__", "before", "writing", count=3),
        Point("host", _DESK, "RequestHandler._generate", "after", "written, not answered yet"),
    ],
    "unload_adapter": [
        Point("host", _RESIDENTS, "AdapterCache.take_off", "before", "asked to unload"),
        Point("host", _MODEL, "ResidentModel.remove", "after", "adapter off, base still there"),
        Point("host", _DESK, "RequestHandler._unload", "after", "unloaded, not answered yet"),
    ],
}
