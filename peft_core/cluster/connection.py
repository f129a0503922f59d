"""Connect this process to a Ray cluster, and say in one sentence each what prevents it."""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from typing import Any
from urllib.parse import urlsplit

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
from ray.exceptions import ActorUnavailableError, AuthenticationError, GetTimeoutError, RayActorError, RaySystemError
from ray.util.client.logsclient import LogstreamClient

from peft_core.cluster.remote_run import NAMESPACE
from peft_core.errors import ClusterError, sanitize
from peft_core.system.packages import install_command

_CLIENT_PORT = 10001
_ATTEMPTS = 8  # about ten seconds each
_CLOSE_S = 5.0
_ANSWER_S = 5.0  # for which the address may take to accept a connection
_VERSIONS = re.compile(r"Ray: (?P<ray>\S+)\s+Python: (?P<python>\S+)")
_AUTH = ("unauthenticated", "authentication", "auth token", "invalid token")
# What Ray raises when the connection or the head node is gone. Whether an actor still exists is asked afterwards.
LOST = (ConnectionError, GetTimeoutError, grpc.RpcError, RaySystemError, ActorUnavailableError)
GONE = RayActorError


def connect(address: str) -> None:
    """Connect this process. The token is read by Ray (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).

    Raises:
        ClusterError: `cluster_unreachable`, `cluster_token`, `cluster_ray_version`, `cluster_python_version`.
    """
    os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", "5")  # seconds; the bridge waits longer, and says so
    os.environ.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    for attempt in range(1, _ATTEMPTS + 1):
        _require_answer(address)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises several types, and RuntimeError for most reasons
            ray.shutdown()
            # A busy head node takes too long to start the process that serves a client, or that process crashes, because it is
            # forked while other threads of the head node use gRPC. On a busy machine, that happened three times in a row.
            if attempt == _ATTEMPTS or not isinstance(error, ConnectionAbortedError):
                raise _explain(error, address) from error
        else:
            return


def _close_logs(client: LogstreamClient) -> None:
    """Replace Ray's method, which waits for ever after the head node could not start the process that serves this client."""
    client.request_queue.put(None)
    if client.log_thread is not None:
        client.log_thread.join(_CLOSE_S)


LogstreamClient.close = _close_logs  # type: ignore[method-assign, assignment]


def disconnect() -> None:
    ray.shutdown()


def _require_answer(address: str) -> None:
    """Ask for a connection, which Ray itself would try for half a minute."""
    place = host_and_port(address)
    if place is None:
        return
    try:
        socket.create_connection(place, timeout=_ANSWER_S).close()
    except OSError as error:
        raise unreachable(address, error.strerror or str(error)) from error


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return where a cluster listens, or None for "auto".

    Raises:
        ClusterError: `cluster_address`: the address is malformed.
    """
    if address == "auto":
        return None
    try:
        parts = urlsplit(address if "://" in address else f"gcs://{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in ("ray", "gcs") or (parts.scheme == "gcs" and port is None):
        raise ClusterError(
            f"CODEBASE_GARDENER_CLUSTER = {sanitize(repr(address))} cannot be used: must be ray://HOST:10001, or on a machine "
            "of the cluster HOST:6379 or auto.",
            code="cluster_address",
        )
    return host, port or _CLIENT_PORT


def unreachable(address: str, reason: str) -> ClusterError:
    return ClusterError(
        f"The cluster at {sanitize(address)} does not answer: {sanitize(reason, limit=200)}.",
        code="cluster_unreachable",
        suggestions=["Check CODEBASE_GARDENER_CLUSTER, and that its head node runs and this machine may connect to it"],
    )


def _refuses_token(address: str) -> bool:
    """Ask the head node for a sign of life: Ray's client reports a wrong token as a connection that timed out."""
    place = host_and_port(address)
    if place is None or not address.startswith("ray://"):
        return False
    channel = init_grpc_channel(f"{place[0]}:{place[1]}")
    messages: Any = ray_client_pb2  # its names are made when it is imported
    question = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
    try:
        stub = ray_client_pb2_grpc.RayletDriverStub(channel)
        stub.ClusterInfo(question, timeout=_ANSWER_S, metadata=[("client_id", "peft-mcp")])
    except grpc.RpcError as error:
        return bool(error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED))
    finally:
        channel.close()
    return False


def _explain(error: Exception, address: str) -> ClusterError:
    text = " ".join(str(error).split())
    if isinstance(error, AuthenticationError) or any(sign in text.lower() for sign in _AUTH) or _refuses_token(address):
        return ClusterError(
            f"The cluster at {sanitize(address)} refused the token, or none was given.",
            code="cluster_token",
            suggestions=[
                "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token, for the server's process"
            ],
        )
    if "Version mismatch" in text and len(found := list(_VERSIONS.finditer(text))) == 2:
        theirs, ours = found
        if theirs["ray"] != ours["ray"]:
            return ClusterError(
                f"The cluster runs Ray {theirs['ray']}, but Ray {ours['ray']} is installed here; both must be equal.",
                code="cluster_ray_version",
                suggestions=[f"Install it here: {install_command('ray[client]==' + theirs['ray'])}"],
            )
        return ClusterError(
            f"The cluster runs Python {theirs['python']}, but this machine {ours['python']}; major and minor must be equal.",
            code="cluster_python_version",
            suggestions=["Install peft-mcp here with that version of Python"],
        )
    if isinstance(error, ConnectionAbortedError):
        return unreachable(
            address,
            "its head node could not start the process that serves this client (see ray_client_server.err in Ray's logs there)",
        )
    return unreachable(address, f"{type(error).__name__}: {text}" if text else type(error).__name__)
