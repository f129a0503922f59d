"""The import of torch and related libraries: the environment variables that they read, and its time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

ENVIRONMENT = {
    # Waiting threads spin for microseconds, then yield their core. By default they spin for milliseconds, and one competing
    # process makes two threads slower than one (20 instead of 42 GFLOP/s; 114 and 108 on a quiet machine).
    "GOMP_SPINCOUNT": "10000",
    # oneDNN, which multiplies bf16, caches a kernel for each shape, and torch caches it again, 1024 each by default. Because
    # micro-batches differ in length, both grew by 660 MB over an epoch. One micro-batch uses up to 100 kernels; a new one
    # costs less than a millisecond.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "1",
    "HF_HUB_OFFLINE": "1",  # all files are on this machine by now; a download would be a mistake
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # a missing operation runs on the CPU instead of ending the run
    "TOKENIZERS_PARALLELISM": "true",  # explicit, so that the library does not warn
}


def prepare_environment() -> None:
    """Set the variables, before torch is imported. Values that the user has set take precedence, except RUST_BACKTRACE."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # When tokenizers runs out of memory and prints a backtrace, it runs out again while it holds the print lock, and deadlocks.
    # Without a backtrace it exits.
    os.environ["RUST_BACKTRACE"] = "0"


@contextmanager
def importing_torch() -> Iterator[None]:
    """Prepare the environment, and collect no garbage while the body imports torch and related libraries.

    They make hundreds of thousands of objects that stay: without scanning these again and again, the import takes a quarter
    less time. Later collections do not scan them either.
    """
    prepare_environment()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
