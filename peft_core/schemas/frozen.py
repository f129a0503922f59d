"""The base class of every schema: immutable, and strict about unknown fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class FrozenModel(BaseModel):
    # Validators are built on first use, because most processes use few of these models.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
