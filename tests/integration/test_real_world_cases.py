"""What people really have, given to the server's tools: every answer uses all of it, refuses it by name, or says what is lost.

The cases have numbers, as in the tests of the parts (`test_what_is_learned`, `test_sources`, `test_base_weights`), which also
look at the numbers behind the answers: what is learned token by token, and the losses of a base model.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client

from peft_core.config import Settings
from server.app import build_server
from tests.clients import text_of
from tests.model_files import (
    CONFIG,
    GGUF_METADATA,
    SHAPES,
    adapter_shapes,
    gguf_bytes,
    safetensors_bytes,
    write_adapter,
    write_model,
)
from tests.unit.planning.test_record_check import CHATML, STRICT, WITHOUT_TOOLS, talk

Call = tuple[str, dict[str, Any]]  # a tool and its arguments
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064d}\nsize 4096\n"
WITH_LAST_TOKEN = CHATML.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")


def base(root: Path, template: str | None = CHATML, **config: Any) -> str:
    directory = write_model(root / "base", **{"max_position_embeddings": 4096, **config})
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return str(directory)


def inspect(root: Path, data: Path, template: str | None = CHATML, **config: Any) -> Call:
    config = {"base_model": base(root, template), "max_length": 256, "allow_little_data": True, **config}
    return "inspect_training_data", {"training_data": str(data), "config": config}


def lines(root: Path, make: Callable[[int], dict[str, Any]], count: int = 60) -> Path:
    path = root / "records.jsonl"
    path.write_text("".join(json.dumps(make(number)) + "\n" for number in range(count)))
    return path


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "code"


def python(number: int, functions: int = 8) -> str:
    """Return functions of which each has words of its own, so that none is a near duplicate."""
    bodies = [
        f"def task_{number}_{n}(first, second):\n"
        + "".join(
            f"    value_{number}_{n}_{line} = first * {number + line} - second % {n + line + 2}\n" for line in range(6)
        )
        + f"    return value_{number}_{n}_0\n"
        for n in range(functions)
    ]
    return "\n\n".join(bodies)


def adapter(root: Path, prefix: str = "", **config: Any) -> Call:
    directory = write_adapter(root / "adapter", **config)
    if prefix:
        shapes = {
            name.replace("model.layers", f"{prefix}.layers", 1): shape for name, shape in adapter_shapes().items()
        }
        (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(shapes))
    return "verify_adapter_compatibility", {"adapter_path": str(directory), "base_model": base(root)}


# -- one function per case ----------------------------------------------------------------------------------------------


def alpaca(root: Path) -> Call:
    return inspect(root, lines(root, lambda n: {"instruction": f"ask {n}", "input": "", "output": f"answer {n}"}))


def tool_calls(root: Path) -> Call:
    def record(number: int) -> dict[str, Any]:
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        record = talk(f"ask {number}", "I look.")
        record["messages"][1]["tool_calls"] = [call]
        return record

    return inspect(root, lines(root, record))


def weights(root: Path) -> Call:
    def record(number: int) -> dict[str, Any]:
        record = talk(f"ask {number}", "BAD", "No.", f"GOOD {number}")
        record["messages"][1]["weight"], record["messages"][3]["weight"] = 0, 1
        return record

    return inspect(root, lines(root, record))


def last_token(root: Path) -> Call:
    turns = ("one", "FIRST {}", "two", "SECOND {}", "three", "THIRD {}")
    return inspect(root, lines(root, lambda n: talk(*(turn.format(n) for turn in turns))), WITH_LAST_TOKEN)


def tool_results(root: Path) -> Call:
    def record(number: int) -> dict[str, Any]:
        record = talk(f"ask {number}", "CALLING", "more", "ANSWER")
        record["messages"][2] = {"role": "tool", "content": "RESULT"}
        return record

    return inspect(root, lines(root, record), WITHOUT_TOOLS)


def one_odd_turn(root: Path) -> Call:
    return inspect(
        root, lines(root, lambda n: talk(f"ask {n}", f"answer {n}", system="Be brief" if n == 37 else None)), STRICT
    )


def too_long(root: Path) -> Call:
    return inspect(
        root, lines(root, lambda n: talk(f"ask {n}", "word " * 300 if n % 4 else f"short {n}")), max_length=64
    )


def all_too_long(root: Path) -> Call:
    return inspect(root, lines(root, lambda n: talk(f"ask {n}", "word " * 300 + str(n))), max_length=64)


def pointers(root: Path) -> Call:
    code = {f"m{n}.py": python(n) for n in range(4)}
    return inspect(root, files(root, code | {f"{n}.sql": POINTER.format(n) for n in range(20)}))


def notebooks(root: Path) -> Call:
    def notebook(number: int) -> str:
        cells = [
            {"cell_type": "code", "metadata": {}, "outputs": [{"text": "OUTPUT"}], "source": cell}
            for cell in python(number).split("\n\n")
        ]
        return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})

    return inspect(root, files(root, {f"{n}.ipynb": notebook(n) for n in range(4)}))


def submodules(root: Path) -> Call:
    def git(directory: Path, *arguments: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *settings, "-C", directory, *arguments], check=True, capture_output=True)

    part = files(root / "part", {"a.py": python(1), "b.py": python(2)})
    whole = files(root, {"README.md": "The parts are in libs."})
    for directory in (part, whole):
        git(directory, "init")
        git(directory, "add", "--all")
        git(directory, "commit", "-m", "one")
    git(whole, "submodule", "add", str(part), "libs/part")
    return inspect(root, whole)


def unknown_language(root: Path) -> Call:
    code = {f"contracts/{n}.zork": python(n, functions=2) for n in range(8)}
    return inspect(root, files(root, code | {f"test/{n}.py": python(n + 20) for n in range(2)}))


def small_functions(root: Path) -> Call:
    return inspect(root, files(root, {f"m{n}.py": python(n) for n in range(8)}), allow_little_data=False)


def expression(root: Path) -> Call:
    kind, arguments = adapter(root)
    path = Path(arguments["adapter_path"], "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": r".*\.self_attn\.(q_proj|v_proj)"}))
    return kind, arguments


def renamed_weights(root: Path) -> Call:
    kind, arguments = inspect(root, lines(root, lambda n: talk(f"ask {n}", f"answer {n}")))
    names = {
        name.replace("embed_tokens", "embed_tokens.modules_to_save.default"): shape for name, shape in SHAPES.items()
    }
    Path(arguments["config"]["base_model"], "model.safetensors").write_bytes(safetensors_bytes(names))
    return kind, arguments


def remote_code(root: Path) -> Call:
    kind, arguments = inspect(root, lines(root, lambda n: talk(f"ask {n}", f"answer {n}")))
    config = CONFIG | {"model_type": "xmodel", "architectures": ["XForCausalLM"], "auto_map": {"AutoConfig": "x.X"}}
    Path(arguments["config"]["base_model"], "config.json").write_text(json.dumps(config))
    return kind, arguments


def named_templates(root: Path) -> Call:
    kind, arguments = inspect(root, lines(root, lambda n: talk(f"ask {n}", f"answer {n}")), None)
    named = [{"name": name, "template": CHATML} for name in ("rag", "tool_use")]
    settings = {"eos_token": "<end>", "chat_template": named}
    Path(arguments["config"]["base_model"], "tokenizer_config.json").write_text(json.dumps(settings))
    return kind, arguments


def gguf_without(key: str) -> Callable[[Path], Call]:
    def call(root: Path) -> Call:
        kind, arguments = inspect(root, lines(root, lambda n: talk(f"ask {n}", f"answer {n}")))
        (root / "m.gguf").write_bytes(gguf_bytes({name: each for name, each in GGUF_METADATA.items() if name != key}))
        arguments["config"]["base_model"] = str(root / "m.gguf")
        return kind, arguments

    return call


def nulls(root: Path) -> Call:
    kind, arguments = inspect(root, files(root, {f"m{n}.py": python(n) for n in range(4)}))
    arguments["config"] |= {"rank": None, "mixture": None, "target_modules": None, "seed": None, "max_length": None}
    return kind, arguments


def uri(root: Path) -> Call:
    kind, arguments = inspect(root, files(root, {f"m{n}.py": python(n) for n in range(4)}))
    return kind, arguments | {"training_data": f"file://{arguments['training_data']}"}


def windows_path(root: Path) -> Call:
    kind, arguments = inspect(root, root)
    return kind, arguments | {"training_data": "C:\\Users\\me\\repo"}


CASES: dict[str, tuple[Callable[[Path], Call], bool, str, str]] = {
    # name: (what is given, whether it is refused, what the answer says, what it must not say)
    "01-alpaca-instruction": (alpaca, False, r"ask \d+ <\|im_end\|>.*\u27e6answer \d+", r"\u27e6ask"),
    "02-openai-tool-calls": (tool_calls, True, "Line 1 .*does not write tool calls.*59 other records", "Training set"),
    "03-message-weight-zero": (weights, False, r"BAD.*\u27e6GOOD \d+", r"\u27e6BAD"),
    "06-turns-lost-eos-at-end": (last_token, False, r"\u27e6FIRST.*\u27e6SECOND.*\u27e6THIRD", r"\u27e6three"),
    "08-template-drops-a-turn": (tool_results, True, "Line 1 .*does not write tool results", "Training set"),
    "08-template-refuses-a-turn": (one_odd_turn, True, "Line 38 .*System role not supported", "Line 1 "),
    "09-most-too-long": (too_long, False, r"45 of 60 records are longer than .*max_length = 512", "Give more"),
    "09-all-too-long": (all_too_long, True, "60 of 60 records are longer .*Set config.max_length = 512", "a directory"),
    "10-lfs-pointers": (pointers, False, r"20 \.sql \(lfs pointer\).*git lfs pull", "oid sha256"),
    "11-notebooks": (notebooks, False, r"4 files.*Sample: \d\.ipynb:\d+-\d+ \(function", "OUTPUT"),
    "12-submodules": (submodules, True, r"libs/part.*config\.more_sources", "a directory further up"),
    "13-unknown-languages": (unknown_language, False, r"10 files", r"\.zork \(no code\)"),
    "14-small-functions-are-many-units": (small_functions, False, "about 5[0-9] examples make only 1[34] steps", "Too little"),
    "15-unsloth-auto-mapping": (
        lambda root: adapter(root, auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}),
        False, "SHAPE_ONLY", "INCOMPATIBLE",
    ),
    "17-targets-as-expression": (
        expression, False, "SHAPE_ONLY.*q_proj", "INCOMPATIBLE",
    ),
    "18-keys-under-another-prefix": (
        lambda root: adapter(root, prefix="language_model.model"), False, r"INCOMPATIBLE.*language_model\.", "Use it with",
    ),
    "19-base-with-renamed-weights": (
        renamed_weights, True, "LlamaForCausalLM: missing model.embed_tokens.weight.*merge_and_unload", "Training set",
    ),
    "22-gguf-without-a-split-rule": (
        gguf_without("tokenizer.ggml.pre"), True, "tokenizer.ggml.pre is missing.*gguf-new", "Training set",
    ),
    "23-remote-code": (remote_code, True, "such code is never run here.*one of the families", "trust_remote_code"),
    "23-named-templates": (named_templates, True, r"no chat template called 'default'.*\(rag, tool_use\)", "Training set"),
    "23-gguf-without-an-end": (
        gguf_without("tokenizer.ggml.eos_token_id"), True, r"tokenizer\.ggml\.eos_token_id", "tokenizer_config",
    ),
    "25-null-for-optionals": (nulls, False, "4 files", "cannot be used"),
    "26-file-uri": (uri, False, "4 files", "cannot be used"),
    "26-windows-path": (windows_path, True, "/mnt/c/Users/me/repo", "absolute path"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
async def test_a_case_from_real_life_is_answered_rightly(case: str, tmp_path: Path) -> None:
    make, is_refused, expected, unexpected = CASES[case]
    tool, arguments = make(tmp_path)
    async with Client(build_server(Settings(data_dir=tmp_path / "data"))) as client:
        result = await client.call_tool(tool, arguments)
    text = text_of(result)
    assert result.is_error == is_refused, text
    assert re.search(expected, text, re.DOTALL), text
    assert not re.search(unexpected, text), text
