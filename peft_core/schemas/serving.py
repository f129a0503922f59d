"""The endpoint that serves adapters to editors and scripts."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from peft_core.schemas.frozen import FrozenModel

DEFAULT_PORT = 8012  # that llama.vscode and llama.vim ask by default


class ServedModel(FrozenModel):
    name: str = Field(description="To use as `model` in requests.")
    project_id: str | None = Field(description="Null for a base model alone.")
    base_model: str
    adapter_path: str | None = None
    loaded_with: str = Field("", exclude=True)  # the project whose adapter is loaded, and its base model with it


class EndpointState(FrozenModel):
    """What a running endpoint writes into the data directory, so that every server finds it."""

    model_config = ConfigDict(extra="ignore")  # an endpoint of another version may still run

    address: str  # http://127.0.0.1:PORT
    run_id: str  # of this process: a reused port cannot be mistaken for it
    started_at: str
    default_project: str | None = None  # answers requests that name no model; None: the one with the newest adapter


class Serving(FrozenModel):
    """A running endpoint, and how to use it."""

    summary: str
    status: Literal["serving"] = "serving"
    address: str
    token_path: str = Field(description="File with the token that every request needs: Authorization: Bearer TOKEN.")
    models: list[ServedModel] = Field([], description="Current adapters of all projects, and their base models.")
    default_model: str | None = Field(None, description="Answers requests that name no model, such as /infill.")
    started_at: str
    usage: list[str] = Field([], description="Commands and settings to copy.")
    next: str = ""


class ServingStopped(FrozenModel):
    summary: str
    status: Literal["stopped", "not_running"]
    address: str | None = None
