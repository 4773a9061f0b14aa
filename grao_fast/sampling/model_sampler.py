"""The base of samplers that run a Transformers model in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from grao_fast.models.policy import Policy
from grao_fast.models.router import no_router_loss
from grao_fast.sampling import Completion, OnGroup


@dataclass(frozen=True)
class Decoding:
    """How a model of this process is decoded.

    eos_token_ids: tokens that end a completion.
    pad_token_id: fills rows where they have no token; never attended to.
    batch_size: sequences decoded at once; at least one prompt's group.
    dtype: autocast to this dtype (bfloat16 on CUDA); None computes in the model's own.
    """

    eos_token_ids: Iterable[int]
    pad_token_id: int
    batch_size: int
    dtype: torch.dtype | None = None


class ModelSampler:
    """A `Sampler` over a causal language model of Transformers, which decodes batches of prompts.

    Args:
        model: a causal language model.
        decoding: how it is decoded.
    """

    context_length: int | None = None

    def __init__(self, model: PreTrainedModel, decoding: Decoding) -> None:
        self.model = model
        eos_ids = sorted(decoding.eos_token_ids)
        self.eos_ids = torch.tensor(eos_ids, dtype=torch.int64, device=model.device)
        self.pad_token_id = decoding.pad_token_id
        self.batch_size = decoding.batch_size
        self.dtype = decoding.dtype

    def sync(self, policy: Policy) -> None:
        """Do nothing: the model that is trained is sampled from."""

    @torch.no_grad()
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
        """See `Sampler.sample`. Prompts are batched by length, the longest first."""
        assert len(seeds) == len(prompts), "one seed for each prompt"
        groups: list[list[Completion]] = [[] for _ in prompts]
        training = self.model.training
        self.model.eval()
        try:
            for chosen in self._batches(prompts, max(1, self.batch_size // num_generations)):

                def whole(place: int, group: list[Completion], chosen=chosen) -> None:
                    groups[chosen[place]] = group
                    if on_group is not None:
                        on_group(chosen[place], group)

                autocast = torch.autocast(
                    self.model.device.type, dtype=self.dtype, enabled=self.dtype is not None
                )
                with autocast, no_router_loss(self.model):
                    self._decode(
                        [prompts[i] for i in chosen],
                        num_generations,
                        max_new_tokens,
                        temperature,
                        [seeds[i] for i in chosen],
                        whole,
                    )
        finally:
            self.model.train(training)
        return groups

    def _batches(self, prompts: list[list[int]], size: int) -> Iterator[list[int]]:
        """Indices of the prompts of each batch."""
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(prompts), size):
            yield longest_first[start : start + size]

    def _decode(
        self,
        prompts: list[list[int]],
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
        whole: OnGroup,
    ) -> None:
        """Decode a batch of prompts; call `whole` for each once all its completions have ended."""
        raise NotImplementedError
