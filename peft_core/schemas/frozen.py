"""The parts of all schemas: the base class, immutable and strict about unknown fields, and a list that takes one text."""

from __future__ import annotations

from pydantic import BaseModel, BeforeValidator, ConfigDict


class FrozenModel(BaseModel):
    # Validators are built on first use, because most processes use few of these models.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


# Belongs to a field's type, and not into the model: the arguments of a tool are made of the types of a model's fields.
ONE_TEXT_IS_A_LIST = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
