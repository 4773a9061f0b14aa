"""Sampling from a vLLM engine in this process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from grao_fast.distributed.world import World
from grao_fast.models.policy import Policy
from grao_fast.sampling import Completion, OnGroup
from grao_fast.sampling.held_weights import HeldWeights
from grao_fast.sampling.vllm.requests import (
    FAILURES,
    LOGPROBS_MODE,
    checked,
    sampling_options,
    scoring_options,
)
from grao_fast.sampling.weights import WeightFolder
from grao_fast.system.errors import UserError, explained
from grao_fast.system.optional import import_optional
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"


class VLLMColocatedSampler:
    """A `Sampler` over a vLLM engine in this process; it starts at the first `sync`.

    vLLM computes in the dtype of the policy's passes, and holds its memory beside the trainer's. In
    one process it computes on the first device that it sees. Each of several processes has an
    engine on its own device, or a part of one, which loads the weights that rank 0 has written.

    Args:
        tokenizer: of the policy.
        eos_token_ids: tokens that end a completion.
        sync_dir: see `WeightFolder`.
        gpu_memory_utilization: share of the device's memory for weights and cache.
        max_model_length: tokens of a prompt and its completion; None: the model's own.
        tensor_parallel_size: processes that share an engine.
        world: the processes of the run.

    Raises:
        ValueError: vllm is not installed, engines cannot be shared so, or several machines have no
            folder that all see.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Iterable[int],
        sync_dir: str | None,
        gpu_memory_utilization: float,
        max_model_length: int | None,
        tensor_parallel_size: int = 1,
        world: World | None = None,
    ) -> None:
        self._world = world = World() if world is None else world
        if world.size % tensor_parallel_size:
            raise UserError(
                f"vllm_tensor_parallel_size={tensor_parallel_size} does not divide the number of "
                f"processes, {world.size}: set a divisor, or start another number of processes"
            )
        if world.local_size < world.size and sync_dir is None:
            raise UserError(
                'vllm_mode="colocate" on several machines hands weights over in a folder that all '
                "of them see: name one by vllm_sync_dir"
            )
        self._vllm = import_optional("vllm", extra="vllm", option="use_vllm")
        self.eos_ids = sorted(eos_token_ids)
        self.context_length = max_model_length
        self.gpu_memory_utilization = gpu_memory_utilization
        self._tokenizer = tokenizer
        self._folder = WeightFolder(sync_dir, tokenizer, world)
        self._team_size, self._team = tensor_parallel_size, World()
        self._engine: Any = None
        self._held: HeldWeights | None = None

    def sync(self, policy: Policy) -> None:
        """See `Sampler.sync`; returns once a check has proved that the weights arrived.

        Raises ValueError where it has others, does not start, or fails.
        """
        if self._held is None:
            limits = filter(None, (policy.context_length, self.context_length))
            self._held = HeldWeights(
                self._tokenizer,
                dtype=policy.autocast_dtype or policy.causal_lm.dtype,
                name="vLLM's engine",
                context_length=min(limits, default=None),
            )
        if not self._held.is_proved:
            self._held.first(policy, self._hand_over, self._scores)
            return
        self._hand_over(policy)
        self._held.again(policy, self._scores)

    def _hand_over(self, policy: Policy) -> None:
        folder = str(self._folder.write(policy))
        if self._engine is None:  # not in `World.each`: engines that start wait for each other
            self._engine = self._start(folder, policy.autocast_dtype or policy.causal_lm.dtype)
        else:
            self._world.together(lambda: self._reload(folder))

    def _reload(self, folder: str) -> None:
        with explained("vLLM's engine did not take over the weights", *FAILURES):
            self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
            self._engine.reset_prefix_cache()

    def _start(self, folder: str, dtype: torch.dtype) -> Any:
        options: dict[str, Any] = {}
        if self._world.size > 1:  # an engine of one process of several that exchange tensors
            self._team = self._world.team(self._team_size)
            options = {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": self._team_size,
            }
        with explained("vLLM's engine did not start", *FAILURES), _in_this_process(self._world):
            engine = self._vllm.LLM(
                model=folder,
                dtype=dtype,
                gpu_memory_utilization=self.gpu_memory_utilization,
                max_model_len=self.context_length,
                logprobs_mode=LOGPROBS_MODE,
                **options,
            )
        self._world.closing.callback(self._shut_down)
        return engine

    def _shut_down(self) -> None:
        """End the engine, which leaves the groups of torch.distributed and then the default one.

        Otherwise it would do so at Python's exit, when they are gone.
        """
        engine, self._engine = self._engine, None
        with suppress(*FAILURES):  # of a run that has failed
            engine.llm_engine.engine_core.shutdown()

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
        """See `Sampler.sample`; `on_group` is not called, as the engine returns all at once.

        All processes that share an engine must call it: each part of the engine samples the prompts
        of all.
        """
        assert self._engine is not None, "sync before the first sample"
        options = sampling_options(
            num_generations=num_generations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=self.eos_ids,
        )
        asked = self._team.gather((prompts, seeds))
        outputs = self._generate(
            [prompt for prompts, _ in asked for prompt in prompts],
            [options | {"seed": seed} for _, seeds in asked for seed in seeds],
        )
        before = sum(len(prompts) for prompts, _ in asked[: self._team.rank])
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
            for output in outputs[before : before + len(prompts)]
        ]

    def _scores(self, ids: list[int]) -> list[list[float]]:
        return self._world.each(lambda: self._score(ids))

    def _score(self, ids: list[int]) -> list[float]:
        """Log-probs at temperature 1 of all tokens but the first."""
        (output,) = self._generate([ids], [scoring_options()])
        behind_first = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        return [float(at[token].logprob) for at, token in behind_first]

    def _generate(self, prompts: list[list[int]], options: list[dict[str, Any]]) -> list[Any]:
        with explained("vLLM's engine failed while it sampled", *FAILURES):
            return self._engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                [self._vllm.SamplingParams(**each, detokenize=False) for each in options],
                use_tqdm=False,
            )


@contextmanager
def _in_this_process(world: World) -> Iterator[None]:
    """Start vLLM's engine in this process: a process of its own would run the user's script again.

    vLLM can be told only by environment variables, as which process of several this one is. On CPUs
    it also replaces `set_num_threads`, which is restored.
    """
    told = {_IN_PROCESS: "0"}
    if world.size > 1:
        told |= {"RANK": str(world.rank), "LOCAL_RANK": str(world.local_rank)}
    before, set_num_threads = {name: os.environ.get(name) for name in told}, torch.set_num_threads
    os.environ.update(told)
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
