"""A stand-in for `vllm serve` over HTTP, with faults: the endpoints and answers are vLLM 0.32's.

Its "model" is a hash: log-probs and tokens follow from the weights (those of the base, or the bytes
of an adapter's file), the tokens before and the seed.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BASE = "the-base"
VOCAB = 50


def weights_of(folder: Path | None) -> str:
    """Of an adapter's directory; None: of the base."""
    if folder is None:
        return ""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def logprob(weights: str, before: Sequence[int], token: int) -> float:
    """Of a token after others, in nats."""
    return -(1 + _number(weights, list(before), token) % 1000) / 250


def completion(
    weights: str, prompt: Sequence[int], seed: int, max_tokens: int
) -> tuple[list[int], list[float]]:
    """The tokens that a seed gives, and their log-probs; token 2 ends one."""
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < max_tokens and tokens[-1:] != [2]:
        token = _number(weights, [*prompt, *tokens], seed) % VOCAB
        logprobs.append(logprob(weights, [*prompt, *tokens], token))
        tokens.append(token)
    return tokens, logprobs


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class FakeServer:
    """What it has loaded, what it was asked, and what is wrong with it.

    Faults that it lacks something: version, key, no_runtime_lora, no_lora, no_scale_out, raw,
    no_stats, max_model_len, max_lora_rank. Faults of generating (`fault`): see `_faulty`.
    """

    def __init__(self, **lacks: Any) -> None:
        self.lacks = lacks
        self.fault = ""
        self.release = threading.Event()  # ends the fault "hang"
        self.arrived = threading.Semaphore(0)  # released for each request to generate
        self.adapters: dict[str, Path] = {}
        self.requests: list[dict[str, Any]] = []  # bodies of generate
        self.calls: Counter[str] = Counter()
        self.headers: list[str | None] = []  # Authorization
        self.unloaded: list[str] = []
        self.names: list[str] = []  # all that were ever loaded
        self.num_tokens = 0

    def answer(self, method: str, path: str, body: dict[str, Any], key: str | None) -> Any:
        """(status, object or bytes)."""
        self.calls[path] += 1
        self.headers.append(key)
        wanted = self.lacks.get("key")
        if wanted and path.startswith(("/v1", "/inference")) and key != f"Bearer {wanted}":
            return 401, {"error": "Unauthorized"}
        if path == "/health":
            return 503 if self.fault == "unhealthy" else 200, b""
        if path == "/version":
            return 200, {"version": self.lacks.get("version", "0.32.0")}
        if path == "/metrics":
            if self.lacks.get("no_stats"):
                return 200, b"# HELP python_info\n"
            line = f'vllm:generation_tokens_total{{engine="0"}} {float(self.num_tokens)}\n'
            return 200, line.encode()
        if path == "/v1/models":
            card = {"id": BASE, "parent": None}
            card["max_model_len"] = self.lacks.get("max_model_len", 64)
            loaded = [{"id": name, "parent": BASE} for name in self.adapters]
            return 200, {"data": [card, *loaded]}
        if path.endswith("lora_adapter") and not self.lacks.get("no_runtime_lora"):
            return self._adapter(path, body)
        if path == "/inference/v1/generate":
            if self.lacks.get("no_scale_out"):
                return _error(403, "Scale-out endpoints are disabled.")
            return self._generate(body)
        return 404, {"detail": "Not Found"}

    def _adapter(self, path: str, body: dict[str, Any]) -> Any:
        name = body["lora_name"]
        if path.endswith("unload_lora_adapter"):
            if self.adapters.pop(name, None) is None:
                return _error(404, f"The lora adapter '{name}' cannot be found.")
            self.unloaded.append(name)
            return 200, b"Success"
        folder = Path(body["lora_path"])
        if self.lacks.get("no_lora"):
            return _error(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        if not folder.is_dir():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > (most := self.lacks.get("max_lora_rank", 8)):
            return _error(500, f"LoRA rank {rank} is greater than max_lora_rank {most}.")
        if name in self.names:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        self.adapters[name] = folder
        self.names.append(name)
        return 200, b"Success"

    def _generate(self, body: dict[str, Any]) -> Any:
        self.requests.append(body)
        name, settings, prompt = body["model"], body["sampling_params"], body["token_ids"]
        if name != BASE and name not in self.adapters:
            return _error(404, f"The model `{name}` does not exist. Valid aliases: {BASE}.")
        weights = weights_of(self.adapters.get(name))
        is_scored = settings.get("prompt_logprobs") is not None
        if is_scored and self.lacks.get("no_logprobs"):
            return _error(400, "prompt_logprobs are not available")
        if self.fault == "stale" and self.adapters:  # computes with what was loaded first
            weights = weights_of(next(iter(self.adapters.values())))
        found = completion(weights, prompt, settings.get("seed", 0), settings["max_tokens"])
        tokens, logprobs = found
        if settings.get("top_k") == 1 and not self.lacks.get("raw"):
            logprobs = [0.0] * len(tokens)
        answer: dict[str, Any] = {
            "model": name,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop" if tokens[-1] == 2 else "length",
                    "token_ids": tokens,
                    "logprobs": {"content": [
                        self._token(token, value)
                        for token, value in zip(tokens, logprobs, strict=True)
                    ]},
                }
            ],
            "prompt_logprobs": None,
        }  # fmt: skip
        if is_scored:
            answer["prompt_logprobs"] = [
                None,
                *(
                    {str(token): {"logprob": logprob(weights, prompt[:place], token)}}
                    for place, token in enumerate(prompt)
                    if place
                ),
            ]
        self.num_tokens += len(tokens)
        self.arrived.release()
        is_probe = settings.get("top_k") == 1
        return (200, answer) if is_probe else self._faulty(answer)

    def _token(self, token: int, value: float) -> dict[str, Any]:
        if self.lacks.get("version", "0.32").startswith("0.26"):
            return {"token": f"token_id:{token}", "logprob": value}
        return {"token_id": token, "logprob": value}

    # limits: one case for each fault
    def _faulty(self, answer: dict[str, Any]) -> Any:
        (choice,) = answer["choices"]
        match self.fault:
            case "hang":
                self.release.wait(60)
            case "500":
                return _error(500, "EngineCore encountered an issue.")
            case "no JSON":
                return 200, b"<html>\x1b[31mBad gateway</html>"
            case "a list":
                return 200, [answer]
            case "deep":
                return 200, b"[" * 50_000
            case "huge":
                return 200, b" " * 10 * 2**20
            case "cut off":
                return 200, json.dumps(answer).encode()[:-40]
            case "the base":
                answer["model"] = BASE
            case "no log-probs":
                choice["logprobs"] = None
            case "too few log-probs":
                choice["logprobs"]["content"].pop()
            case "other log-probs":
                choice["logprobs"]["content"][0]["token_id"] += 1
            case "NaN":
                choice["logprobs"]["content"][0]["logprob"] = float("nan")
            case "no log-prob":
                choice["logprobs"]["content"][0]["logprob"] = -9999.0
            case "too many tokens":
                choice["token_ids"] *= 9
                choice["logprobs"]["content"] *= 9
            case "too few tokens":
                choice["finish_reason"] = "length"
                del choice["token_ids"][1:], choice["logprobs"]["content"][1:]
            case "text tokens":
                choice["token_ids"] = [str(token) for token in choice["token_ids"]]
            case "unknown token":
                choice["token_ids"][0] = choice["logprobs"]["content"][0]["token_id"] = VOCAB
            case "aborted":
                choice["finish_reason"] = "abort"
            case "no choice":
                answer["choices"] = []
            case "two choices":
                answer["choices"] *= 2
        return 200, answer


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": "Error", "code": status}}


@contextmanager
def serving(server: FakeServer, port: int = 0) -> Iterator[str]:
    """Its address, while it is up."""

    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(json.loads(self.rfile.read(length)))

        def _answer(self, body: dict[str, Any]) -> None:
            status, found = server.answer(
                self.command, self.path, body, self.headers.get("Authorization")
            )
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, *_: object) -> None:
            pass  # whoever asked has left

    with Server(("127.0.0.1", port), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_port}"
        finally:
            listening.shutdown()
            thread.join()
            for connection in connections:
                with suppress(OSError):  # one that is closed already
                    connection.shutdown(socket.SHUT_RDWR)
            server.release.set()
