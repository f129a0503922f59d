"""What is decided before anything is sent to a cluster."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info

from peft_core.base_models.resolve import resolve
from peft_core.cluster import bases, connection
from peft_core.cluster.preparation import prepare_dataset, task_files, without_paths
from peft_core.cluster.probe import _problem, own_version
from peft_core.cluster.remote_run import command
from peft_core.cluster.several_nodes import Rendezvous
from peft_core.cluster.submission import suitable_nodes
from peft_core.config import Settings
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import ClusterError, InvalidArgument
from peft_core.schemas.base_model import Base
from peft_core.schemas.cluster import ClusterNode, ClusterPlan
from peft_core.schemas.dataset import DataSource
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import TrainingConfig
from tests.factories import change_request, make_request
from tests.model_files import write_model

ADDRESS = "ray://head:10001"


def node(**changes: Any) -> ClusterNode:
    facts = {"node_id": "n", "name": "gpu-1", "cpus": 8, "gpus": 1, "memory_bytes": 32_000_000_000}
    return ClusterNode(**{**facts, **changes})


def plan(**changes: Any) -> ClusterPlan:
    return ClusterPlan(**{"address": ADDRESS, "gpus": 1, "cpus": 4, "memory_bytes": 16_000_000_000, **changes})


def test_a_node_is_suitable_if_it_can_train_and_is_large_enough() -> None:
    small, large, broken = node(gpus=0), node(name="gpu-2"), node(problem="lacks torch")
    assert suitable_nodes([small, large, broken], plan()) == [large]


@pytest.mark.parametrize("needed", [{"gpus": 2}, {"cpus": 9}, {"memory_bytes": 33_000_000_000}])
def test_a_job_that_fits_on_no_node_is_refused_with_figures(needed: dict[str, int]) -> None:
    with pytest.raises(ClusterError) as caught:
        suitable_nodes([node(), node(problem="lacks torch", gpus=8, cpus=99)], plan(**needed))
    assert caught.value.code == "cluster_no_node"
    assert "the largest, gpu-1, has 1 GPU, 8 CPUs and 32.0 GB of memory" in caught.value.message


@pytest.mark.parametrize("is_head", [True, False])
def test_a_cluster_whose_head_or_whose_every_node_lacks_the_package_is_refused(is_head: bool) -> None:
    nodes = [node(name="head", is_head=True, problem="has no peft-mcp"), node()]
    if not is_head:
        nodes = [node(problem="has no peft-mcp")]
    with pytest.raises(ClusterError, match="has no peft-mcp") as caught:
        suitable_nodes(nodes, plan())
    assert caught.value.code == "cluster_no_package"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (
            {"versions": {"python": "3.11.7"}, "error": "No module named 'peft_core'"},
            "has no peft-mcp; it needs version",
        ),
        ({"versions": {"peft-mcp": "9.9.9"}}, "has peft-mcp 9.9.9, but this machine has"),
        ({"versions": {"peft-mcp": own_version(), "torch": "2.13"}}, "lacks transformers, peft"),
        ({"error": "it did not answer within 90 s"}, "cannot be used: it did not answer within 90 s"),
        ({"versions": dict.fromkeys(("torch", "transformers", "peft"), "1") | {"peft-mcp": own_version()}}, ""),
    ],
)
def test_what_a_node_lacks_is_said(answer: dict[str, Any], problem: str) -> None:
    assert _problem(answer).startswith(problem)
    assert bool(_problem(answer)) == bool(problem)


@pytest.mark.parametrize(
    ("theirs", "code", "words"),
    [
        (("2.1.0", "3.11.7"), "cluster_ray_version", "The cluster runs Ray 2.1.0, but Ray"),
        ((None, "3.9.1"), "cluster_python_version", "The cluster runs Python 3.9.1, but this machine 3."),
    ],
)
def test_another_version_of_ray_or_python_is_named(theirs: tuple[str | None, str], code: str, words: str) -> None:
    metadata = {"ray_version": theirs[0] or ray.__version__, "python_version": theirs[1]}
    with pytest.raises(RuntimeError) as raised:
        check_version_info(metadata, "Ray Client", raise_on_mismatch=True, python_version_match_level="minor")
    error = connection._explain(raised.value, ADDRESS)
    assert error.code == code
    assert error.message.startswith(words)


@pytest.mark.parametrize("address", ["", "http://host:1", "host", "ray://", "ray://host:port", "ray://:10001"])
def test_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="must be ray://HOST:10001") as caught:
        connection.host_and_port(address)
    assert caught.value.code == "cluster_address"


def test_addresses_are_understood() -> None:
    assert connection.host_and_port("auto") is None
    assert connection.host_and_port("ray://head") == ("head", 10001)
    assert connection.host_and_port("head:6379") == ("head", 6379)


def make_task(tmp_path: Path, base: Base) -> TrainingTask:
    source = tmp_path / "private" / "records.jsonl"
    source.parent.mkdir()
    source.write_text("".join(json.dumps({"text": f"def f{n}(a):\n    return a + {n}\n"}) + "\n" for n in range(40)))
    task = TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="web",
        request=make_request(
            source=source, source_kind="jsonl", base=base, config=TrainingConfig(rank=4), cluster=plan()
        ),
        job_dir=tmp_path / "job",
        base_models_dir=tmp_path / "base_models",
        data_dir=tmp_path / "data",
        allowed_roots=(tmp_path,),
    )
    task.job_dir.mkdir()
    more = DataSource(path=tmp_path / "private" / "more.jsonl", kind="jsonl", name="more")
    found = task.request.found.model_copy(update={"path": source})
    config = task.request.config.model_copy(update={"base_model": str(base.path), "more_sources": [str(more.path)]})
    return change_request(task, found=found, config=config)


def test_the_examples_of_earlier_trainings_are_sent_with_the_task(tmp_path: Path) -> None:
    earlier = [tmp_path / "jobs" / name / "train.jsonl" for name in ("a", "b")]
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    task = make_task(tmp_path, base).model_copy(update={"earlier_examples": tuple(earlier)})
    (task.job_dir / "dataset").mkdir()
    (task.job_dir / "dataset" / "manifest.json").write_text('{"request": {}}')
    files = dict(task_files(task, "identity", tmp_path))
    assert {name: files[name] for name in files if "earlier" in name} == {
        "earlier/0.jsonl": earlier[0],
        "earlier/1.jsonl": earlier[1],
    }
    assert [str(file) for file in without_paths(task).earlier_examples] == ["earlier/0.jsonl", "earlier/1.jsonl"]


def test_what_is_sent_names_no_path_of_this_machine_but_the_base_models_and_the_dataset_is_used_there(
    tmp_path: Path,
) -> None:
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    task = make_task(tmp_path, base)
    dataset = task.job_dir / "dataset"
    here = prepare(
        task.request.dataset, directory=dataset, token_counter=EstimatedTokenCounter(), report=lambda _: None
    )
    sending = tmp_path / "sending"
    sending.mkdir()
    files = dict(task_files(task, "identity", sending))
    sent = TrainingTask.model_validate_json(files["task.json"].read_bytes())
    assert str(tmp_path / "private") not in files["task.json"].read_text() + files["dataset/manifest.json"].read_text()
    assert files["task.json"].read_text().replace(str(base.path), "").count(str(tmp_path)) == 0
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, path in files.items():
        if name.startswith("dataset/"):
            (arrived / path.name).write_bytes(path.read_bytes())

    def refuse(_: Path) -> None:
        raise AssertionError("the source is not there")

    there = prepare(
        sent.request.dataset,
        directory=arrived,
        token_counter=EstimatedTokenCounter(),
        report=lambda _: None,
        may_read=refuse,
    )
    assert there == here
    assert without_paths(sent) == sent


def test_a_source_that_may_not_be_read_is_not_prepared(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    task = make_task(tmp_path, base).model_copy(update={"allowed_roots": (tmp_path / "elsewhere",)})
    with pytest.raises(InvalidArgument) as caught:
        prepare_dataset(task, lambda _: None)
    assert caught.value.code == "outside_allowed_roots"


def test_a_base_is_found_by_its_path_or_where_it_was_sent_but_only_if_it_is_the_same(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    wanted = bases.identity(base)
    settings = Settings(data_dir=tmp_path / "node", allowed_roots=(tmp_path / "node",))
    assert bases.locate(base, wanted, Settings()) == base.path
    assert bases.locate(base, wanted, settings) is None  # the node does not see that directory
    sent = bases._sent(wanted, settings)
    sent.mkdir(parents=True)
    for name, path in bases.files_to_send(base):
        (sent / name).write_bytes(path.read_bytes())
    assert bases.locate(base, wanted, settings) == sent
    bases._require_same(base, wanted, sent)

    weights = sent / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert bases.locate(base, wanted, settings) is None
    with pytest.raises(ClusterError, match="fingerprint differs") as caught:
        bases._require_same(base, wanted, sent)
    assert caught.value.code == "cluster_base_differs"


def test_another_tokenizer_makes_another_base(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    wanted = bases.identity(base)
    tokenizer = base.path / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert bases.identity(base) != wanted
    assert bases.locate(base, wanted, Settings()) is None


def test_several_gpus_of_a_node_are_used_by_as_many_processes(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "base")), Settings())
    task = make_task(tmp_path, base)
    file = tmp_path / "task.json"
    assert command(task, file) == [sys.executable, "-P", "-m", "peft_core.worker", str(file)]
    two = command(change_request(task, cluster=plan(gpus=2)), file)
    assert two[3:7] == ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    assert two[-3:] == ["-m", "peft_core.worker", str(file)]


def test_the_processes_of_several_nodes_meet_at_the_first_one(tmp_path: Path) -> None:
    task = change_request(
        make_task(tmp_path, resolve(str(write_model(tmp_path / "base")), Settings())), cluster=plan(nodes=2)
    )
    second = command(task, tmp_path / "task.json", Rendezvous("10.0.0.7", 2345, nodes=2, rank=1))
    options = dict(pairwise(second))
    assert (options["--num_processes"], options["--num_machines"], options["--machine_rank"]) == ("2", "2", "1")
    assert (options["--main_process_ip"], options["--main_process_port"]) == ("10.0.0.7", "2345")


def test_too_few_nodes_are_refused_before_anything_is_sent() -> None:
    with pytest.raises(ClusterError, match="on each of 2 nodes, and the cluster has 1 such node\\.") as caught:
        suitable_nodes([node(), node(name="small", gpus=0)], plan(nodes=2))
    assert caught.value.code == "cluster_no_node"
