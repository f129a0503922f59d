"""How the server ends: with its client, at once, and by force where something holds it up.

Nothing is lost by it. Jobs belong to the runner, a process of its own; the inference process ends when its input does.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

import anyio

GRACE_S = 1.0  # after the client has closed our input: clients wait two seconds before they send signals


def leave_with_client(stdin: int) -> None:
    """End this process soon after `stdin` was closed at its other end.

    The orderly way is the SDK's: it reads to the end, cancels what is open and returns. A thread in the middle of a large
    repository would hold that up. A file or a terminal never hangs up; there the orderly way is the only one.
    """
    own = os.dup(stdin)  # the SDK may put something else in its place

    def watch() -> None:
        poll = select.poll()
        poll.register(own, 0)  # no event but those that cannot be declined: hung up, error
        poll.poll()
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=watch, name="client-watch", daemon=True).start()


async def leave_on_signal() -> None:
    """End at once. The thread that reads stdin cannot be woken, so an orderly return would wait for the client."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            os._exit(128 + received)
