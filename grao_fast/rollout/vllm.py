"""Sampling with vLLM (0.22 or later): a server over HTTP, or an engine on this machine.

Both draw from softmax(z / temperature) over the whole vocabulary, whatever a model's
generation_config.json says, and give log-probs of that distribution (logprobs_mode
"processed_logprobs"; by vLLM's default, they would be those at temperature 1).

Weights are handed over as a checkpoint in a folder, from which vLLM's workers load them in place
(their method `reload_weights`). It takes a write and a read of the weights for every step, in
memory where the folder is in /dev/shm, and neither NCCL nor a second GPU.

What could not be tried: neither class has met a real vLLM, which needs a GPU. The HTTP path is
tested against a local server that speaks vLLM's API; the engine, against an object with the methods
used here. A seed repeats a sample only as far as vLLM's kernels do.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grao_fast.rollout import Completion
from grao_fast.rollout.weights import WeightFolder

if TYPE_CHECKING:
    from grao_fast.policy import Policy

LOGPROBS_MODE = "processed_logprobs"

_SERVE = f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode {LOGPROBS_MODE}"
_REQUESTS_AT_ONCE = 64
_RETRIES = 3
_TIMEOUT = 3600.0  # seconds for one prompt's samples, which may wait for those of others


def sampling_options(
    *, num_generations: int, max_new_tokens: int, temperature: float, eos_ids: list[int]
) -> dict[str, Any]:
    """vLLM's parameters for samples of the plain distribution that end with an eos token.

    All are set: vLLM takes what is not from the model's generation_config.json.
    """
    return {
        "n": num_generations,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,  # of the sampled token, and of none besides
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # stop_token_ids has all that count
    }


def prompt_seeds(seed: int, prompts: int) -> list[int]:
    """A seed for each prompt; its samples take the ones that follow."""
    draw = random.Random(seed)
    return [draw.getrandbits(31) for _ in range(prompts)]


def checked(
    token_ids: Sequence[int] | None,
    logprobs: Sequence[float | None] | None,
    *,
    eos_ids: Iterable[int],
    max_new_tokens: int,
) -> Completion:
    """What vLLM returned, as a `Completion`; ValueError where it cannot be one."""
    if not token_ids:
        raise ValueError("vLLM returned no token ids; version 0.22 or later is needed")
    if logprobs is None or len(logprobs) != len(token_ids):
        had = "none" if logprobs is None else len(logprobs)
        raise ValueError(f"vLLM returned {len(token_ids)} tokens with {had} log-probs")
    values = [math.nan if value is None else float(value) for value in logprobs]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"vLLM returned a log-prob that is not finite: {values}")
    finished = token_ids[-1] in eos_ids
    if not finished and len(token_ids) != max_new_tokens:
        raise ValueError(
            f"vLLM cut a completion after {len(token_ids)} of {max_new_tokens} tokens: start it "
            "with --generation-config vllm, or lower max_new_tokens"
        )
    return Completion(token_ids=list(token_ids), logprobs=values, finished=finished)


class VLLMServerSampler:
    """A `Sampler` over a running `vllm serve`, one request a prompt.

    The server is trusted: whoever reaches it can load weights into it.

    Args:
        base_url: of the server, without /v1.
        model: the name under which it serves the policy, or the path it was started with.
        eos_token_ids: tokens that end a completion.
        sync_dir: see `WeightFolder`; the server must see it under the same path.

    Raises:
        ConnectionError: no server answers there, or one that fails after retries.
        ValueError: it serves another model, cannot take weights, gives log-probs at temperature 1,
            or openai, its client, is not installed.
    """

    def __init__(
        self, base_url: str, *, model: str, eos_token_ids: Iterable[int], sync_dir: str | None
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.eos_ids = sorted(eos_token_ids)
        self._openai = _import("openai", extra="vllm-server", option='vllm_mode="server"')
        self._client = self._openai.OpenAI(
            base_url=f"{self.base_url}/v1",
            api_key="none",
            max_retries=_RETRIES,
            timeout=self._openai.Timeout(_TIMEOUT, connect=10.0),
        )
        self.model, self.context_length = self._find(model)
        self._check_logprobs_mode()
        self._folder = WeightFolder(sync_dir)

    def _find(self, model: str) -> tuple[str, int | None]:
        """The served name of a model, and the tokens that the server holds of a sequence."""
        served = self._call("get", "/v1/models")["data"]
        for card in served:
            if model in (card["id"], card.get("root")):
                return card["id"], card.get("max_model_len")
        raise ValueError(
            f"the vLLM server at {self.base_url} serves {[card['id'] for card in served]}, not "
            f"{model!r}: serve it, or set vllm_server_model to the name it has there"
        )

    def _check_logprobs_mode(self) -> None:
        info = self._call("get", "/server_info?config_format=json")
        mode = info["vllm_config"]["model_config"]["logprobs_mode"]
        if mode != LOGPROBS_MODE:
            raise ValueError(
                f"the vLLM server at {self.base_url} gives {mode}, which are not those of the "
                f"distribution it samples from: start it with --logprobs-mode {LOGPROBS_MODE}"
            )

    def sync(self, policy: Policy) -> None:
        """See `Sampler.sync`. Returns when the server samples from the new weights."""
        folder = self._folder.write(policy)
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._call("post", "/collective_rpc", arguments)
        except ConnectionError as error:
            raise ConnectionError(
                f"the vLLM server did not load the weights in {str(folder)!r}; vllm_sync_dir must "
                f"be a folder that it sees under that path, and may read: {error}"
            ) from error
        # What it remembers of prompts was computed with the old weights.
        answer = self._call("post", "/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ValueError(
                f"the vLLM server at {self.base_url} keeps a prefix cache of the old weights, as "
                "it serves others at the same time: give it to this run alone"
            )

    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`. The longest prompts are asked for first."""
        options = sampling_options(
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=self.eos_ids,
        )

        def ask(prompt: list[int], seed: int) -> list[Completion]:
            body = {"model": self.model, "prompt": prompt, "seed": seed, "return_token_ids": True}
            choices = self._call("post", "/v1/completions", body | options)["choices"]
            return self._completions(choices, num_generations, max_new_tokens)

        seeds = prompt_seeds(seed, len(prompts))
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            asked = [prompts[i] for i in longest_first], [seeds[i] for i in longest_first]
            groups = dict(zip(longest_first, pool.map(ask, *asked), strict=True))
        return [groups[i] for i in range(len(prompts))]

    def _completions(
        self, choices: list[dict[str, Any]], num_generations: int, max_new_tokens: int
    ) -> list[Completion]:
        if len(choices) != num_generations:
            raise ValueError(
                f"the vLLM server returned {len(choices)} completions of a prompt, not the "
                f"{num_generations} it was asked for"
            )
        return [
            checked(
                choice.get("token_ids"),
                (choice.get("logprobs") or {}).get("token_logprobs"),
                eos_ids=self.eos_ids,
                max_new_tokens=max_new_tokens,
            )
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]

    def _call(self, verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's answer, as JSON. The client retries what may pass, with growing pauses."""
        url = self.base_url + path
        body = {} if body is None else {"body": body}
        try:
            return getattr(self._client, verb)(url, cast_to=object, **body)
        except self._openai.NotFoundError as error:
            raise ValueError(
                f"{url} is not there; start the server as: {_SERVE} ({error.message})"
            ) from error
        except self._openai.APIConnectionError as error:
            raise ConnectionError(
                f"no vLLM server answers at {url} ({error.__cause__ or error}); start one as: "
                f"{_SERVE}, or set vllm_server_base_url"
            ) from error
        except self._openai.APIStatusError as error:
            failure = ConnectionError if error.status_code >= 500 else ValueError
            raise failure(f"{url}: {error.message}") from error


class VLLMColocatedSampler:
    """A `Sampler` over a vLLM engine on this machine; it starts at the first `sync`.

    vLLM computes in a process of its own, on the first device it sees, in the dtype of the
    policy's passes, and holds its memory beside the trainer's.

    Args:
        eos_token_ids: tokens that end a completion.
        sync_dir: see `WeightFolder`.
        gpu_memory_utilization: share of the device's memory for weights and cache.
        max_model_length: tokens of a prompt and its completion; None: the model's own.

    Raises:
        ValueError: vllm is not installed.
    """

    def __init__(
        self,
        *,
        eos_token_ids: Iterable[int],
        sync_dir: str | None,
        gpu_memory_utilization: float,
        max_model_length: int | None,
    ) -> None:
        self._vllm = _import("vllm", extra="vllm", option="use_vllm")
        self.eos_ids = sorted(eos_token_ids)
        self.context_length = max_model_length
        self.gpu_memory_utilization = gpu_memory_utilization
        self._folder = WeightFolder(sync_dir)
        self._engine: Any = None

    def sync(self, policy: Policy) -> None:
        """See `Sampler.sync`."""
        folder = str(self._folder.write(policy))
        if self._engine is not None:
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            self._engine.reset_prefix_cache()
            return
        self._engine = self._vllm.LLM(
            model=folder,
            dtype=policy.autocast_dtype or policy.causal_lm.dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self.context_length,
            logprobs_mode=LOGPROBS_MODE,
        )

    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`."""
        assert self._engine is not None, "sync before the first sample"
        options = sampling_options(
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=self.eos_ids,
        )
        outputs = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                self._vllm.SamplingParams(**options, seed=each, detokenize=False)
                for each in prompt_seeds(seed, len(prompts))
            ],
            use_tqdm=False,
        )
        return [
            [
                checked(
                    sample.token_ids,
                    [
                        at[token].logprob
                        for at, token in zip(sample.logprobs, sample.token_ids, strict=True)
                    ],
                    eos_ids=self.eos_ids,
                    max_new_tokens=max_new_tokens,
                )
                for sample in output.outputs
            ]
            for output in outputs
        ]


def _import(name: str, *, extra: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{option} needs {name}: pip install "grao-fast[{extra}]"') from error
