"""A contract server: what Ollama's HTTP API does in the calls that the product makes, with Ollama's own store.

Written after server/create.go and server/routes.go of Ollama 0.33. A version after 0.34.0 takes no adapters. Nothing here
computes: a model answers with the name of what it consists of.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from peft_core.base_models.gguf import read_gguf_header
from peft_core.base_models.ollama_store import OllamaName, installed_names, parse_ollama_name

IMAGE = "application/vnd.ollama.image."
HOST = "registry.ollama.ai"
DIGEST = re.compile(r"sha256[:-][0-9a-fA-F]{64}")
FIELDS = {"template": "template", "system": "system", "params": "parameters", "license": "license"}


class Refusal(Exception):
    pass


class OllamaServer:
    """The store and the behaviour of one server."""

    def __init__(self, store: Path, version: str) -> None:
        self.store, self.version = store, version
        self.failures = 0  # so many next requests are answered with status 503
        self.error_in_stream = ""  # that a creation ends with, after its status 200
        self.hang = False  # until the server stops: no generation ends
        self.stopped = Event()
        self.requests: list[tuple[str, Any]] = []
        self.address = ""

    def path_of(self, digest: str) -> Path:
        return self.store / "blobs" / digest.replace(":", "-")

    def add_blob(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.path_of(digest).parent.mkdir(parents=True, exist_ok=True)
        self.path_of(digest).write_bytes(content)
        return digest

    def layer(self, kind: str, content: bytes) -> dict[str, Any]:
        digest = self.add_blob(content)
        return {"mediaType": IMAGE + kind, "digest": digest, "size": len(content)}

    def write(self, name: OllamaName, layers: list[dict[str, Any]]) -> None:
        path = self._manifest(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))

    def pull(self, name: str, gguf: bytes, **texts: str) -> None:
        """Put a base model into the store, as `ollama pull` does."""
        parsed = parse_ollama_name(name)
        assert parsed is not None
        self.write(
            parsed, [self.layer("model", gguf), *(self.layer(kind, text.encode()) for kind, text in texts.items())]
        )

    def layers(self, name: str) -> list[dict[str, Any]] | None:
        parsed = parse_ollama_name(name)
        path = self._manifest(parsed) if parsed is not None else None
        if path is None or not path.is_file():
            return None
        layers: list[dict[str, Any]] = json.loads(path.read_text())["layers"]
        return layers

    def blob_of(self, name: str, kind: str) -> bytes | None:
        found = [layer for layer in self.layers(name) or [] if layer["mediaType"] == IMAGE + kind]
        return self.path_of(found[0]["digest"]).read_bytes() if found else None

    def tags(self) -> list[dict[str, Any]]:
        return [
            {
                "name": str(name),
                "model": str(name),
                "size": 0,
                "digest": hashlib.sha256(self._manifest(name).read_bytes()).hexdigest(),
            }
            for name in installed_names()
        ]

    def _manifest(self, name: OllamaName) -> Path:
        return self.store / "manifests" / (name.host or HOST) / name.namespace / name.model / name.tag

    # -- POST /api/create ----------------------------------------------------------------------------------------------

    def create(self, request: dict[str, Any]) -> Iterator[str]:
        newer = tuple(map(int, self.version.split("."))) > (0, 34, 0)
        if newer and (request.get("adapters") or request.get("quantize")):
            raise Refusal("adapters and quantization are not supported")
        parsed = parse_ollama_name(request["model"])
        assert parsed is not None
        layers = []
        if request.get("from"):
            source = self.layers(request["from"])
            if source is None:
                yield "pulling manifest"
                raise Refusal("pull model manifest: file does not exist")
            layers += source
        elif request.get("files"):
            yield "parsing GGUF"
            layers += list(self._gguf_layers(request["files"]))
        else:
            raise Refusal("neither 'from' or 'files' was specified")
        if request.get("adapters"):
            yield "parsing GGUF"
            if len(request["adapters"]) > 1:
                raise Refusal("only one adapter is currently supported")
            layers += list(self._gguf_layers(request["adapters"]))
        for kind, field in FIELDS.items():
            if request.get(field):
                value = request[field]
                content = (value if isinstance(value, str) else json.dumps(value)).encode()
                kept = [layer for layer in layers if kind == "license" or layer["mediaType"] != IMAGE + kind]
                layers = [*kept, self.layer(kind, content)]
        for layer in layers:
            yield f"using existing layer {layer['digest']}"
        if self.error_in_stream:
            raise Refusal(self.error_in_stream)
        yield "writing manifest"
        self.write(parsed, layers)
        yield "success"

    def _gguf_layers(self, files: dict[str, str]) -> Iterator[dict[str, Any]]:
        for digest in files.values():
            if not DIGEST.fullmatch(digest):
                raise Refusal("invalid digest format")
            path = self.path_of(digest)
            if not path.exists():
                raise Refusal(f"open {path}: no such file or directory")
            with path.open("rb") as file:
                if file.read(4) != b"GGUF":
                    raise Refusal("supplied file was not in GGUF format")
            kind = "adapter" if read_gguf_header(path).text("general.type") == "adapter" else "model"
            yield {"mediaType": IMAGE + kind, "digest": digest, "size": path.stat().st_size}

    def show(self, name: str) -> dict[str, Any] | None:
        layers = self.layers(name)
        if layers is None:
            return None
        paths = {layer["mediaType"].removeprefix(IMAGE): self.path_of(layer["digest"]) for layer in layers}
        metadata = read_gguf_header(paths["model"]).metadata
        lines = [f"FROM {paths['model']}", *([f"ADAPTER {paths['adapter']}"] if "adapter" in paths else [])]
        return {
            "modelfile": "\n".join(lines),
            "template": paths["template"].read_text() if "template" in paths else "",
            "details": {"format": "gguf", "parent_model": ""},
            "model_info": {key: value for key, value in metadata.items() if isinstance(value, str | int | float)},
            "capabilities": ["completion"],
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ollama: OllamaServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._fails():
            return
        if self.path == "/api/version":
            self._say(200, {"version": self.ollama.version})
        elif self.path == "/api/tags":
            self._say(200, {"models": self.ollama.tags()})
        else:
            self._say(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self._body()
        if self._fails():
            return
        if self.path.startswith("/api/blobs/"):
            self._blob(body, self.path.rpartition("/")[2])
            return
        request = json.loads(body)
        self.ollama.requests.append((self.path, request))
        if self.path == "/api/create":
            self._create(request)
            return
        shown = self.ollama.show(request["model"])
        if shown is None:
            self._say(404, {"error": f"model '{request['model']}' not found"})
        elif self.path == "/api/show":
            self._say(200, shown)
        else:
            if self.ollama.hang:
                self.ollama.stopped.wait()
            kind = "adapter" if "ADAPTER" in shown["modelfile"] else "base"
            answer = {"response": f"from {kind}", "done": True, "done_reason": "stop", "eval_count": 2}
            self._say(200, {"model": request["model"], "created_at": "2026-01-01T00:00:00Z", **answer})

    def _create(self, request: dict[str, Any]) -> None:
        if any(not digest for digest in {**(request.get("files") or {}), **(request.get("adapters") or {})}.values()):
            self._say(400, {"error": "invalid digest format"})
            return
        if parse_ollama_name(request["model"]) is None:
            self._say(400, {"error": "invalid model name"})
            return
        lines: list[dict[str, str]] = []
        try:
            lines.extend({"status": status} for status in self.ollama.create(request))
        except Refusal as error:
            # `extend` keeps what was produced before: then the status is 200 already, and the error a line
            if not lines:
                self._say(400, {"error": str(error)})
                return
            lines.append({"error": str(error)})
        self._send(200, "".join(json.dumps(line) + "\n" for line in lines).encode(), "application/x-ndjson")

    def _blob(self, body: bytes, digest: str) -> None:
        if not DIGEST.fullmatch(digest):
            self._say(400, {"error": "invalid digest format"})
        elif self.ollama.path_of(digest).exists():
            self._say(200, {})
        elif (stored := self.ollama.add_blob(body)) != digest:
            self._say(400, {"error": f'digest mismatch, expected "{digest}", got "{stored}"'})
        else:
            self._say(201, {})

    def _fails(self) -> bool:
        if self.ollama.failures <= 0:
            return False
        self.ollama.failures -= 1
        self._say(503, {"error": "server busy, please try again"})
        return True

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, body: object) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):  # the client did not wait for the answer
            self.wfile.write(content)


@contextmanager
def ollama_server(store: Path, version: str = "0.33.0") -> Iterator[OllamaServer]:
    """Run a server on a free port of 127.0.0.1. `OLLAMA_MODELS` must be `store`."""
    assert os.environ["OLLAMA_MODELS"] == str(store)
    ollama = OllamaServer(store, version)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"ollama": ollama}))
    ollama.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield ollama
    finally:
        ollama.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()
