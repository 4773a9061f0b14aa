"""A local server that speaks the part of vLLM's API that is used here, and answers from a model.

Paths, fields and defaults are those of `vllm serve` 0.22: sampled tokens are drawn by our own
Transformers sampler, from weights that `/collective_rpc` loads from a folder.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers import AutoModelForCausalLM

from grao_fast.rollout.transformers import TransformersSampler

REQUIRED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}


class FakeVLLM:
    """What the server is and does; tests change it while it runs.

    change_choices: applied to the choices of every completion before they are sent.
    answers: path -> status, sent in place of an answer.
    failures: statuses that the next requests for completions get, one each.
    """

    def __init__(self, model_path: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_path)
        self.served, self.max_model_len = str(model_path), 512
        self.logprobs_mode = "processed_logprobs"
        self.loads_weights = True
        self.resets_cache = True
        self.change_choices: Callable[[list[dict]], list[dict]] = lambda choices: choices
        self.answers: dict[str, int] = {}
        self.failures: list[int] = []
        self.requests: list[tuple[str, dict]] = []
        self.lock = threading.Lock()

    def paths(self, path: str) -> list[dict]:
        """Bodies of the requests for a path."""
        return [body for requested, body in self.requests if requested == path]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self.lock:
            self.requests.append((path, body))
            if path in self.answers:
                return self.answers[path], {"error": {"message": "as the test wants"}}
            return getattr(self, "_" + path.strip("/").replace("/", "_"))(body)

    def _v1_models(self, body: dict) -> tuple[int, dict]:
        card = {"id": "policy", "object": "model", "root": self.served}
        return 200, {"object": "list", "data": [card | {"max_model_len": self.max_model_len}]}

    def _server_info(self, body: dict) -> tuple[int, dict]:
        return 200, {"vllm_config": {"model_config": {"logprobs_mode": self.logprobs_mode}}}

    def _collective_rpc(self, body: dict) -> tuple[int, dict]:
        assert body["method"] == "reload_weights"
        if self.loads_weights:
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, body: dict) -> tuple[int, dict]:
        return 200, {"success": self.resets_cache}

    def _v1_completions(self, body: dict) -> tuple[int, dict]:
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "engine is busy"}}
        assert {name: body[name] for name in REQUIRED} == REQUIRED
        assert body["model"] == "policy"
        sampler = TransformersSampler(
            self.model, eos_token_ids=body["stop_token_ids"], pad_token_id=0, batch_size=64
        )
        (group,) = sampler.sample(
            [body["prompt"]],
            num_generations=body["n"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
        )
        choices = [
            {
                "index": i,
                "text": "",
                "token_ids": sample.token_ids,
                "logprobs": {"token_logprobs": sample.logprobs},
                "finish_reason": "stop" if sample.finished else "length",
            }
            for i, sample in enumerate(group)
        ]
        # vLLM does not promise an order
        return 200, {"object": "text_completion", "choices": self.change_choices(choices[::-1])}


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[str]:
    """The server's base URL, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            status, answer = fake.answer(self.path.split("?")[0], body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")  # tests do not wait as users would
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
