"""The inference worker as a real process with a tiny model: its deaths, the turns of calls, its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psutil
import pytest
from anyio.abc import Process

from peft_core.config import Settings
from peft_core.errors import AdapterNotLoaded, InferenceError, PeftMcpError
from peft_core.inference.client import WORKER, InferenceClient
from peft_core.inference.protocol import FROM_WORKER, ErrorResponse, Load, Progress, Request, Unload, WorkerConfig
from peft_core.manager import PEFTManager
from peft_core.schemas.results import UnloadedAdapter
from tests.factories import make_base
from tests.tiny_models import write_tiny_adapter, write_tiny_base

SCRIPTED = Path(__file__).with_name("scripted_inference_worker.py")
LONG = {"prompt": "x", "max_new_tokens": 200, "temperature": 1.0}
SHORT = {"prompt": "def f", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_base(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("adapters")
    return [str(write_tiny_adapter(place / name, Path(base), seed)) for seed, name in enumerate("ab")]


@pytest.fixture
async def manager(data_dir: Path) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(Settings(data_dir=data_dir, log_level="WARNING")) as opened:
        yield opened


def worker_process(manager: PEFTManager) -> Process:
    worker = manager._inference._client._worker
    assert worker is not None
    return worker.process


def worker_pid(manager: PEFTManager) -> int:
    return worker_process(manager).pid


async def until_a_request_is_sent(manager: PEFTManager) -> None:
    """Wait until a call has its turn and waits for the worker. Before that it may be blocked on a thread that reads files."""
    while not manager._inference._client._turn.locked():
        await anyio.lowlevel.checkpoint()
    await anyio.wait_all_tasks_blocked()


async def texts_of_single_use(manager: PEFTManager, adapters: list[str], base: str) -> list[str]:
    texts = []
    for adapter in adapters:
        await manager.load_adapter(adapter, base)
        texts.append((await manager.generate(SHORT)).text)
    return texts


async def test_concurrent_adapter_switches_do_not_change_outputs(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    expected = await texts_of_single_use(manager, adapters, base)
    assert expected[0] != expected[1]
    wrong: list[str] = []

    async def ask(which: int) -> None:
        answer = await manager.generate({**SHORT, "compare_with_base": True}, adapter_path=adapters[which])
        if answer.text != expected[which]:
            wrong.append(answer.text)

    async def switch(which: int) -> None:
        await manager.load_adapter(adapters[which], base)

    async with anyio.create_task_group() as group:
        for turn in range(40):
            group.start_soon(ask, turn % 2)
            group.start_soon(switch, turn // 2 % 2)
    assert wrong == []


async def test_memory_does_not_grow_over_a_hundred_load_and_unload_cycles(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    sizes = []
    for _ in range(100):
        await manager.load_adapter(adapters[0], base)
        await manager.load_adapter(adapters[1], base)
        assert (await manager.load_adapter(adapters[0], base)).how == "switched"
        await manager.unload_adapter()
        sizes.append((await manager.unload_adapter(adapters[1])).memory_after_bytes)
    assert sizes[-1] - sizes[20] < 4 << 20


CALLS: dict[str, Callable[[PEFTManager, str, str], Awaitable[Any]]] = {
    "load": lambda manager, adapter, base: manager.load_adapter(adapter, base),
    "generate": lambda manager, adapter, base: manager.generate(SHORT),
    "unload": lambda manager, adapter, base: manager.unload_adapter(),
}


async def test_a_worker_that_dies_during_a_call_is_reported_and_the_next_load_starts_a_new_one(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    await manager.load_adapter(adapters[0], base)
    before = (await manager.generate(SHORT)).text
    for kind, number in (("load", signal.SIGKILL), ("generate", signal.SIGSEGV), ("unload", signal.SIGKILL)):
        error = await death_during(manager, lambda kind=kind: CALLS[kind](manager, adapters[1], base), number)
        assert error.code == "host_died"
        assert f"({kind})" in error.message
        assert number.name in error.message
        assert "load_adapter again" in str(error)
        assert (await manager.list_adapters()).loaded.base_model is None
        with pytest.raises(AdapterNotLoaded):
            await manager.generate(SHORT)
        assert (await manager.load_adapter(adapters[0], base)).status == "loaded"
        assert (await manager.generate(SHORT)).text == before


async def death_during(
    manager: PEFTManager, call: Callable[[], Awaitable[Any]], number: signal.Signals
) -> InferenceError:
    """Kill the worker while it is busy with a call; return the error of the call."""
    pid = worker_pid(manager)
    os.kill(pid, signal.SIGSTOP)  # so that it dies while the call is in progress
    died: list[InferenceError] = []

    async def expect_death() -> None:
        with pytest.raises(InferenceError) as caught:
            await call()
        died.append(caught.value)

    async def poll_list() -> None:
        while not died:
            assert (await manager.list_adapters()).adapters == []
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(expect_death)
        await until_a_request_is_sent(manager)
        group.start_soon(poll_list)
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
    (error,) = died
    return error


async def test_a_worker_that_is_killed_while_it_starts_is_reported(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    async def kill(_done: float, _total: float | None, _message: str) -> None:
        if manager._inference._client.pid is not None:
            os.kill(worker_pid(manager), signal.SIGKILL)

    with pytest.raises(InferenceError, match="SIGKILL") as caught:
        await manager.load_adapter(adapters[0], base, on_progress=kill)
    assert caught.value.code == "host_died"
    assert (await manager.load_adapter(adapters[0], base)).status == "loaded"


async def test_a_worker_that_died_between_calls_is_reported(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    await manager.load_adapter(adapters[0], base)
    process = psutil.Process(worker_pid(manager))
    process.kill()
    await worker_process(manager).wait()
    with pytest.raises(AdapterNotLoaded, match=r"was killed by SIGKILL.*what it had loaded is gone"):
        await manager.generate(SHORT)
    with pytest.raises(AdapterNotLoaded):
        await manager.unload_adapter(adapters[0])
    assert (await manager.unload_adapter()).status == "nothing_loaded"
    assert (await manager.list_adapters()).loaded.adapters == []


async def test_an_idle_worker_exits_and_a_new_one_is_started_when_needed(
    data_dir: Path, adapters: list[str], base: str
) -> None:
    async with PEFTManager(Settings(data_dir=data_dir, idle_unload_s=0.2)) as manager:
        await manager.load_adapter(adapters[0], base)
        with anyio.fail_after(20):
            await worker_process(manager).wait()
        with pytest.raises(AdapterNotLoaded, match=r"ended after 0\.2 s without a call"):
            await manager.generate(SHORT)
        assert (await manager.load_adapter(adapters[0], base)).how == "cold"


async def test_a_call_whose_worker_just_exited_idle_is_repeated_on_a_new_worker(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.inference.client.WORKER", [sys.executable, str(SCRIPTED)])
    config = WorkerConfig(base_models_dir=data_dir, max_resident_adapters=3, idle_s=1)
    client = InferenceClient(config, data_dir / "inference.log")
    pids = []
    request = Load(adapter_path=data_dir, base=make_base())
    for number in (1, 3, 5):  # requests 2 and 4 went to workers that exited
        answer = await client.ask(request, UnloadedAdapter)
        assert answer.memory_before_bytes == number  # the answer to this request
        pids.append(client.pid)
    assert len(set(pids)) == 3
    await client.aclose()


@pytest.fixture
async def scripted(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[InferenceClient]:
    monkeypatch.setattr("peft_core.inference.client.WORKER", [sys.executable, str(SCRIPTED)])
    config = WorkerConfig(base_models_dir=data_dir, max_resident_adapters=3, idle_s=1)
    client = InferenceClient(config, data_dir / "inference.log")
    yield client
    await client.aclose()


async def abandon(client: InferenceClient, adapter: Path) -> int:
    """Cancel a load that has begun; return the pid of the worker that is busy with it."""
    with anyio.CancelScope() as scope:

        async def leave(_done: float, _total: float | None, message: str) -> None:
            if message == "begun":
                scope.cancel()

        await client.ask(Load(adapter_path=adapter, base=make_base()), UnloadedAdapter, leave)
    assert scope.cancelled_caught
    assert client.pid is not None
    return client.pid


async def test_a_worker_that_stays_busy_with_a_cancelled_call_is_killed_and_reported(
    scripted: InferenceClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.inference.client.CANCELLED_LOAD_TIMEOUT_S", 0.2)
    with anyio.fail_after(60):
        stubborn = await abandon(scripted, data_dir / "endless")
        assert scripted.is_still_loading(data_dir / "endless")
        with pytest.raises(AdapterNotLoaded, match=r"0\.2 s after a call was cancelled \(load\) it was still busy"):
            await scripted.ask(Unload(), UnloadedAdapter)
        assert scripted.pid is None
        assert not scripted.is_still_loading(data_dir / "endless")
        with pytest.raises(ProcessLookupError):
            os.kill(stubborn, 0)
        stubborn = await abandon(scripted, data_dir / "endless")
        heard: list[str] = []

        async def hear(_done: float, _total: float | None, message: str) -> None:
            heard.append(message)

        await scripted.ask(Load(adapter_path=data_dir, base=make_base()), UnloadedAdapter, hear)
        assert scripted.pid != stubborn
    assert heard[0] == "waiting for the end of a call that was cancelled"


async def test_a_worker_that_dies_after_a_cancelled_call_is_replaced_by_the_next_call(
    scripted: InferenceClient, data_dir: Path
) -> None:
    with anyio.fail_after(60):
        doomed = await abandon(scripted, data_dir / "doomed")
        await scripted.ask(Load(adapter_path=data_dir, base=make_base()), UnloadedAdapter)
    assert scripted.pid != doomed


async def test_a_worker_with_an_endless_line_is_killed(
    scripted: InferenceClient, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.inference.client.MAX_LINE", 10)
    with anyio.fail_after(60), pytest.raises(InferenceError, match="killed by SIGKILL"):
        await scripted.ask(Load(adapter_path=data_dir / "babbling", base=make_base()), UnloadedAdapter)
    assert scripted.pid is None


async def test_closing_the_client_while_a_worker_starts_leaves_no_process_behind(
    scripted: InferenceClient, data_dir: Path
) -> None:
    before = set(psutil.Process().children())

    async def close(*_: object) -> None:
        await scripted.aclose()

    with anyio.fail_after(60), pytest.raises(InferenceError, match="closed"):
        await scripted.ask(Load(adapter_path=data_dir, base=make_base()), UnloadedAdapter, close)
    assert set(psutil.Process().children()) == before


def test_a_worker_skips_unusable_lines_and_answers_the_next_request(data_dir: Path) -> None:
    config = WorkerConfig(base_models_dir=data_dir, max_resident_adapters=3, idle_s=60)
    command = [*WORKER, config.model_dump_json()]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    request = Request(
        id=7, request=Load(adapter_path=data_dir / "nichts-für-ungut", base=make_base())
    ).model_dump_json()
    lines = b"\xff\xfe not utf-8\n" + b"[" * 100_000 + b"\n" + request.encode() + b"\n"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(lines)
        worker.stdin.flush()
        while isinstance(reply := FROM_WORKER.validate_json(worker.stdout.readline()), Progress):
            pass
        worker.stdin.close()
        assert worker.wait(timeout=30) == 0
    assert isinstance(reply, ErrorResponse)
    assert reply.id == 7


async def test_a_cancelled_generation_stops_and_does_not_affect_the_next(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    await manager.load_adapter(adapters[0], base)
    expected = (await manager.generate(SHORT)).text
    for _ in range(3):
        with anyio.CancelScope() as scope:

            async def leave(
                _done: float, _total: float | None, _message: str, leaving: anyio.CancelScope = scope
            ) -> None:
                leaving.cancel()

            await manager.generate(LONG, on_progress=leave)
        assert scope.cancelled_caught
        heard: list[str] = []

        async def hear(_done: float, _total: float | None, message: str, into: list[str] = heard) -> None:
            into.append(message)

        answer = await manager.generate(SHORT, on_progress=hear)
        assert answer.text == expected
        assert all("tokens by the adapter" in message for message in heard if "waiting for the end" not in message)
    assert [adapter.active for adapter in (await manager.list_adapters()).loaded.adapters] == [True]


async def test_the_list_is_accurate_after_a_cancelled_load(
    manager: PEFTManager, adapters: list[str], base: str
) -> None:
    for stage in ("checking the adapter", "loading the adapter", "the adapter takes effect"):
        await manager.load_adapter(adapters[0], base)
        with anyio.CancelScope() as scope:

            async def leave(
                _done: float,
                _total: float | None,
                message: str,
                stage: str = stage,
                leaving: anyio.CancelScope = scope,
            ) -> None:
                if message == stage:
                    leaving.cancel()

            await manager.load_adapter(adapters[1], base, on_progress=leave)
        assert scope.cancelled_caught, stage
        loaded = (await manager.list_adapters()).loaded
        active = next(adapter.adapter_path for adapter in loaded.adapters if adapter.active)
        assert (await manager.generate(SHORT)).adapter_path == active
        if any(adapter.adapter_path == adapters[1] for adapter in loaded.adapters):
            await manager.unload_adapter(adapters[1])


async def test_a_worker_that_cannot_start_says_what_to_check(tmp_path: Path, adapters: list[str], base: str) -> None:
    (tmp_path / "logs").write_text("in the way")
    async with PEFTManager(Settings(data_dir=tmp_path)) as manager:
        with pytest.raises(InferenceError, match="CODEBASE_GARDENER_DATA_DIR") as caught:
            await manager.load_adapter(adapters[0], base)
    assert caught.value.code == "host_start"


async def test_a_call_that_waits_for_its_turn_reports_it(manager: PEFTManager, adapters: list[str], base: str) -> None:
    await manager.load_adapter(adapters[0], base)
    heard: list[str] = []

    async def hear(_done: float, _total: float | None, message: str) -> None:
        heard.append(message)

    async with anyio.create_task_group() as group:
        group.start_soon(manager.generate, LONG)
        await until_a_request_is_sent(manager)
        await manager.generate(SHORT, on_progress=hear)
    assert heard[0] == "waiting for another call to the model"


async def test_the_worker_ends_with_its_manager_and_with_the_server_process(
    data_dir: Path, adapters: list[str], base: str
) -> None:
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        await manager.load_adapter(adapters[0], base)
        process = psutil.Process(worker_pid(manager))
    assert not process.is_running()
    other = PEFTManager(Settings(data_dir=data_dir))
    await other.load_adapter(adapters[0], base)
    process = psutil.Process(worker_pid(other))
    started = worker_process(other)
    assert started.stdin is not None
    await started.stdin.aclose()  # as the operating system closes the pipe of a killed server
    with anyio.fail_after(10):
        await started.wait()
    await other.aclose()


@pytest.mark.parametrize("path", ["missing", "file"])
async def test_a_path_without_an_adapter_starts_no_worker(
    manager: PEFTManager, adapters: list[str], base: str, path: str
) -> None:
    wrong = f"{adapters[0]}/adapter_model.safetensors" if path == "file" else "/no/such/adapter"
    with pytest.raises(PeftMcpError, match="is a file" if path == "file" else "No adapter at"):
        await manager.load_adapter(wrong, base)
    assert manager._inference._client.pid is None


def test_a_worker_whose_torch_is_broken_says_so_in_the_last_line_of_its_log(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')\n")
    config = WorkerConfig(base_models_dir=data_dir, max_resident_adapters=3, idle_s=60)
    with subprocess.Popen(
        [sys.executable, "-m", "peft_core.inference.worker", config.model_dump_json()],
        stdin=subprocess.PIPE,  # kept open: a worker without a client exits with 0
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as worker:
        assert worker.stderr is not None
        log = worker.stderr.read()
        assert worker.wait(timeout=60) == 1
    assert "cannot open shared object file" in log.splitlines()[-1]


async def test_a_call_that_waits_for_a_cancelled_one_fails_when_the_client_is_closed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.inference.client.WORKER", [sys.executable, str(SCRIPTED)])
    client = InferenceClient(
        WorkerConfig(base_models_dir=data_dir, max_resident_adapters=3, idle_s=1), data_dir / "inference.log"
    )
    with anyio.CancelScope() as scope:

        async def leave(_done: float, _total: float | None, message: str) -> None:
            if message == "begun":
                scope.cancel()

        await client.ask(Load(adapter_path=data_dir / "endless", base=make_base()), UnloadedAdapter, leave)

    async def close(_done: float, _total: float | None, message: str) -> None:
        if message.startswith("waiting"):
            group.start_soon(client.aclose)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            with pytest.raises(InferenceError, match="closed"):
                await client.ask(Load(adapter_path=data_dir, base=make_base()), UnloadedAdapter, close)
