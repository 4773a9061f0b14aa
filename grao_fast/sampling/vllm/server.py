"""Sampling from a running `vllm serve`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed, wait
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grao_fast.distributed.world import World
from grao_fast.models.policy import Policy
from grao_fast.sampling import Completion, OnGroup
from grao_fast.sampling.held_weights import HeldWeights
from grao_fast.sampling.vllm.client import HeldVersion, PauseMode, VLLMClient, paused
from grao_fast.sampling.vllm.handover import HandOver, choose_hand_over
from grao_fast.sampling.vllm.requests import (
    LOGPROBS_MODE,
    checked,
    sampling_options,
    scoring_options,
)
from grao_fast.sampling.weights import WeightFolder
from grao_fast.system.errors import UserError
from grao_fast.system.threads import DaemonExecutor
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_REQUESTS_AT_ONCE = 64
_TO_END = 5.0  # seconds for requests in flight to end when one of them has failed


class VLLMServerSampler:
    """A `ConcurrentSampler` over a running `vllm serve`, with one request per prompt.

    Every process of a run has one, and asks for its own prompts; rank 0's gives the server the
    weights, which all gather. The server is trusted: whoever reaches it can load weights into it.

    Args:
        base_url: of the server, without /v1.
        model: the name under which it serves the policy, or the path it was started with.
        tokenizer: of the policy.
        eos_token_ids: tokens that end a completion.
        sync_dir: see `WeightFolder`; the server must see it under the same path.
        api_key: what it was started with as --api-key; None: it asks for none.
        samples_on: whether requests in flight go on after a hand-over, with the new weights;
            otherwise a hand-over waits for them.
        world: the processes of the run.

    Raises:
        ConnectionError: no server answers there, or one that fails after retries.
        ValueError: it serves another model, cannot take weights, gives log-probs at temperature 1,
            refuses the key, cannot sample on, or openai, its client, is not installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Iterable[int],
        sync_dir: str | None,
        api_key: str | None = None,
        samples_on: bool = False,
        world: World | None = None,
    ) -> None:
        self._world = world = World() if world is None else world
        self.client = VLLMClient(base_url, api_key=api_key)
        self.base_url = self.client.base_url
        self.eos_ids = sorted(eos_token_ids)
        self.model, self.context_length = self._find(model)
        info = self.client.info()["vllm_config"]
        config = info["model_config"]
        self._check_logprobs_mode(config["logprobs_mode"])
        self._can_pause = self.client.has("/is_paused")
        self._samples_on = samples_on
        if samples_on:
            self._check_samples_on(info)
        self._version = HeldVersion(self.client, world)
        self._losses = 0  # times that the server was found without the policy's weights
        self._weights_lock = threading.RLock()  # of `_version` and `_losses`
        self._folder = WeightFolder(sync_dir, tokenizer, world)
        self._hand_over: HandOver | None = None  # chosen at the first `sync`
        self._held = HeldWeights(
            tokenizer,
            dtype=getattr(torch, str(config["dtype"]).removeprefix("torch."), torch.bfloat16),
            name=f"the vLLM server at {self.base_url}",
            context_length=self.context_length,
        )

    def _find(self, model: str) -> tuple[str, int | None]:
        """The served name of a model, and the server's limit on tokens of a sequence."""
        served = self.client.call("get", "/v1/models")["data"]
        for card in served:
            if model in (card["id"], card.get("root")):
                return card["id"], card.get("max_model_len")
        raise UserError(
            f"the vLLM server at {self.base_url} serves {[card['id'] for card in served]}, not "
            f"{model!r}: serve it, or set vllm_server_model to the name it has there"
        )

    def _check_logprobs_mode(self, mode: str) -> None:
        if mode != LOGPROBS_MODE:
            raise UserError(
                f"the vLLM server at {self.base_url} gives {mode}, which are not those of the "
                f"distribution it samples from: start it with --logprobs-mode {LOGPROBS_MODE}"
            )

    def _check_samples_on(self, info: dict[str, Any]) -> None:
        reason = ""
        if not self._can_pause:
            reason = "is of a version that cannot pause"
        elif info.get("lora_config"):  # in vLLM 0.32, scoring a prompt then ends the engine
            reason = "was started with --enable-lora, where it scores no prompt beside others"
        if reason:
            raise UserError(
                f"the vLLM server at {self.base_url} {reason}: it cannot take over weights while "
                "it samples; set async_rollouts to 1"
            )

    def sync(self, policy: Policy) -> None:
        """See `Sampler.sync`; returns once a check has proved that the weights arrived.

        Raises ValueError where it has others, ConnectionError where they do not reach it.
        """
        if self._hand_over is None:
            self._hand_over = choose_hand_over(policy, self.client, self._folder, model=self.model)
        if not self._held.is_proved:
            change = self._hand_over.change(policy)
            self._held.first(policy, self._give, self._main_score, change=change)
            return
        self._give(policy)
        self._held.again(policy, self._main_score)

    def _give(self, policy: Policy | None) -> None:
        """Hand over the policy's weights, or the last ones again, while the server pauses."""
        way, world = self._hand_over, self._world
        assert way is not None, "sync before the first sample"
        mode: PauseMode = "keep" if self._samples_on else "wait"
        # Held in all processes, so that none sees the new version before it is its own.
        with self._weights_lock:
            self._losses += world.main(self._version.is_lost)
            with paused(self.client, can_pause=self._can_pause, mode=mode, world=world):
                if policy is None:
                    way.give_again()
                else:
                    way.give(policy)
                world.main(self._reset_cache)
            self._version.mark()

    def _reset_cache(self) -> None:
        """Drop cached prefixes, which were computed with the old weights."""
        answer = self.client.call("post", "/reset_prefix_cache")
        if isinstance(answer, dict) and answer.get("success") is False:
            raise UserError(
                f"the vLLM server at {self.base_url} keeps a prefix cache of the old weights, "
                "as it serves others at the same time: give it to this run alone"
            )

    def recover(self) -> None:
        """See `ConcurrentSampler.recover`."""
        with self._weights_lock:
            if self._world.main(self._version.is_lost):
                logger.warning(
                    "the vLLM server at %s was restarted or given other weights: it gets the "
                    "policy's once more",
                    self.base_url,
                )
                self._give(None)

    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`; the longest prompts are requested first.

        In one process, a server that was restarted since the last hand-over gets the weights once
        more. One that loses them while it samples is a ConnectionError.
        """
        if self._world.size == 1:
            self.recover()
        with self._weights_lock:
            losses = self._losses
        assert len(seeds) == len(prompts), "one seed for each prompt"
        options = sampling_options(
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=self.eos_ids,
        )
        groups: list[list[Completion]] = [[] for _ in prompts]
        for i, choices in self._answers(prompts, [options | {"seed": seed} for seed in seeds]):
            groups[i] = self._completions(choices, num_generations, max_new_tokens)
            if on_group is not None:
                on_group(i, groups[i])
        with self._weights_lock:
            if self._losses > losses or self._version.is_lost():
                raise ConnectionError(
                    f"the vLLM server at {self.base_url} was restarted or given other weights "
                    "while it sampled: resume from the last checkpoint, and give it to this run "
                    "alone"
                )
        return groups

    def abort(self) -> None:
        """See `ConcurrentSampler.abort`. It does nothing to a server that cannot pause."""
        with paused(self.client, can_pause=self._can_pause, mode="abort"):
            pass

    def _answers(
        self, prompts: list[list[int]], options: list[dict[str, Any]]
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The index and the answer of every prompt, in the order in which answers come."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        with DaemonExecutor(_REQUESTS_AT_ONCE) as pool:
            asked = {pool.submit(self._complete, prompts[i], options[i]): i for i in longest_first}
            try:
                for answer in as_completed(asked):
                    yield asked[answer], answer.result()
            finally:
                # A request may reach the server after an abort that has ended another: while it is
                # waited for here, the run aborts once more.
                wait([answer for answer in asked if not answer.cancel()], timeout=_TO_END)

    def _complete(self, prompt: list[int], options: dict[str, Any]) -> list[dict[str, Any]]:
        model = self.model if self._hand_over is None else self._hand_over.model
        body = {"model": model, "prompt": prompt, "return_token_ids": True}
        return self.client.call("post", "/v1/completions", body | options)["choices"]

    def _main_score(self, ids: list[int]) -> list[list[float]]:
        return [self._world.main(lambda: self._score(ids))]

    def _score(self, ids: list[int]) -> list[float]:
        """Log-probs at temperature 1 of all tokens but the first."""
        (choice,) = self._complete(ids, scoring_options())
        of_tokens = choice.get("prompt_logprobs")
        if of_tokens is None:
            raise UserError(
                f"the vLLM server at {self.base_url} scores no prompts: version 0.22 or later is "
                "needed"
            )
        return [
            float(at[str(token)]["logprob"])
            for at, token in zip(of_tokens[1:], ids[1:], strict=True)
        ]

    def _completions(
        self, choices: list[dict[str, Any]], num_generations: int, max_new_tokens: int
    ) -> list[Completion]:
        if len(choices) != num_generations:
            raise UserError(
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
