"""Planning a training for a node of a cluster, which is described: nothing here depends on this machine or on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.errors import ClusterError, InvalidArgument, PeftMcpError
from peft_core.planning import target
from peft_core.planning.cost_model import CPU_FLOPS_PER_CORE, flops_per_token, memory_bytes
from peft_core.planning.planner import plan, require_sources
from peft_core.schemas.cluster import ASK_ABOVE_BYTES, ClusterAnswer, ClusterNode
from peft_core.schemas.task import ComputePlan, JobRequest
from peft_core.schemas.training import TrainingConfig
from peft_core.system import packages
from tests.model_files import write_model

ADDRESS = "ray://head:10001"
GB = 1_000_000_000


def gpu_node(name: str = "gpu-1", **changes: Any) -> ClusterNode:
    node = {
        "node_id": name,
        "name": name,
        "cpus": 32,
        "gpus": 4,
        "memory_bytes": 200 * GB,
        "free_cpus": 32,
        "free_gpus": 4,
        "device": "cuda",
        "device_name": "NVIDIA A100",
        "device_memory_bytes": 40 * GB,
        "cores": 16,
        "has_base": True,
    }
    return ClusterNode(**{**node, **changes})


def cpu_node(name: str = "cpu-1", **changes: Any) -> ClusterNode:
    node = {
        "gpus": 0,
        "free_gpus": 0,
        "device": "cpu",
        "device_name": "",
        "device_memory_bytes": 0,
        "memory_bytes": 8 * GB,
    }
    return gpu_node(name, **{**node, **changes})


def planned(tmp_path: Path, *nodes: ClusterNode, **config: Any) -> JobRequest:
    base = tmp_path / "base"
    if not base.exists():
        write_model(base)
    records = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]
    settings = Settings(data_dir=tmp_path / "data", cluster=ADDRESS)
    given = TrainingConfig(base_model=str(base), run_on="cluster", max_length=128, **config)
    answer = ClusterAnswer(address=ADDRESS, nodes=nodes)
    return plan(records, given, settings, lambda *_: None, ask=lambda *_: answer)


def test_a_node_with_a_gpu_is_planned_for_and_reserved(tmp_path: Path) -> None:
    request = planned(tmp_path, cpu_node(), gpu_node())
    assert request.cluster is not None
    assert request.device == "cuda"
    assert (request.cluster.address, request.cluster.gpus, request.cluster.cpus) == (ADDRESS, 1, 4)
    assert request.estimate.memory_bytes == memory_bytes(request.config, request.base, "cuda", request.execution)
    assert request.cluster.memory_bytes == target.HOST_BYTES + request.base.size_bytes
    assert request.estimate.cluster.startswith(
        f"It trains on the node gpu-1 of the cluster at {ADDRESS} and reserves 1 GPU, 4 CPUs and 2.6 GB of memory "
        "(NVIDIA A100). Sent there: "
    )
    assert "the base model is there" in request.estimate.cluster
    assert "the adapter that it continues" not in request.estimate.cluster


def test_a_training_that_continues_says_that_its_adapter_and_earlier_examples_are_sent(tmp_path: Path) -> None:
    request, nodes = planned(tmp_path, gpu_node()), [gpu_node()]
    assert request.cluster is not None
    place = target.Target("cuda", 4, cpu_bfloat16=True, memory_bytes=None)
    words, _ = target.describe(request.cluster, place, request.base, request.found, nodes, continues=True)
    assert "the adapter that it continues and the examples that this one and its parents learned" in words


def test_the_weakest_gpu_that_ray_may_choose_is_planned_for(tmp_path: Path) -> None:
    needed = memory_bytes(
        planned(tmp_path, gpu_node()).config, planned(tmp_path, gpu_node()).base, "cuda", ComputePlan()
    )
    request = planned(tmp_path, gpu_node(), gpu_node("small", device_memory_bytes=needed - 1))
    assert request.execution == ComputePlan(recompute_layers=True)
    assert "the memory of the GPU on small" in request.estimate.basis


def test_a_cpu_of_the_cluster_is_planned_with_its_own_cores_memory_and_number_format(tmp_path: Path) -> None:
    request = planned(tmp_path, cpu_node(cores=4, cpus=6), cpu_node("old", memory_bytes=1 * GB))
    rate = 4 * CPU_FLOPS_PER_CORE["float32"] / flops_per_token(request.base.shape)
    assert request.cluster is not None
    assert (request.device, request.cluster.gpus, request.cluster.cpus) == ("cpu", 0, 6)
    assert request.cluster.memory_bytes == request.estimate.memory_bytes
    assert request.estimate.seconds == pytest.approx(15 + request.estimate.train_tokens / rate, rel=0.5)
    assert request.execution.weights == "float32"
    assert planned(tmp_path, cpu_node(cpu_bfloat16=True)).execution.weights == "bfloat16"
    assert planned(tmp_path, gpu_node(), cpu_node(), device="cpu").device == "cpu"


def test_a_base_model_that_nodes_lack_is_counted_as_sent_and_may_be_sent(tmp_path: Path) -> None:
    there, lacking = planned(tmp_path, gpu_node()), planned(tmp_path, gpu_node(), gpu_node("gpu-2", has_base=False))
    assert lacking.estimate.sent_bytes == there.estimate.sent_bytes + there.base.size_bytes
    assert "one of 2 nodes" in lacking.estimate.cluster
    assert "and the base model (" in lacking.estimate.cluster
    assert lacking.cluster is not None
    assert lacking.cluster.may_send_bytes == ASK_ABOVE_BYTES  # a small one needs no consent


def test_a_large_base_model_may_be_sent_once_the_plan_is_approved(tmp_path: Path) -> None:
    request = planned(tmp_path, gpu_node())
    large = request.base.model_copy(update={"size_bytes": 15 * GB})
    node = target.Target("cuda", 16, cpu_bfloat16=False, memory_bytes=40 * GB, node=gpu_node())
    nodes = [gpu_node(has_base=False)]
    reserved = target.reserve(ADDRESS, node, large, GB, nodes, gpus=1)
    assert reserved.may_send_bytes == 15 * GB
    words, sent = target.describe(reserved, node, large, request.found, nodes)
    assert "the base model (15.0 GB)" in words
    assert sent > 15 * GB


def test_a_training_on_cpus_is_not_planned_for_a_head_node_that_has_none_for_ray(tmp_path: Path) -> None:
    request = planned(tmp_path, cpu_node("head", cpus=0, free_cpus=0, memory_bytes=64 * GB), cpu_node(cpus=6))
    assert request.cluster is not None
    assert request.cluster.cpus == 6


@pytest.mark.parametrize(
    ("gpus", "sizes", "nodes", "each"),
    [(4, (4, 8), 1, 4), (8, (4, 8), 1, 8), (8, (4, 4, 4), 2, 4), (12, (8, 8), 2, 6), (6, (2, 2, 3), 3, 2)],
)
def test_more_gpus_than_a_node_has_are_taken_from_as_few_nodes_as_possible(
    tmp_path: Path, gpus: int, sizes: tuple[int, ...], nodes: int, each: int
) -> None:
    request = planned(tmp_path, gpu_node())
    cluster = [gpu_node(f"gpu-{number}", gpus=size) for number, size in enumerate(sizes)]
    device = target.Target("cuda", 16, cpu_bfloat16=False, memory_bytes=40 * GB, node=cluster[0])
    reserved = target.reserve(ADDRESS, device, request.base, GB, cluster, gpus=gpus)
    assert (reserved.nodes, reserved.gpus, reserved.processes) == (nodes, each, gpus)
    words, _ = target.describe(reserved, device, request.base, request.found, cluster)
    assert (f"on each of {nodes} nodes" in words) is (nodes > 1)


def test_more_gpus_than_the_cluster_can_give_are_refused(tmp_path: Path) -> None:
    request, cluster = planned(tmp_path, gpu_node()), [gpu_node(), gpu_node("gpu-2")]
    device = target.Target("cuda", 16, cpu_bfloat16=False, memory_bytes=40 * GB, node=cluster[0])
    with pytest.raises(ClusterError, match="it needs 16 GPUs") as caught:
        target.reserve(ADDRESS, device, request.base, GB, cluster, gpus=16)
    assert caught.value.code == "cluster_too_small"


def test_that_all_devices_are_in_use_is_said_before_the_training_waits(tmp_path: Path) -> None:
    assert "They are in use now, so it waits." in planned(tmp_path, gpu_node(free_gpus=0)).estimate.cluster
    for free in ({"free_gpus": 1}, {"free_gpus": 0, "free_cpus": 0}):  # the last: not known
        assert "in use" not in planned(tmp_path, gpu_node(**free)).estimate.cluster


@pytest.mark.parametrize(
    ("nodes", "config", "code", "message"),
    [
        ([gpu_node(problem="has no peft-mcp; it needs version 1")], {}, "cluster_no_node", "gpu-1 has no peft-mcp"),
        ([cpu_node()], {"device": "cuda"}, "cluster_no_gpu", "has a GPU"),
        ([cpu_node(memory_bytes=100_000_000)], {}, "cluster_too_small", "can ever run this training"),
        ([gpu_node(memory_bytes=1 * GB)], {}, "cluster_too_small", "1 GPU, 4 CPUs and 2.6 GB of memory"),
    ],
)
def test_a_cluster_that_can_never_run_the_training_is_refused(
    tmp_path: Path, nodes: list[ClusterNode], config: dict[str, Any], code: str, message: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        planned(tmp_path, *nodes, **config)
    assert caught.value.code == code
    assert message in caught.value.message
    assert len(caught.value.message) < 400
    assert caught.value.suggestions


def test_a_cluster_is_needed_before_any_data_is_read() -> None:
    with pytest.raises(InvalidArgument, match="CODEBASE_GARDENER_CLUSTER") as caught:
        plan("/no/such/place", TrainingConfig(run_on="cluster"), Settings(cluster=None), lambda *_: None)
    assert caught.value.details["field"] == "config.run_on"
    with pytest.raises(InvalidArgument, match="auto, cuda or cpu"):
        plan("/none", TrainingConfig(run_on="cluster", device="mps"), Settings(cluster=ADDRESS), lambda *_: None)


def test_the_extra_is_needed_for_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(ClusterError) as caught:
        plan("/none", TrainingConfig(run_on="cluster"), Settings(cluster=ADDRESS), lambda *_: None)
    assert caught.value.code == "cluster_extra_missing"
    assert "peft-mcp[cluster]" in caught.value.suggestions[0]


def test_a_training_is_not_resumed_on_another_cluster_than_it_was_planned_for(tmp_path: Path) -> None:
    request = planned(tmp_path, gpu_node())
    settings = Settings(data_dir=tmp_path / "data", cluster=ADDRESS)
    require_sources(request, settings)
    for other in (None, "ray://elsewhere:10001"):
        with pytest.raises(PeftMcpError, match="ray://head:10001"):
            require_sources(request, settings.model_copy(update={"cluster": other}))


def test_the_limit_of_memory_on_this_machine_does_not_hold_on_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEBASE_GARDENER_MAX_MEMORY_MB", "256")
    assert planned(tmp_path, gpu_node()).execution == ComputePlan()
    with pytest.raises(InvalidArgument, match=r"config\.max_memory_mb"):
        planned(tmp_path, cpu_node(), max_memory_mb=256)
