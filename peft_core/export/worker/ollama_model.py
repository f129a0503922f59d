"""Write an adapter as a model for Ollama, and create it in the running server.

The model has the template, stop words and parameters of its base model. A directory with a Modelfile is written in any case, so
that `ollama create` does the same by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.families import END_TOKENS
from peft_core.base_models.fim_tokens import read_fim_tokens
from peft_core.base_models.ollama_store import OllamaModel, find_ollama_by_weights
from peft_core.errors import ExportError, HeaderError, OllamaError
from peft_core.export.ollama_plan import LORA
from peft_core.export.request import OllamaPlan
from peft_core.export.worker import targets
from peft_core.export.worker.job import Job, Written
from peft_core.ollama import OllamaClient
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import FillInTheMiddle

MODELFILE = "Modelfile"
CONTEXT_TOKENS = 4096  # Ollama's own default; more takes memory
_SECONDS = 600.0  # limit of each upload and of the creation, plus:
_SECONDS_PER_BYTE = 1 / 20e6
_NO_TEMPLATE = ("", "{{ .Prompt }}")  # of a model in Ollama
_CHATML = "<|im_start|>"
_CHATML_TEMPLATE = """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ else }}{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


@dataclass(frozen=True)
class Recipe:
    """What a model in Ollama has besides its weights. What is None or empty is left to Ollama."""

    template: str | None = None
    system: str | None = None
    license: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def write_ollama_target(job: Job) -> Written:
    """A model in the running Ollama, by a LoRA file beside the base model or by merged weights; or the files to create it."""
    plan = job.request.ollama
    assert plan is not None  # noqa: S101 -- the service has planned it
    by_adapter = job.request.format == LORA
    form = {"format": "f32"} if by_adapter else {}
    inner = replace(job, request=job.request.model_copy(update=form))
    written = targets.write_gguf_lora_target(inner) if by_adapter else targets.write_merged_target(inner)
    file = next(job.directory.glob("*.gguf"))
    stored = find_ollama_by_weights(job.base.path) if job.base.format == "gguf" else None
    recipe = recipe_of(job.base, stored)
    job.warnings.extend(recipe.warnings)
    fills = ".Suffix" in (recipe.template or "")
    if by_adapter and stored is not None:  # it passes on the rest
        recipe = Recipe(template=None if recipe.template == stored.text("template") else recipe.template)
    source = (stored.name if stored is not None else job.base.path) if by_adapter else None
    (job.directory / MODELFILE).write_text(modelfile(file.name, source, recipe), encoding="utf-8")
    reason = plan.reason or _create(job, plan, file, recipe)
    command = f"ollama create {plan.model} -f {job.final(MODELFILE)}"
    usage = [
        *([command] if reason else []),
        f"ollama run {plan.model} PROMPT",
        f'API: POST /api/generate {{"model": "{plan.model}", "prompt": ...}}'
        + (', with "suffix" for fill-in-the-middle' if fills else ""),
    ]
    if reason and by_adapter:
        usage.append("Ollama after 0.34.0 takes no ADAPTER: export with format='f16' for it")
    done = "" if reason else f", created in Ollama {plan.version} as {plan.model}"
    return replace(
        written,
        form=f"{written.form}{done}",
        usage=usage,
        ollama_model=None if reason else plan.model,
        not_created=reason,
    )


# -- template, parameters ----------------------------------------------------------------------------------------------


def recipe_of(base: Base, stored: OllamaModel | None) -> Recipe:
    """Return the template, stop words and parameters: those of the base model in Ollama, or else what its files imply."""
    marks = read_fim_tokens(base.path)
    try:
        own = {kind: stored.text(kind) for kind in ("template", "system", "license", "params")} if stored else {}
    except HeaderError as error:
        raise ExportError(f"The texts of {base.name} in Ollama cannot be read: {error.message}") from error
    chat = read_checkpoint(base.path).chat_templates.default or ""
    template, warning = _template(own.get("template"), chat, marks)
    parameters = _parameters(own.get("params")) if stored is not None else _derived_parameters(base, chat)
    return Recipe(template, own.get("system"), own.get("license"), parameters, (warning,) if warning else ())


def _template(own: str | None, chat: str, marks: FillInTheMiddle | None) -> tuple[str | None, str]:
    """Return a template that also fills in the middle if the base model can, and a warning."""
    if marks is None or (own is not None and ".Suffix" in own):
        return own, ""
    rest = own
    if rest is None and not chat:
        rest = "{{ .Prompt }}"
    elif rest is None and _CHATML in chat:
        rest = _CHATML_TEMPLATE
    if rest is None:
        return None, (
            "The base model has fill-in-the-middle tokens, but its chat template has no counterpart here: Ollama takes no "
            "`suffix` for this model. Send the whole prompt with raw=true instead."
        )
    gap = marks.prompt_text("{{ .Prompt }}", "{{ .Suffix }}")
    return f"{{{{ if .Suffix }}}}{gap}{{{{ else }}}}{rest}{{{{ end }}}}", ""


def _parameters(text: str | None) -> dict[str, Any]:
    """Return the parameters of a model in Ollama, as far as they are numbers, texts and lists of texts."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        values = {}
    if not isinstance(values, dict):
        return {}
    return {name: value for name, value in values.items() if name.isidentifier() and _is_parameter(value)}


def _is_parameter(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int | float)


def _derived_parameters(base: Base, chat: str) -> dict[str, Any]:
    stop = [token for token in END_TOKENS if token in chat]
    context = min(base.shape.context_length, CONTEXT_TOKENS)
    return {"temperature": 0, "num_ctx": context, **({"stop": stop} if stop else {})}


# -- Modelfile ---------------------------------------------------------------------------------------------------------


def modelfile(file: str, base: object, recipe: Recipe) -> str:
    """Return a Modelfile. A text with three double quotes, which would end it there, is left out with a comment.

    Args:
        file: Name of the GGUF file beside it: merged weights, or an adapter if `base` is given.
        base: The base model's name in Ollama or the path of its GGUF file; None for merged weights.
        recipe: Template and parameters. A base model in Ollama passes on its own, so that only what differs is needed.
    """
    lines = [f"FROM ./{file}"] if base is None else [f"FROM {base}", f"ADAPTER ./{file}"]
    texts = [("TEMPLATE", recipe.template), ("SYSTEM", recipe.system), ("LICENSE", recipe.license)]
    lines += [_instruction(name, text) for name, text in texts if text]
    for name, value in recipe.parameters.items():
        for item in value if isinstance(value, list) else [value]:
            quoted = isinstance(item, str)
            lines.append(_instruction(f"PARAMETER {name}", item) if quoted else f"PARAMETER {name} {json.dumps(item)}")
    return "\n".join(lines) + "\n"


def _instruction(name: str, text: str) -> str:
    if '"""' in text or text.startswith('"') or text.endswith('"'):
        return f"# {name} is left out: it has quotes that a Modelfile cannot hold"
    return f'{name} """{text}"""'


# -- creation ----------------------------------------------------------------------------------------------------------


def _create(job: Job, plan: OllamaPlan, file: Path, recipe: Recipe) -> str:
    """Create the model; return why it was not created, or an empty text."""
    client = OllamaClient(plan.address)
    by_adapter = job.request.format == LORA
    try:
        job.say(f"sending the model to Ollama {plan.version}")
        digest = client.upload(file, timeout_s=_limit(file))
        if by_adapter:
            weights = _base_in_server(client, job, plan) | {"adapters": {file.name: digest}}
        else:
            weights = {"files": {file.name: digest}}
        job.say(f"creating {plan.model} in Ollama")
        client.create(plan.model, timeout_s=_limit(file), say=job.say, **weights, **_texts(recipe))
        shown = client.show(plan.model)
    except OllamaError as error:
        return error.message
    if not shown.has_adapter:
        return f"{plan.model} is there now, but Ollama shows no adapter in it"
    if ".Suffix" in (recipe.template or "") and ".Suffix" not in shown.template:
        job.warnings.append("Ollama did not take over the template for fill-in-the-middle.")
    if job.base.has_chat_template and not (by_adapter or recipe.template) and shown.template in _NO_TEMPLATE:
        job.warnings.append(
            f"Ollama knows no counterpart of the base model's chat template: `ollama run {plan.model}` and /api/chat send the "
            "bare text, which the model was not trained to answer. Add a TEMPLATE to the Modelfile, and create it again."
        )
    return ""


def _base_in_server(client: OllamaClient, job: Job, plan: OllamaPlan) -> dict[str, Any]:
    """Return the base model as the server has it; if it has not, it is sent."""
    if plan.base_model is not None:
        return {"from_": plan.base_model}
    path = job.base.path
    return {"files": {"base.gguf": client.upload(path, timeout_s=_limit(path))}}


def _texts(recipe: Recipe) -> dict[str, Any]:
    named = {"template": recipe.template, "system": recipe.system, "license": recipe.license}
    present: dict[str, Any] = {name: text for name, text in named.items() if text}
    return present | ({"parameters": dict(recipe.parameters)} if recipe.parameters else {})


def _limit(file: Path) -> float:
    return _SECONDS + _SECONDS_PER_BYTE * file.stat().st_size
