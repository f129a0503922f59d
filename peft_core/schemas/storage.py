"""What is kept on disk below the data directory, and what was freed."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import NextStep

ItemKind = Literal["converted_base", "adapter", "job", "export", "logs", "leftovers", "database", "other"]


def size_in_words(size: int) -> str:
    """Return a number of bytes for people: "3 kB", "517 MB", "12.3 GB"."""
    if size < 1_000_000:
        return f"{math.ceil(size / 1e3)} kB"
    return f"{size / 1e6:.0f} MB" if size < 10_000_000_000 else f"{size / 1e9:.1f} GB"


class DiskItem(FrozenModel):
    name: str = Field(description="To use in `free`.")
    kind: ItemKind
    bytes: int
    description: str
    can_free: bool
    reason: str = Field("", description="Why it cannot be freed now.")
    lost: str = Field("", description="What is lost when it is freed.")


class FreedItem(FrozenModel):
    name: str
    bytes: int = Field(description="0 if another process freed it at the same time, or if its files have other links.")


class KeptItem(FrozenModel):
    name: str
    reason: str


class DiskUsage(FrozenModel):
    summary: str
    data_directory: str
    total_bytes: int
    free_bytes: int = Field(description="Free space on the disk of the data directory.")
    items: list[DiskItem] = Field([], description="Largest first.")
    omitted_items: int | None = Field(None, description="Number of smaller items that are not listed.")
    freed: list[FreedItem] = Field([])
    kept: list[KeptItem] = Field([], description="Named items that were not freed.")
    next: str = ""
    next_step: NextStep | None = None
