"""Hostile adapters. Each attack modifies a valid adapter in place.

An attack has the error code with which it must be rejected, or None if it is harmless because the modified content is never
read or used.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_core.adapters.manifest import CARD_NAME, CONFIG, MANIFEST_NAME, WEIGHTS
from tests.model_files import with_length

Modify = Callable[[Path], object]  # modifies the adapter in a directory
REDOS = r"(([a-z_.0-9])+)+X"  # a regular expression with catastrophic backtracking
ENTRY_A = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'  # a header without its last brace


@dataclass(frozen=True)
class Attack:
    name: str
    apply: Modify
    code: str | None
    scanned: bool = False  # detected only if the weights are read, because the headers are valid


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self._marker}'",)


def marker_of(directory: Path) -> Path:
    """Return the file that exists if code of this adapter has run."""
    return directory.parent / "it_ran"


def set_config(**changes: Any) -> Modify:
    def modify(directory: Path) -> None:
        settings = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(settings | changes))

    return modify


def write_config(content: str | bytes) -> Modify:
    raw = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / CONFIG).write_bytes(raw)


def write_header(entries: object, data: bytes = bytes(8)) -> Modify:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return lambda directory: (directory / WEIGHTS).write_bytes(with_length(raw, data))


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def change_bytes(change: Callable[[bytes], bytes]) -> Modify:
    return lambda directory: (directory / WEIGHTS).write_bytes(change((directory / WEIGHTS).read_bytes()))


def change_tensors(change: Callable[[dict[str, Any], bytearray], object]) -> Modify:
    """Change the header's entries and the data of the valid file. The header's length is corrected afterwards."""

    def modify(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        entries.pop("__metadata__", None)
        change(entries, data)
        (directory / WEIGHTS).write_bytes(with_length(json.dumps(entries).encode(), bytes(data)))

    return modify


def add_tensor(name: str, shape: tuple[int, ...] = (4,)) -> Modify:
    """Append a tensor."""

    def change(entries: dict[str, Any], data: bytearray) -> None:
        size = 4 * math.prod(shape)
        entries[name] = entry(len(data), len(data) + size, shape=shape)
        data += struct.pack("<f", 1.0) * (size // 4)

    return change_tensors(change)


def overwrite_base(suffix: str) -> Modify:
    """Append a tensor that is named like a parameter of the base model: the module of the first A, and `suffix`."""

    def change(entries: dict[str, Any], data: bytearray) -> None:
        name = next(name for name in entries if ".lora_A." in name)
        module = name.removesuffix(".lora_A.weight")
        entries[f"{module}{suffix}"] = entry(len(data), len(data) + 16, shape=(4,))
        data += bytes(16)

    return change_tensors(change)


def fill_start(number: bytes) -> Modify:
    """Replace the first four numbers of the weights."""

    def change(_: dict[str, Any], data: bytearray) -> None:
        data[:16] = number * 4

    return change_tensors(change)


def zero_every_b(entries: dict[str, Any], data: bytearray) -> None:
    for name, tensor in entries.items():
        if ".lora_B." in name:
            begin, end = tensor["data_offsets"]
            data[begin:end] = bytes(end - begin)


def change_dtype(dtype: str) -> Modify:
    def change(entries: dict[str, Any], _: bytearray) -> None:
        for tensor in entries.values():
            tensor["dtype"], tensor["shape"] = dtype, [tensor["shape"][0] * 4, tensor["shape"][1]]

    return change_tensors(change)


def replace(name: str, make: Callable[[Path], object]) -> Modify:
    """Replace a file by what `make` creates at its path."""

    def modify(directory: Path) -> None:
        (directory / name).rename(directory.parent / f"moved-{name}")
        make(directory / name)

    return modify


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def bind_socket(path: Path) -> None:
    """Create a Unix socket. It is bound from its directory, because the length of a socket's path is limited."""
    unix_socket, working_directory = socket.socket(socket.AF_UNIX), Path.cwd()
    os.chdir(path.parent)
    try:
        unix_socket.bind(path.name)
    finally:
        os.chdir(working_directory)
        unix_socket.close()


