"""Adapters that somebody made to do harm, each built from a sound one of the base at hand.

One row for each attack: what it is called, how it is made, and with which code it is refused. None: it is harmless here,
because what it attacks with is never read.
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

Spoil = Callable[[Path], object]
REDOS = r"(([a-z_.0-9])+)+X"
ONE = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@dataclass(frozen=True)
class Attack:
    name: str
    spoil: Spoil
    code: str | None
    scanned: bool = False  # found only by who reads the weights; the headers are sound


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self._marker}'",)


def marker_of(directory: Path) -> Path:
    """The file that exists as soon as code of this adapter has run."""
    return directory.parent / "it_ran"


def config(**changes: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        settings = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps(settings | changes))

    return spoil


def text(content: str | bytes) -> Spoil:
    raw = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / CONFIG).write_bytes(raw)


def header(entries: object, data: bytes = bytes(8)) -> Spoil:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return lambda directory: (directory / WEIGHTS).write_bytes(with_length(raw, data))


def entry(begin: int = 0, end: int = 8, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def raw_weights(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda directory: (directory / WEIGHTS).write_bytes(change((directory / WEIGHTS).read_bytes()))


def tensors(change: Callable[[dict[str, Any], bytearray], object]) -> Spoil:
    """Change the header's entries and the data of the sound file; afterwards its offsets fit again."""

    def spoil(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        entries.pop("__metadata__", None)
        change(entries, data)
        (directory / WEIGHTS).write_bytes(with_length(json.dumps(entries).encode(), bytes(data)))

    return spoil


def added(name: str, shape: tuple[int, ...] = (4,)) -> Spoil:
    """One more tensor, at the end."""

    def change(entries: dict[str, Any], data: bytearray) -> None:
        size = 4 * math.prod(shape)
        entries[name] = entry(len(data), len(data) + size, shape=shape)
        data += struct.pack("<f", 1.0) * (size // 4)

    return tensors(change)


def overwriting(stem: str) -> Spoil:
    """A tensor named like the base's weights that the first A of the adapter is for."""

    def change(entries: dict[str, Any], data: bytearray) -> None:
        name = next(name for name in entries if ".lora_A." in name)
        module = name.removesuffix(".lora_A.weight")
        entries[f"{module}{stem}"] = entry(len(data), len(data) + 16, shape=(4,))
        data += bytes(16)

    return tensors(change)


def filled(number: bytes) -> Spoil:
    """The first four numbers of the weights."""

    def change(_: dict[str, Any], data: bytearray) -> None:
        data[:16] = number * 4

    return tensors(change)


def b_all_zero(entries: dict[str, Any], data: bytearray) -> None:
    for name, place in entries.items():
        if ".lora_B." in name:
            begin, end = place["data_offsets"]
            data[begin:end] = bytes(end - begin)


def retyped(dtype: str) -> Spoil:
    def change(entries: dict[str, Any], _: bytearray) -> None:
        for place in entries.values():
            place["dtype"], place["shape"] = dtype, [place["shape"][0] * 4, place["shape"][1]]

    return tensors(change)


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else under the name of a file."""

    def spoil(directory: Path) -> None:
        (directory / name).rename(directory.parent / f"moved-{name}")
        make(directory / name)

    return spoil


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def bind(path: Path) -> None:
    """A Unix socket; the path may be longer than sockets allow, hence from its directory."""
    listening, here = socket.socket(socket.AF_UNIX), Path.cwd()
    os.chdir(path.parent)
    try:
        listening.bind(path.name)
    finally:
        os.chdir(here)
        listening.close()


def pickled(name: str, *, beside: bool = False) -> Spoil:
    def spoil(directory: Path) -> None:
        if not beside:
            (directory / WEIGHTS).unlink()
        (directory / name).write_bytes(pickle.dumps({"x": Evil(marker_of(directory))}))

    return spoil


def module(directory: Path) -> None:
    """Code that is run when it is imported, and a configuration that names it."""
    body = f"open({str(marker_of(directory))!r}, 'w')\nModel = PeftModel = LoraConfig = object\n"
    (directory / "evil.py").write_text(body)
    (directory / "__init__.py").write_text(body)


def importing(**changes: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        module(directory)
        config(**changes)(directory)

    return spoil


def beside(name: str, content: str) -> Spoil:
    return lambda directory: (directory / name).write_text(content)


def sparse(directory: Path) -> None:
    """8 GB that take no room on the disk."""
    size = 8 << 30
    raw = json.dumps({"base_model.model.x.lora_A.weight": entry(0, size, shape=(4, size // 16))}).encode()
    with (directory / WEIGHTS).open("wb") as file:
        file.write(with_length(raw))
        file.truncate(8 + len(raw) + size)


def many_tensors(directory: Path, count: int = 20_001) -> None:
    header({f"t{number}": entry(0, 0, shape=(0,)) for number in range(count)}, b"")(directory)


def bomb_of_lists(directory: Path) -> None:
    """Eight megabytes of JSON that are two hundred in memory."""
    header(b'{"a":[' + b",".join([b"[]"] * 2_700_000) + b"]}", b"")(directory)


def nothing(_: Path) -> None:
    pass


TEMPLATE = "{% for i in range(10**9) %}{{ cycler.__init__.__globals__.os.system('touch it_ran') }}{% endfor %}"

ATTACKS = [
    # pickles
    Attack("a pickle that runs a command", pickled("adapter_model.bin"), "pickle"),
    Attack("a pickle named .pt", pickled("adapter_model.pt"), "pickle"),
    Attack("a pickle beside sound weights", pickled("adapter_model.bin", beside=True), None),
    Attack("a pickle under the weights' name", pickled(WEIGHTS, beside=True), "bad_file"),
    # settings that run code, change the base or allocate
    Attack("auto_mapping to os.system", importing(auto_mapping={"base_model_class": "system", "parent_library": "os"}),
           "unsupported_setting"),
    Attack("auto_mapping to its own module", importing(auto_mapping={"base_model_class": "Model",
           "parent_library": "evil"}), "unsupported_setting"),
    Attack("auto_map to its own module", importing(auto_map={"AutoModel": "evil.Model"}), "unsupported_setting"),
    Attack("megatron_core names a module", importing(megatron_config={"a": 1}, megatron_core="evil"),
           "unsupported_setting"),
    Attack("megatron_core alone", importing(megatron_core="evil"), "unsupported_setting"),
    Attack("layer_replication", config(layer_replication=[[0, 2]] * 100_000), "bad_file"),  # 900 KB
    Attack("a short layer_replication", config(layer_replication=[[0, 2]] * 9), "unsupported_setting"),
    *(Attack(f"init_lora_weights={value!r}", config(init_lora_weights=value), "unsupported_setting")
      for value in ("pissa", "pissa_niter_16", "olora", "eva", "corda", "loftq", "orthogonal", "lora_ga", "bogus", 7)),
    *(Attack(f"exotic setting {name}", config(**{name: value}), "unsupported_setting") for name, value in {
        "alora_invocation_tokens": [1], "arrow_config": {"top_k": 1}, "corda_config": {"cache_file": "/etc/passwd"},
        "eva_config": {"rho": 2}, "use_dora": True, "use_qalora": True, "modules_to_save": ["lm_head"],
        "trainable_token_indices": [1], "exclude_modules": REDOS, "layers_pattern": REDOS, "bias": "all",
        "lora_bias": True, "target_parameters": ["x"], "runtime_config": {"ephemeral_gpu_offload": True},
        "fan_in_fan_out": True, "never_heard_of": 1, "__class__": "os",
    }.items()),
    Attack("another base in the configuration", config(base_model_name_or_path="/etc", revision="main"), None),
    Attack("a hub id as its base", config(base_model_name_or_path="someone/elses-model"), None),
    Attack("not LoRA", config(peft_type="PROMPT_TUNING"), "not_lora"),
    # numbers
    *(Attack(f"rank {rank!r}", config(r=rank), "config_value")
      for rank in (10**9, 4 * 10**6, 0, -4, 4.0, True, "4", None, 10**30, [4])),
    Attack("another rank than the weights'", config(r=5), "rank"),
    Attack("rank_pattern of 1e9", config(rank_pattern={"q_proj": 10**9}), "config_value"),
    Attack("rank_pattern other than the weights", config(rank_pattern={"q_proj": 512}), "rank"),
    Attack("alpha NaN", text('{"peft_type":"LORA","r":4,"lora_alpha":NaN,"target_modules":["q_proj"]}'),
           "config_value"),
    Attack("alpha infinite", config(lora_alpha=math.inf), "config_value"),
    Attack("alpha 1e300", config(lora_alpha=1e300), "config_value"),
    Attack("alpha_pattern NaN", config(alpha_pattern={"q_proj": math.nan}), "config_value"),
    # regular expressions
    Attack("target_modules that backtracks", config(target_modules=REDOS), "targets_not_literal"),
    Attack("target_modules with an expression", config(target_modules=[REDOS]), "targets_not_literal"),
    Attack("rank_pattern that backtracks", config(rank_pattern={REDOS: 4}), "targets_not_literal"),
    Attack("alpha_pattern that backtracks", config(alpha_pattern={REDOS: 4}), "targets_not_literal"),
    Attack("20001 targets", config(target_modules=["q_proj"] * 20_001), "targets_not_literal"),
    Attack("long targets", config(target_modules=["q" * 129]), "targets_not_literal"),
    # tensors that are no adapter
    Attack("a tensor that overwrites the base's", overwriting(".weight"), "overwrites_base"),
    Attack("a tensor that overwrites a base_layer", overwriting(".base_layer.weight"), "overwrites_base"),
    Attack("a bias of a base_layer", overwriting(".base_layer.bias"), "overwrites_base"),
    Attack("the head", added("base_model.model.lm_head.weight", (4, 4)), "vocabulary_resized"),
    Attack("an unknown tensor", added("base_model.model.evil"), "foreign_tensor"),
    Attack("the magnitudes of DoRA", added("base_model.model.x.lora_magnitude_vector"), "dora_weights"),
    Attack("integers for weights", retyped("I8"), "dtype"),
    # headers
    Attack("header of 2**63 bytes", lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "bad_file"),
    Attack("header of 2**64-1 bytes", lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "bad_file"),
    Attack("header longer than read", header(b"{" + b" " * (9 << 20) + b"}", b""), "bad_file"),
    Attack("too many tensors", many_tensors, "bad_file"),
    Attack("a bomb of empty lists", bomb_of_lists, "bad_file"),
    Attack("overlap", header({"a": entry(), "b": entry()}), "bad_file"),
    Attack("hole", header({"a": entry(8, 16)}, bytes(16)), "bad_file"),
    Attack("trailing bytes", raw_weights(lambda raw: raw + b"\0"), "bad_file"),
    Attack("truncated", raw_weights(lambda raw: raw[:-1]), "bad_file"),
    Attack("truncated in the header", raw_weights(lambda raw: raw[:100]), "bad_file"),
    Attack("empty file", raw_weights(lambda _: b""), "bad_file"),
    Attack("bogus type", header({"a": entry(dtype="F31")}), "bad_file"),
    Attack("overflowing shape", header({"a": entry(shape=(2**62, 2**62))}), "bad_file"),
    Attack("duplicate names", header(f"{ONE},{ONE[1:]}}}".encode()), "bad_file"),
    Attack("deep header", header(b'{"a":' * 40_000), "bad_file"),
    Attack("a zip under the weights' name", raw_weights(lambda raw: b"PK\3\4" + raw), "bad_file"),
    Attack("8 GB without content", sparse, "weights_missing"),
    Attack(
        "git LFS pointer",
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"),
        "git_lfs_pointer",
    ),
    # the configuration's file
    Attack("deep configuration", text("[" * 200_000), "bad_file"),
    Attack("configuration deep in objects", text('{"a":' * 40_000), "bad_file"),
    Attack("large configuration", text(" " * (257 << 10)), "bad_file"),
    Attack("empty configuration", text(""), "bad_file"),
    Attack("configuration is a list", text("[]"), "bad_file"),
    Attack("configuration is not UTF-8", text(b'{"r": "\xff"}'), "bad_file"),
    Attack("a number of 5000 digits", text('{"r": ' + "1" * 5000 + "}"), "bad_file"),
    Attack("a setting twice", text('{"r": 4, "r": 1000000000}'), "bad_file"),
    Attack("settings named to be printed", config(**{"\x1b[2J\n\u202eevil": 1}), "unsupported_setting"),
    # what is no file
    Attack("weights are a FIFO", instead(WEIGHTS, os.mkfifo), "bad_file"),
    Attack("weights are a socket", instead(WEIGHTS, bind), "bad_file"),
    Attack("weights are a directory", instead(WEIGHTS, Path.mkdir), "bad_file"),
    Attack("weights are a device", instead(WEIGHTS, link("/dev/zero")), "bad_file"),
    Attack("weights are a link out", instead(WEIGHTS, link(f"../moved-{WEIGHTS}")), "bad_file"),
    Attack("weights are a dangling link", instead(WEIGHTS, link("nowhere")), "bad_file"),
    Attack("weights are a link to themselves", instead(WEIGHTS, link(WEIGHTS)), "bad_file"),
    Attack("configuration is a FIFO", instead(CONFIG, os.mkfifo), "bad_file"),
    Attack("configuration is a socket", instead(CONFIG, bind), "bad_file"),
    Attack("configuration is a directory", instead(CONFIG, Path.mkdir), "bad_file"),
    Attack("configuration is a link out", instead(CONFIG, link("/etc/passwd")), "bad_file"),
    Attack("no weights", lambda d: (d / WEIGHTS).unlink(), "missing_file"),
    Attack("no configuration", lambda d: (d / CONFIG).unlink(), "missing_file"),
    # what lies beside them
    Attack("a chat template that never ends", beside("chat_template.jinja", TEMPLATE), None),
    Attack("a tokenizer with a template", beside("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})), None),
    Attack("modules beside it", module, None),
    Attack("a manifest that is a FIFO", lambda d: _fifo(d / MANIFEST_NAME), None),
    Attack("a manifest that is deep", beside(MANIFEST_NAME, "[" * 200_000), None),
    Attack("a large manifest", beside(MANIFEST_NAME, " " * (2 << 20)), None),
    Attack("a card that is a link out", lambda d: _linked(d / CARD_NAME, "/etc/passwd"), None),
    # numbers that only reading the weights shows
    Attack("NaN in the weights", filled(struct.pack("<f", math.nan)), "not_finite", scanned=True),
    Attack("infinity in the weights", filled(struct.pack("<f", -math.inf)), "not_finite", scanned=True),
    Attack("B all zero", tensors(b_all_zero), "b_all_zero", scanned=True),
]  # fmt: skip


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _linked(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
