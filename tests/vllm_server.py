"""A local server that speaks the part of vLLM's API that is used here, and answers from a model.

Paths, fields and statuses are those of `vllm serve` 0.32, to which tests/test_vllm_real.py holds
them: sampled tokens are drawn by our own Transformers sampler, from weights that `/collective_rpc`
loads from a folder.
"""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.transformers import TransformersSampler

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
NOT_FOUND = {"detail": "Not Found"}
WANTED = {"error": {"message": "as the test wants"}}


class FakeVLLM:
    """What the server is and does; tests change it while it runs.

    change_choices: applied to the choices of every completion before they are sent.
    answers: path -> status, sent in place of an answer.
    failures: statuses that the next requests for completions get, one each.
    keeps: whether a tensor of this name is left out when weights are loaded.
    api_key: asked for under /v1, as by --api-key.
    """

    def __init__(self, model_path: str) -> None:
        self.served, self.max_model_len = str(model_path), 512
        self.logprobs_mode = "processed_logprobs"
        self.keeps: Callable[[str], bool] = lambda name: False
        self.resets_cache = True
        self.api_key: str | None = None
        self.max_lora_rank: int | None = None  # as by --enable-lora
        self.transfer_backend: str | None = None  # as by --weight-transfer-config
        self.paused = ""  # the mode of a pause, while it lasts
        self.path = model_path
        self.start()
        self.change_choices: Callable[[list[dict]], list[dict]] = lambda choices: choices
        self.answers: dict[str, int] = {}
        self.failures: list[int] = []
        self.requests: list[tuple[str, dict]] = []
        self.lock = threading.Condition()

    def start(self) -> None:
        """As a new process, with the weights that it is served from."""
        self.model = AutoModelForCausalLM.from_pretrained(self.path)
        self.instance, self.version = str(random.getrandbits(63)), "default"
        self.adapters: dict[str, Any] = {}

    def without(self, *routes: str) -> None:
        """As a version that does not have these routes."""
        self.answers |= dict.fromkeys(routes, 404)

    def paths(self, path: str) -> list[dict]:
        """Bodies of the requests for a path."""
        return [body for requested, body in self.requests if requested == path]

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> tuple[int, Any]:
        with self.lock:
            self.requests.append((path, body))
            if path in self.answers:
                return self.answers[path], NOT_FOUND if self.answers[path] == 404 else WANTED
            if self.api_key and path.startswith("/v1") and key != f"Bearer {self.api_key}":
                return 401, {"error": "Unauthorized"}
            route = getattr(self, "_" + path.strip("/").replace("/", "_"), None)
            return (404, NOT_FOUND) if route is None else route(body)

    def _v1_models(self, body: dict) -> tuple[int, dict]:
        card = {"id": "policy", "object": "model", "root": self.served}
        cards = [card | {"max_model_len": self.max_model_len}]
        cards += [{"id": name, "object": "model", "root": name} for name in self.adapters]
        return 200, {"object": "list", "data": cards}

    def _server_info(self, body: dict) -> tuple[int, dict]:
        model = {"logprobs_mode": self.logprobs_mode, "dtype": "torch.float32"}
        config = {"model_config": model, "instance_id": self.instance, "lora_config": None}
        config["weight_transfer_config"] = None
        if self.transfer_backend:
            config["weight_transfer_config"] = {"backend": self.transfer_backend}
        if self.max_lora_rank:
            config["lora_config"] = {"max_lora_rank": self.max_lora_rank}
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": bool(self.max_lora_rank)}
        return 200, {"vllm_config": config, "vllm_env": env}

    def _get_world_size(self, body: dict) -> tuple[int, dict]:
        return 200, {"world_size": 2}

    def _init_weight_transfer_engine(self, body: dict) -> tuple[int, dict]:
        self.transfer = body["init_info"]
        return 200, {"message": "Weight transfer initialized"}

    def _start_weight_update(self, body: dict) -> tuple[int, dict]:
        assert self.paused
        return 200, {"message": "Weight update started"}

    def _update_weights(self, body: dict) -> tuple[int, dict]:
        assert self.paused and body["update_info"]["names"]
        self.model.load_state_dict(load_file(body["update_info"]["file"]))
        return 200, {"message": "Weights updated"}

    def _finish_weight_update(self, body: dict) -> tuple[int, dict]:
        assert self.paused
        return 200, {"message": "Weight update finished"}

    def _v1_load_lora_adapter(self, body: dict) -> tuple[int, str]:
        from peft import PeftModel

        name, path = body["lora_name"], body["lora_path"]
        if not Path(path, "adapter_config.json").exists():
            return 404, {"error": {"message": f"No adapter found for {path}"}}
        base = copy.deepcopy(self.model)
        self.adapters[name] = PeftModel.from_pretrained(base, path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _v1_unload_lora_adapter(self, body: dict) -> tuple[int, str]:
        name = body["lora_name"]
        if name not in self.adapters:
            return 404, {"error": {"message": f"The lora adapter '{name}' cannot be found."}}
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _is_paused(self, body: dict) -> tuple[int, dict]:
        return 200, {"is_paused": bool(self.paused)}

    def _pause(self, body: dict) -> tuple[int, dict]:
        self.paused = body["mode"]
        return 200, {"status": "paused"}

    def _resume(self, body: dict) -> tuple[int, dict]:
        self.paused = ""
        self.lock.notify_all()
        return 200, {"status": "resumed"}

    def _weight_info(self, body: dict) -> tuple[int, dict]:
        return 200, {"weight_version": self.version}

    def _update_weight_version(self, body: dict) -> tuple[int, dict]:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def _collective_rpc(self, body: dict) -> tuple[int, dict]:
        assert body["method"] == "reload_weights"
        assert self.paused or "/pause" in self.answers
        new = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"])
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                if self.keeps(name):
                    parameter.copy_(self.model.get_parameter(name))
        if self.keeps("lm_head.weight"):  # tied or not, as a copy of its own
            new.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.model = new
        return 200, {"results": [None]}

    def _reset_prefix_cache(self, body: dict) -> tuple[int, dict]:
        return 200, {"success": self.resets_cache}

    def _v1_completions(self, body: dict) -> tuple[int, dict]:
        if self.failures:
            return self.failures.pop(0), {"error": {"message": "engine is busy"}}
        assert {name: body[name] for name in REQUIRED} == REQUIRED
        # a server that pauses, in whatever mode, keeps new requests until it resumes
        assert self.lock.wait_for(lambda: not self.paused, timeout=60)
        model = self.model if body["model"] == "policy" else self.adapters[body["model"]]
        if "prompt_logprobs" in body:
            choice = self._scored(model, body["prompt"])
            return 200, {"object": "text_completion", "choices": [choice]}
        sampler = TransformersSampler(
            model if model is self.model else model.get_base_model(),
            Decoding(eos_token_ids=body["stop_token_ids"], pad_token_id=0, batch_size=64),
        )
        (group,) = sampler.sample(
            [body["prompt"]],
            num_generations=body["n"],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seeds=[body["seed"]],
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

    @torch.no_grad()
    def _scored(self, model: torch.nn.Module, ids: list[int]) -> dict[str, Any]:
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
        of_prompt = [
            {str(token): {"logprob": row[token], "rank": 1, "decoded_token": ""}}
            for row, token in zip(logprobs, ids[1:], strict=False)
        ]
        return {"index": 0, "text": "", "prompt_logprobs": [None, *of_prompt]}


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[str]:
    """The server's base URL, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body would wait 40 ms for its headers to be acknowledged

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or "{}")
            url = urlsplit(self.path)
            status, answer = fake.answer(
                url.path, body | dict(parse_qsl(url.query)), self.headers.get("Authorization")
            )
            text = isinstance(answer, str)
            data = (answer if text else json.dumps(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
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
