"""One export in progress: the verified adapter, where it is written, and PEFT's own results to compare with."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from peft_core.adapters.files import AdapterFiles
from peft_core.adapters.names import file_name
from peft_core.export.request import ExportRequest
from peft_core.export.worker.compare import HeldOutText, Reference, held_out_text, reference, require_positions
from peft_core.llamacpp.worker.lora_pairs import Lora
from peft_core.modeling.adapter_model import ResidentModel, release_memory
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan, use_cores
from peft_core.planning.cost_model import inference_memory_bytes
from peft_core.schemas.base_model import Base
from peft_core.schemas.export import Verification
from peft_core.system.machine import available_memory_bytes

FLOAT32 = DevicePlan("cpu", torch.float32, "no", "float32: the results to compare with")


@dataclass
class Job:
    request: ExportRequest
    files: AdapterFiles
    lora: Lora
    directory: Path  # hidden until it is complete
    say: Callable[[str], None]  # reports the next stage
    warnings: list[str] = field(default_factory=list)
    compared: tuple[HeldOutText, Reference] | None = None  # PEFT's results, once they are computed

    @property
    def base(self) -> Base:
        return self.request.base

    @property
    def base_name(self) -> str:
        """The base model's name as a part of a file name."""
        return file_name(self.base.name.rpartition("/")[2]) or "base"

    @property
    def name(self) -> str:
        """A file name for this adapter, without suffix."""
        return f"{self.base_name}-{file_name(self.request.adapter_id) or 'adapter'}"

    def final(self, name: str = "") -> str:
        """Return where a file, or the directory itself, will be, quoted for a shell."""
        return shlex.quote(str(self.request.directory / name))

    @property
    def base_gguf(self) -> str:
        """The base model's own GGUF file, quoted for a shell."""
        return shlex.quote(self.base_gguf_path)

    @property
    def base_gguf_path(self) -> str:
        """The same for a Modelfile, which takes a path as it is: single quotes would be a part of it."""
        return str(self.base.path) if self.base.format == "gguf" else "BASE.gguf"

    @cached_property
    def hf_directory(self) -> Path:
        """The base model as a Hugging Face directory, converted if necessary."""
        return ensure_hf_directory(self.base, self.request.base_models_dir, self.say)

    @property
    def memory_missing(self) -> str | None:
        """Why the base model cannot be held in float32 to compare with; None if it can."""
        needed, free = inference_memory_bytes(self.base.shape, "cpu"), available_memory_bytes()
        if needed <= free:
            return None
        return f"the comparison needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"

    def load_model(self) -> tuple[ResidentModel, str, HeldOutText, Reference]:
        """Load base model and adapter in PEFT; return them with the text to compare on and PEFT's log-probabilities.

        Raises:
            InferenceError: The adapter has no effect or gives NaN.
        """
        directory = self.hf_directory
        self.say(f"computing the results of PEFT on {self.base.name}")
        use_cores()
        model = ResidentModel.load(self.base, directory, FLOAT32)
        adapter, _ = model.add(self.files)
        text = held_out_text(model.tokenizer, self.request.held_out, self.base.shape.context_length)
        require_positions(text)
        self.compared = text, reference(model, adapter, text)
        return model, adapter, *self.compared

    def results_of_peft(self) -> tuple[HeldOutText, Reference]:
        """As `load_model`, but frees the model again."""
        model, _, text, ours = self.load_model()
        del model
        release_memory()
        return text, ours


@dataclass(frozen=True)
class Written:
    """What a target wrote into the job's directory."""

    form: str  # for the summary: "a LoRA file for llama.cpp"
    verification: Verification
    usage: list[str]
    ollama_model: str | None = None  # that was created
    not_created: str = ""  # why no model was created in Ollama
