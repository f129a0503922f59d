"""The exit codes of every command."""

from __future__ import annotations

DONE = 0
NO = 1  # the verdict is worse than demanded, or something prevents training
REFUSED = 2  # the request or a setting is not valid, or cannot be carried out
NO_RESULT = 3  # the job has failed, or was cancelled or interrupted
LEFT_RUNNING = 130  # Ctrl-C, as shells report it
