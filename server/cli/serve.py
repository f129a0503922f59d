"""The command `serve`: the endpoint in the foreground."""

from __future__ import annotations

from peft_core.config import Settings
from peft_core.endpoint.run import run
from peft_core.schemas.serving import EndpointState
from peft_core.serving.service import EndpointOptions
from server.cli.terminal import Terminal


def serve(settings: Settings, port: int, terminal: Terminal) -> None:
    """Run the endpoint until Ctrl-C, and print how to use it.

    Raises:
        ServingError: it cannot be started.
    """

    def announce(state: EndpointState) -> None:
        terminal.note(f"peft-mcp serves at {state.address}; Ctrl-C ends it.")
        terminal.note(f"The token is in {settings.paths.serving_token}.")

    run(EndpointOptions(settings=settings, port=port), announce)