def write_pickle(name: str, *, keep_weights: bool = False) -> Modify:
    def modify(directory: Path) -> None:
        if not keep_weights:
            (directory / WEIGHTS).unlink()
        (directory / name).write_bytes(pickle.dumps({"x": Evil(marker_of(directory))}))

    return modify


def write_modules(directory: Path) -> None:
    """Write Python modules that create the marker when they are imported."""
    body = f"open({str(marker_of(directory))!r}, 'w')\nModel = PeftModel = LoraConfig = object\n"
    (directory / "evil.py").write_text(body)
    (directory / "__init__.py").write_text(body)


def import_module(**changes: Any) -> Modify:
    """Write modules, and a configuration that names one of them."""

    def modify(directory: Path) -> None:
        write_modules(directory)
        set_config(**changes)(directory)

    return modify


def add_file(name: str, content: str) -> Modify:
    return lambda directory: (directory / name).write_text(content)


def write_sparse_file(directory: Path) -> None:
    """Write a sparse file of 8 GB, which takes almost no disk space."""
    size = 8 << 30
    raw = json.dumps({"base_model.model.x.lora_A.weight": entry(0, size, shape=(4, size // 16))}).encode()
    with (directory / WEIGHTS).open("wb") as file:
        file.write(with_length(raw))
        file.truncate(8 + len(raw) + size)


def write_many_tensors(directory: Path, count: int = 20_001) -> None:
    write_header({f"t{number}": entry(0, 0, shape=(0,)) for number in range(count)}, b"")(directory)


def write_list_bomb(directory: Path) -> None:
    """Write a header of 8 MB of JSON that takes 200 MB when it is parsed."""
    write_header(b'{"a":[' + b",".join([b"[]"] * 2_700_000) + b"]}", b"")(directory)


TEMPLATE = "{% for i in range(10**9) %}{{ cycler.__init__.__globals__.os.system('touch it_ran') }}{% endfor %}"

ATTACKS = [
    # pickles
    Attack("a pickle that runs a command", write_pickle("adapter_model.bin"), "pickle"),
    Attack("a pickle named .pt", write_pickle("adapter_model.pt"), "pickle"),
    Attack("a pickle next to valid weights", write_pickle("adapter_model.bin", keep_weights=True), None),
    Attack("a pickle named like the weights", write_pickle(WEIGHTS, keep_weights=True), "bad_file"),
    # settings that run code, change the base model or allocate memory
    # Nothing of the file is ever handed to PEFT, so that what is not read cannot import a module or open a file.
    Attack("auto_mapping to os.system", import_module(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
           None),
    Attack("auto_mapping to its own module", import_module(auto_mapping={"base_model_class": "Model",
           "parent_library": "evil"}), None),
    Attack("megatron_core alone", import_module(megatron_core="evil"), None),
    *(Attack(f"setting {name}, which is not read", set_config(**{name: value}), None) for name, value in {
        "corda_config": {"cache_file": "/etc/passwd"}, "eva_config": {"rho": 2}, "fan_in_fan_out": True,
        "runtime_config": {"ephemeral_gpu_offload": True}, "task_type": "os.system",
    }.items()),
    Attack("auto_map to its own module", import_module(auto_map={"AutoModel": "evil.Model"}), "unsupported_setting"),
    Attack("megatron_core names a module", import_module(megatron_config={"a": 1}, megatron_core="evil"),
           "unsupported_setting"),
    Attack("layer_replication", set_config(layer_replication=[[0, 2]] * 100_000), "bad_file"),  # 900 KB
    Attack("a short layer_replication", set_config(layer_replication=[[0, 2]] * 9), "unsupported_setting"),
    *(Attack(f"init_lora_weights={value!r}", set_config(init_lora_weights=value), "unsupported_setting")
      for value in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "bogus", 7)),
    *(Attack(f"exotic setting {name}", set_config(**{name: value}), "unsupported_setting") for name, value in {
        "alora_invocation_tokens": [1], "arrow_config": {"top_k": 1}, "use_dora": True, "use_qalora": True,
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1], "lora_bias": True, "target_parameters": ["x"], "unknown_setting": 1,
        "__class__": "os", "bias": "os.system",
    }.items()),
    Attack("another base model in the configuration", set_config(base_model_name_or_path="/etc", revision="main"), None),
    Attack("a hub id as the base model", set_config(base_model_name_or_path="org/other-model"), None),
    Attack("not LoRA", set_config(peft_type="PROMPT_TUNING"), "not_lora"),
    # numbers
    *(Attack(f"rank {rank!r}", set_config(r=rank), "config_value")
      for rank in (10**9, 4 * 10**6, 0, -4, 4.0, True, "4", None, 10**30, [4])),
    Attack("a rank that differs from the weights", set_config(r=5), "rank"),
    Attack("rank_pattern of 1e9", set_config(rank_pattern={"q_proj": 10**9}), "config_value"),
    Attack("a rank_pattern that differs from the weights", set_config(rank_pattern={"q_proj": 512}), "rank"),
    Attack("alpha NaN", write_config('{"peft_type":"LORA","r":4,"lora_alpha":NaN,"target_modules":["q_proj"]}'),
           "config_value"),
    Attack("alpha infinite", set_config(lora_alpha=math.inf), "config_value"),
    Attack("alpha 1e300", set_config(lora_alpha=1e300), "config_value"),
    Attack("alpha_pattern NaN", set_config(alpha_pattern={"q_proj": math.nan}), "config_value"),
    # regular expressions
    # Expressions are never run: the modules and ranks are those of the weights.
    Attack("target_modules that backtracks", set_config(target_modules=REDOS), None),
    Attack("target_modules with a regular expression", set_config(target_modules=[REDOS]), None),
    Attack("long targets", set_config(target_modules=["q" * 129]), None),
    Attack("exclude_modules that backtracks", set_config(exclude_modules=REDOS), None),
    Attack("layers_pattern that backtracks", set_config(layers_pattern=REDOS, layers_to_transform=[0]), None),
    Attack("rank_pattern that backtracks", set_config(rank_pattern={REDOS: 4}), None),
    Attack("alpha_pattern that backtracks", set_config(alpha_pattern={REDOS: 4}), "targets_not_literal"),
    Attack("20001 targets", set_config(target_modules=["q_proj"] * 20_001), "targets_not_literal"),
    # tensors that do not belong to a LoRA adapter
    Attack("a tensor that overwrites one of the base model", overwrite_base(".weight"), "overwrites_base"),
    Attack("a tensor that overwrites a base_layer", overwrite_base(".base_layer.weight"), "overwrites_base"),
    Attack("a bias of a base_layer", overwrite_base(".base_layer.bias"), "overwrites_base"),
    Attack("an output head", add_tensor("base_model.model.lm_head.weight", (4, 4)), "vocabulary_resized"),
    Attack("an unknown tensor", add_tensor("base_model.model.evil"), "foreign_tensor"),
    Attack("DoRA magnitudes", add_tensor("base_model.model.x.lora_magnitude_vector"), "dora_weights"),
    Attack("integer weights", change_dtype("I8"), "dtype"),
    # headers
    Attack("header of 2**63 bytes", lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "bad_file"),
    Attack("header of 2**64-1 bytes", lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "bad_file"),
    Attack("header longer than the limit", write_header(b"{" + b" " * (9 << 20) + b"}", b""), "bad_file"),
    Attack("too many tensors", write_many_tensors, "bad_file"),
    Attack("a header of millions of empty lists", write_list_bomb, "bad_file"),
    Attack("overlapping tensors", write_header({"a": entry(), "b": entry()}), "bad_file"),
    Attack("gap before the first tensor", write_header({"a": entry(8, 16)}, bytes(16)), "bad_file"),
    Attack("trailing bytes", change_bytes(lambda raw: raw + b"\0"), "bad_file"),
    Attack("truncated", change_bytes(lambda raw: raw[:-1]), "bad_file"),
    Attack("truncated in the header", change_bytes(lambda raw: raw[:100]), "bad_file"),
    Attack("empty file", change_bytes(lambda _: b""), "bad_file"),
    Attack("unknown data type", write_header({"a": entry(dtype="F31")}), "bad_file"),
    Attack("overflowing shape", write_header({"a": entry(shape=(2**62, 2**62))}), "bad_file"),
    Attack("duplicate names", write_header(f"{ENTRY_A},{ENTRY_A[1:]}}}".encode()), "bad_file"),
    Attack("deeply nested header", write_header(b'{"a":' * 40_000), "bad_file"),
    Attack("a zip file named like the weights", change_bytes(lambda raw: b"PK\3\4" + raw), "bad_file"),
    Attack("a sparse file of 8 GB", write_sparse_file, "weights_missing"),
    Attack(
        "git LFS pointer",
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"),
        "git_lfs_pointer",
    ),
    # the configuration file
    Attack("deeply nested configuration", write_config("[" * 200_000), "bad_file"),
    Attack("configuration of deeply nested objects", write_config('{"a":' * 40_000), "bad_file"),
    Attack("large configuration", write_config(" " * (257 << 10)), "bad_file"),
    Attack("empty configuration", write_config(""), "bad_file"),
    Attack("configuration is a list", write_config("[]"), "bad_file"),
    Attack("configuration is not UTF-8", write_config(b'{"r": "\xff"}'), "bad_file"),
    Attack("a number of 5000 digits", write_config('{"r": ' + "1" * 5000 + "}"), "bad_file"),
    Attack("a duplicate setting", write_config('{"r": 4, "r": 1000000000}'), "bad_file"),
    Attack("control characters in the name of a setting", set_config(**{"\x1b[2J\n\u202eevil": 1}), "unsupported_setting"),
    # special files and links in place of files
    Attack("weights are a FIFO", replace(WEIGHTS, os.mkfifo), "bad_file"),
    Attack("weights are a socket", replace(WEIGHTS, bind_socket), "bad_file"),
    Attack("weights are a directory", replace(WEIGHTS, Path.mkdir), "bad_file"),
    Attack("weights are a device", replace(WEIGHTS, link_to("/dev/zero")), "bad_file"),
    Attack("weights are a link to the outside", replace(WEIGHTS, link_to(f"../moved-{WEIGHTS}")), "bad_file"),
    Attack("weights are a dangling link", replace(WEIGHTS, link_to("nowhere")), "bad_file"),
    Attack("weights are a link to themselves", replace(WEIGHTS, link_to(WEIGHTS)), "bad_file"),
    Attack("configuration is a FIFO", replace(CONFIG, os.mkfifo), "bad_file"),
    Attack("configuration is a socket", replace(CONFIG, bind_socket), "bad_file"),
    Attack("configuration is a directory", replace(CONFIG, Path.mkdir), "bad_file"),
    Attack("configuration is a link to the outside", replace(CONFIG, link_to("/etc/passwd")), "bad_file"),
    Attack("no weights", lambda d: (d / WEIGHTS).unlink(), "missing_file"),
    Attack("no configuration", lambda d: (d / CONFIG).unlink(), "missing_file"),
    # other files in the directory
    Attack("a chat template that never ends", add_file("chat_template.jinja", TEMPLATE), None),
    Attack("a tokenizer with a template", add_file("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})), None),
    Attack("Python modules in the directory", write_modules, None),
    Attack("a manifest that is a FIFO", lambda d: _replace_by_fifo(d / MANIFEST_NAME), None),
    Attack("a deeply nested manifest", add_file(MANIFEST_NAME, "[" * 200_000), None),
    Attack("a large manifest", add_file(MANIFEST_NAME, " " * (2 << 20)), None),
    Attack("a card that is a link to the outside", lambda d: _replace_by_link(d / CARD_NAME, "/etc/passwd"), None),
    # values that are detected only by reading the weights
    Attack("NaN in the weights", fill_start(struct.pack("<f", math.nan)), "not_finite", scanned=True),
    Attack("infinity in the weights", fill_start(struct.pack("<f", -math.inf)), "not_finite", scanned=True),
    Attack("every B is zero", change_tensors(zero_every_b), "b_all_zero", scanned=True),
]  # fmt: skip


def _replace_by_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _replace_by_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
