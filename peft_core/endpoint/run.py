"""Run the endpoint until it is stopped: one process per data directory, which holds its lock."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime

import anyio
import uvicorn

from peft_core.endpoint.app import Endpoint
from peft_core.errors import ServingError
from peft_core.manager import PEFTManager
from peft_core.schemas.serving import EndpointState
from peft_core.serving.service import EndpointOptions
from peft_core.serving.state import token, write_state
from peft_core.system.lock import FileLock

GRACE_S = 10  # for requests that are being answered when it is stopped


def run(options: EndpointOptions, announce: Callable[[EndpointState], None]) -> None:
    """Serve until SIGTERM, SIGINT or a request to stop. `announce` is called when requests are accepted.

    Raises:
        ServingError: Another endpoint runs for this data directory, or the port is taken.
    """
    paths = options.settings.paths
    paths.logs.mkdir(parents=True, exist_ok=True)
    with FileLock(paths.serving_lock) as lock:
        if not lock.acquire(1.0):
            raise ServingError("An endpoint already runs for this data directory.", code="already_serving")
        with _listen(options.port) as listening:
            state = EndpointState(
                address=f"http://127.0.0.1:{listening.getsockname()[1]}",
                run_id=secrets.token_hex(8),
                started_at=datetime.now(UTC).isoformat(timespec="seconds"),
                default_project=options.default_project,
            )
            anyio.run(_serve, options, state, listening, announce)
        paths.serving_state.unlink(missing_ok=True)


async def _serve(
    options: EndpointOptions,
    state: EndpointState,
    listening: socket.socket,
    announce: Callable[[EndpointState], None],
) -> None:
    async with PEFTManager(options.settings) as manager:
        endpoint = Endpoint(manager, token(options.settings.paths), state, lambda: setattr(server, "should_exit", True))
        server = uvicorn.Server(
            uvicorn.Config(
                endpoint.app(),
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=5,
            )
        )
        write_state(options.settings.paths, state)
        announce(state)
        async with anyio.create_task_group() as group:
            group.start_soon(endpoint.warm_up)
            await server.serve(sockets=[listening])
            group.cancel_scope.cancel()


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
    except OSError as error:
        listening.close()
        raise ServingError(
            f"port = {port} cannot be used: {error.strerror or error}.",
            code="port_taken",
            suggestions=["Give another port, or 0 for a free one"],
        ) from error
    listening.listen(128)
    return listening
