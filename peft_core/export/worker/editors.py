"""Settings of editors for completion with the exported adapter, as files to copy from. Nothing is installed.

Every one of them asks llama-server, at an address of this machine. Continue and Zed choose the form of a prompt by the model's
name, so the name begins with the base model's; where an editor takes the form itself, it is given.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft_core.adapters.names import model_name as served_name
from peft_core.base_models.tokenizer import load_tokenizer
from peft_core.errors import ExportError
from peft_core.export.worker.job import Job
from peft_core.schemas.dataset import FillInTheMiddle

PORT = 8012  # that llama.vscode and llama.vim ask by default
# Zed's names of prompt forms, by the token that begins them. "infer": by the model's name.
_ZED_FORMATS = {
    "<|fim_prefix|>": "qwen",
    "<fim_prefix>": "star_coder",
    "▁<PRE>": "code_llama",
    "<｜fim▁begin｜>": "deepseek_coder",  # noqa: RUF001
}


def fill_in_the_middle_of(job: Job) -> FillInTheMiddle:
    """Return the base model's tokens for fill-in-the-middle.

    Raises:
        ExportError: It has none.
    """
    marks = load_tokenizer(job.hf_directory).fill_in_the_middle
    if marks is None:
        raise ExportError(
            f"{job.base.name} has no fill-in-the-middle tokens, which completion in an editor needs.",
            code="no_fill_in_the_middle",
            suggestions=[
                "Train on a base model with them, such as Qwen2.5-Coder",
                "Or use to='gguf-lora' for chat and scripts",
            ],
        )
    return marks


def model_name(job: Job) -> str:
    """Return the name to serve the model under."""
    manifest = job.files.manifest
    return served_name(job.base.name, manifest.project_id if manifest is not None else job.request.adapter_id)


def write_editor_settings(directory: Path, name: str, marks: FillInTheMiddle) -> None:
    """Write a file for each editor."""
    address = f"http://127.0.0.1:{PORT}"
    prompt = marks.prompt_text("{{{prefix}}}", "{{{suffix}}}")
    vscode = {
        "llama-vscode.endpoint": address,
        "llama-vscode.lora_completion": "",  # otherwise it asks for the adapter at half its strength
    }
    zed = {
        "edit_predictions": {
            "provider": "open_ai_compatible_api",
            "open_ai_compatible_api": {
                "api_url": f"{address}/v1/completions",
                "model": name,
                "prompt_format": _ZED_FORMATS.get(marks.prefix, "infer"),
                "max_output_tokens": 64,
            },
        }
    }
    files = {
        "llama.vscode.settings.json": _json(vscode),
        "zed.settings.json": _json(zed),
        "llama.vim": f"let g:llama_config = {{ 'endpoint_fim': '{address}/infill' }}\n",
        "continue.config.yaml": (
            "name: peft-mcp\nversion: 1.0.0\nschema: v1\nmodels:\n"
            f"  - name: {json.dumps(name)}\n    provider: llama.cpp\n    model: {json.dumps(name)}\n"
            f"    apiBase: {address}\n    roles: [autocomplete]\n"
            f"    promptTemplates:\n      autocomplete: {json.dumps(prompt)}\n"
        ),
    }
    for file, text in files.items():
        (directory / file).write_text(text, encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
