"""What torch and its company read from the environment as they are imported."""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Threads that wait spin for some microseconds, then give their core away. By default they spin for milliseconds, and
    # one competing process then makes two threads slower than one (measured: 20 instead of 42 GFLOP/s; 114 and 108 on a
    # quiet machine). People work on the machine while it trains.
    "GOMP_SPINCOUNT": "10000",
    # oneDNN, which multiplies bfloat16, keeps a program for each shape it has seen, and torch keeps it once more, 1024 each by
    # default. Micro-batches differ in length: both together grew by 660 MB over the shapes of an epoch. One micro-batch uses
    # up to a hundred; a new one costs less than a millisecond.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "1",
    "HF_HUB_OFFLINE": "1",  # everything is on this machine by now; a download here would be a mistake
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # a missing operation runs on the CPU instead of ending the run
    "TOKENIZERS_PARALLELISM": "true",  # said aloud, so that the library does not warn
}


def prepare_environment() -> None:
    """Call it before torch is imported. What the user has set stays, but for one."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # tokenizers, out of memory: with a backtrace to print it runs out again while it holds the lock of all printing, and waits
    # for itself for ever. Without, it ends.
    os.environ["RUST_BACKTRACE"] = "0"
