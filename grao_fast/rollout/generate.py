"""Sampling by Transformers' own `generate`, for models that keep more than keys and values.

A state-space, convolution or linear-attention layer sums the tokens before into a state, which
`generate` knows how to carry in each family. Two things differ from keys and values. Padding on the
left would be summed as well, in some families even under a mask: prompts are decoded beside prompts
of their own length alone, so that there is none. And rows that have ended stay in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from grao_fast.rollout import Completion
from grao_fast.rollout.drawing import completions_of, draw
from grao_fast.rollout.model_sampler import ModelSampler


class GenerateSampler(ModelSampler):
    """A `Sampler` by `model.generate`; the tokens are drawn here, from the plain softmax."""

    def _batches(self, prompts: list[list[int]], size: int) -> Iterator[list[int]]:
        """Prompts of one length each, the longest first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for _, equal in groupby(order, key=lambda i: len(prompts[i])):
            indices = list(equal)
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def _decode(
        self,
        prompts: list[list[int]],
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[Completion]:
        """Completions of prompts of one length, each prompt's one behind the other."""
        ids = torch.tensor(prompts, dtype=torch.int64, device=self.model.device)
        ids = ids.repeat_interleave(num_generations, 0)
        drawing = _Drawing(temperature, generator)
        # nothing of the model's own generation_config: no penalties, no top_k, no max_length
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # to some layers one token is a step of decoding, whatever is before it
            use_cache=ids.shape[1] > 1,
            disable_compile=True,
            eos_token_id=self.eos_ids.tolist() or None,
            pad_token_id=self.pad_token_id,
        )
        with self._generating_by(config):
            sequences = self.model.generate(
                inputs=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([drawing]),
            )
        assert isinstance(sequences, Tensor)
        tokens = sequences[:, ids.shape[1] :]
        logprobs = torch.stack(drawing.logprobs[: tokens.shape[1]], dim=1)
        ends = torch.isin(tokens, self.eos_ids)
        before = ends.cumsum(1) - ends.long()  # end-of-sequence tokens before each token
        lengths, finished = (before == 0).sum(1), ends.any(1)
        return completions_of(tokens, logprobs, lengths, finished, model=type(self.model).__name__)

    @contextmanager
    def _generating_by(self, config: GenerationConfig) -> Iterator[None]:
        """`generate` fills what its `generation_config` leaves open from the model's: not here."""
        own = self.model.generation_config
        self.model.generation_config = config
        try:
            yield
        finally:
            self.model.generation_config = own


class _Drawing(LogitsProcessor):
    """Draws a token of every row and leaves `generate`, which is greedy, only that one.

    logprobs: (B,) of every step.
    """

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.temperature, self.generator = temperature, generator
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        u = torch.rand(
            len(scores), 1, dtype=torch.float64, device=scores.device, generator=self.generator
        )
        token, logprob = draw(scores.float(), self.temperature, u)
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
