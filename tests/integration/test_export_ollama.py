"""Exports to Ollama: the model that is created, with the real client and a server that keeps Ollama's contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ollama")

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.export.worker.ollama_model import Recipe, _parameters, _template, modelfile
from peft_core.llamacpp.worker.hf_gguf import write_hf_gguf
from peft_core.manager import PEFTManager
from peft_core.ollama import OllamaClient
from peft_core.schemas.dataset import FillInTheMiddle
from peft_core.schemas.export import ExportReport
from tests.integration.test_export import write_adapter
from tests.ollama_server import OllamaServer, ollama_server
from tests.tiny_models import write_byte_level_tokenizer, write_tiny_base

FIM = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


class Bench:
    """A base model, an adapter of it, and a server."""

    def __init__(self, root: Path, server: OllamaServer, data_dir: Path) -> None:
        self.server, self.data_dir = server, data_dir
        directory = write_tiny_base(root / "base", "llama")
        write_byte_level_tokenizer(directory, FIM)
        self.gguf = root / "base.gguf"
        write_hf_gguf(resolve(str(directory), Settings()), None, self.gguf, "f32")
        server.pull("tiny-coder:1b", self.gguf.read_bytes(), template="{{ .Prompt }}", params='{"stop": ["<end>"]}')
        self.adapter = write_adapter(root / "adapter", self.gguf, "llama")

    async def export(self, **changes: Any) -> ExportReport:
        settings = Settings(data_dir=self.data_dir, ollama_base_url=changes.pop("address", self.server.address))
        async with PEFTManager(settings) as manager:
            return await manager.export_adapter(
                str(self.adapter), "ollama", {"base_model": "tiny-coder:1b", "model_name": "mine", **changes}
            )


@pytest.fixture
def bench(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    store = tmp_path / "store"
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with ollama_server(store) as server:
        yield Bench(tmp_path, server, data_dir)


async def test_a_model_is_created_from_the_base_in_ollama_and_the_adapter(bench: Bench) -> None:
    report = await bench.export()
    assert report.ollama_model == "mine:latest"
    assert ", created in Ollama 0.33.0 as mine:latest" in report.summary
    assert report.verification.status == "verified"
    kinds = [layer["mediaType"].rpartition(".")[2] for layer in bench.server.layers("mine") or []]
    assert sorted(kinds) == ["adapter", "model", "params", "template"]
    assert bench.server.blob_of("mine", "model") == bench.gguf.read_bytes()
    assert bench.server.blob_of("mine", "params") == b'{"stop": ["<end>"]}'
    template = (
        "{{ if .Suffix }}<fim_prefix>{{ .Prompt }}<fim_suffix>{{ .Suffix }}<fim_middle>{{ else }}{{ .Prompt }}{{ end }}"
    )
    assert bench.server.blob_of("mine", "template") == template.encode()
    modelfile = (Path(report.directory) / "Modelfile").read_text()
    assert modelfile.startswith("FROM tiny-coder:1b\nADAPTER ./")
    assert OllamaClient(bench.server.address).generate("x", "mine").adapter_applied
    with pytest.raises(InvalidArgument, match="not replaced unless overwrite=true"):
        await bench.export(output_path=str(Path(report.directory).with_name("second")))


async def test_a_later_version_gets_merged_weights_with_the_bases_template(bench: Bench) -> None:
    bench.server.version = "0.35.0"
    report = await bench.export()
    assert report.ollama_model == "mine:latest"
    assert report.summary.startswith("Exported adapter as a merged model (F16 GGUF), created in Ollama 0.35.0")
    assert bench.server.blob_of("mine", "adapter") is None
    assert bench.server.blob_of("mine", "params") == b'{"stop": ["<end>"]}'
    assert b".Suffix" in (bench.server.blob_of("mine", "template") or b"")
    assert OllamaClient(bench.server.address).generate("x", "mine").adapter_applied


async def test_a_chat_template_that_ollama_does_not_know_is_said(bench: Bench, tmp_path: Path) -> None:
    bench.server.version = "0.35.0"
    base = write_tiny_base(tmp_path / "chat", "llama")
    write_byte_level_tokenizer(base)
    bench.adapter = write_adapter(tmp_path / "of chat", base, "llama")
    report = await bench.export(base_model=str(base))
    assert report.ollama_model == "mine:latest"
    assert any("no counterpart of the base model's chat template" in warning for warning in report.warnings)


async def test_without_a_server_files_and_the_command_are_written(bench: Bench) -> None:
    report = await bench.export(address="http://127.0.0.1:9")
    assert report.ollama_model is None
    assert report.summary.startswith(
        "NOT created in Ollama: Ollama does not run at http://127.0.0.1:9. Wrote adapter as"
    )
    assert report.usage[0] == f"ollama create mine:latest -f {report.directory}/Modelfile"
    modelfile = (Path(report.directory) / "Modelfile").read_text()
    gguf = next(Path(report.directory).glob("*.gguf"))
    assert modelfile.startswith(f"FROM ./{gguf.name}\nTEMPLATE ")
    assert 'PARAMETER stop """<end>"""' in modelfile


async def test_an_error_of_the_server_is_told_and_the_files_remain(bench: Bench) -> None:
    bench.server.error_in_stream = "no space left on device"
    report = await bench.export()
    assert report.ollama_model is None
    assert report.summary.startswith("NOT created in Ollama: Ollama answers: no space left on device. Wrote")
    assert report.usage[0].startswith("ollama create mine:latest")
    assert bench.server.layers("mine") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "tiny-coder:1b"}, "the name of the base model itself"),
        ({"model_name": "no name"}, "must be [NAMESPACE/]NAME[:TAG]"),
        ({"model_name": "hf.co/a/b"}, "must be [NAMESPACE/]NAME[:TAG]"),
        ({"format": "lora", "version": "0.35.0"}, "Ollama 0.35.0 takes whole models only"),
        ({"format": "q3_k_m"}, "llama-quantize"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_the_work(
    bench: Bench, changes: dict[str, Any], message: str
) -> None:
    bench.server.version = changes.pop("version", bench.server.version)
    with pytest.raises(InvalidArgument) as caught:
        await bench.export(**changes)
    assert message in str(caught.value)
    assert not (bench.data_dir / "projects").exists()


@pytest.mark.parametrize(
    ("own", "chat", "template"),
    [
        ("{{ .Prompt }}{{ .Suffix }}", "", "{{ .Prompt }}{{ .Suffix }}"),
        (
            "[{{ .Prompt }}]",
            "",
            "{{ if .Suffix }}<a>{{ .Prompt }}<b>{{ .Suffix }}<c>{{ else }}[{{ .Prompt }}]{{ end }}",
        ),
        (None, "", "{{ if .Suffix }}<a>{{ .Prompt }}<b>{{ .Suffix }}<c>{{ else }}{{ .Prompt }}{{ end }}"),
        (None, "[INST]", None),
    ],
)
def test_a_template_fills_in_if_the_base_does(own: str | None, chat: str, template: str | None) -> None:
    made, warning = _template(own, chat, FillInTheMiddle("<a>", "<b>", "<c>"))
    assert made == template
    assert bool(warning) is (template is None)
    assert _template(own, chat, None) == (own, "")


def test_a_base_without_middle_token_has_the_suffix_first() -> None:
    made, _ = _template("x", "", FillInTheMiddle("<a>", "<b>", ""))
    assert made == "{{ if .Suffix }}<b>{{ .Suffix }}<a>{{ .Prompt }}{{ else }}x{{ end }}"


@pytest.mark.parametrize("text", ['a"""\nFROM /etc/passwd', 'ends with "', '"starts'])
def test_a_text_cannot_end_its_instruction_in_a_modelfile(text: str) -> None:
    recipe = Recipe(template=text, system="plain", parameters={"stop": [text, "<end>"], "num_ctx": 4096})
    assert modelfile("a.gguf", None, recipe).splitlines() == [
        "FROM ./a.gguf",
        "# TEMPLATE is left out: it has quotes that a Modelfile cannot hold",
        'SYSTEM """plain"""',
        "# PARAMETER stop is left out: it has quotes that a Modelfile cannot hold",
        'PARAMETER stop """<end>"""',
        "PARAMETER num_ctx 4096",
    ]


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '{"stop": [1]}', '{"a b": 1}', '{"x": {"y": 1}}'])
def test_parameters_of_an_unknown_form_are_left_out(text: str) -> None:
    assert _parameters(text) == {}
