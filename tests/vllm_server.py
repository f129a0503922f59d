"""A contract server: the calls of vLLM's HTTP API that the product makes, computed by PEFT.

Written after vllm/entrypoints/serve/lora and vllm/entrypoints/openai of vLLM 0.32; the texts of errors are its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class VllmServer:
    """One base model, named "base", and the adapters that were loaded."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.address = ""
        self.adapters: dict[str, Path] = {}
        self.permits_loading = True  # VLLM_ALLOW_RUNTIME_LORA_UPDATING
        self.permits_unloading = True
        self.max_rank = 16
        self.key: str | None = None
        self.keys_seen: set[str | None] = set()

    def load(self, name: str, path: Path) -> tuple[int, Any]:
        if name in self.adapters:
            return _error(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            return _error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        rank = json.loads((path / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return _error(
                500, "InternalServerError", f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            )
        self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, name: str) -> tuple[int, Any]:
        if not self.permits_unloading:
            return _error(500, "InternalServerError", "The engine is busy.")
        if self.adapters.pop(name, None) is None:
            return _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def log_probs(self, model: str, ids: list[int]) -> list[dict[str, Any] | None]:
        import torch  # noqa: PLC0415 -- the tests of the client need none of these
        from peft import PeftModel  # noqa: PLC0415 -- the same
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 -- the same

        causal = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        if model in self.adapters:
            causal = PeftModel.from_pretrained(causal, str(self.adapters[model])).eval()
        with torch.inference_mode():
            rows = torch.log_softmax(causal(input_ids=torch.tensor([ids])).logits[0], dim=-1)
        return [None, *({str(token): {"logprob": float(rows[n, token])}} for n, token in enumerate(ids[1:]))]

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        match method, path:
            case "GET", "/version":
                return 200, {"version": "0.32.0"}
            case "GET", "/v1/models":
                names = [("base", None), *((name, "base") for name in self.adapters)]
                return 200, {"object": "list", "data": [{"id": name, "parent": parent} for name, parent in names]}
            case "POST", "/v1/load_lora_adapter" if self.permits_loading:
                return self.load(body["lora_name"], Path(body["lora_path"]))
            case "POST", "/v1/unload_lora_adapter" if self.permits_loading:
                return self.unload(body["lora_name"])
            case "POST", "/v1/completions" if body["model"] in ("base", *self.adapters):
                return 200, {
                    "choices": [{"text": "", "prompt_logprobs": self.log_probs(body["model"], body["prompt"])}]
                }
            case _:
                return 404, {"detail": "Not Found"}


def _error(code: int, kind: str, message: str) -> tuple[int, Any]:
    return code, {"error": {"message": message, "type": kind, "param": None, "code": code}}


@contextmanager
def vllm_server(base: Path) -> Iterator[VllmServer]:
    """Serve a base model (a Hugging Face directory) on a free port of 127.0.0.1."""
    server = VllmServer(base)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET", {})

        def do_POST(self) -> None:
            self._answer("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, method: str, body: dict[str, Any]) -> None:
            key = self.headers["Authorization"]
            server.keys_seen.add(key)
            if server.key is not None and key != f"Bearer {server.key}" and self.path.startswith("/v1"):
                status, content = 401, {"error": "Unauthorized"}
            else:
                status, content = server.answer(method, self.path, body)
            raw = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.address = f"http://127.0.0.1:{http.server_port}"
        thread = Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
