"""Sampling by Transformers' `generate`, for models that keep more than keys and values.

State-space, convolution and linear-attention layers accumulate earlier tokens in a state, which
`generate` can carry for each family. Two things differ from a key/value cache. Left padding may
enter the state even if it is masked; unless a test shows that it does not, prompts are batched only
with prompts of the same length. And rows that have ended stay in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from grao_fast.models.sharding import own_class
from grao_fast.sampling import Completion, OnGroup
from grao_fast.sampling.drawing import completions_of, draw
from grao_fast.sampling.model_sampler import Decoding, ModelSampler
from grao_fast.sampling.seeds import uniform_numbers
from grao_fast.system.interruption import as_outside, held

# Lengths of the prompts that test padding, and the tokens sampled for each.
_LENGTHS = (20, 3)
_NEW_TOKENS = 4
_ROUNDING = 1e-5  # nats, relative to the largest log-prob, or to 1 if that is smaller


class GenerateSampler(ModelSampler):
    """A `Sampler` by `model.generate`, with tokens drawn here from the plain softmax.

    Args:
        pads: whether prompts of different lengths are decoded in one batch; see
            `supports_left_padding`.
    """

    def __init__(self, model: PreTrainedModel, decoding: Decoding, *, pads: bool = False) -> None:
        super().__init__(model, decoding)
        self.pads = pads

    def _batches(self, prompts: list[list[int]], size: int) -> Iterator[list[int]]:
        """Indices of each batch, the longest first; unless padding is safe, of one length each."""
        if self.pads:
            yield from super()._batches(prompts, size)
            return
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
        seeds: list[int],
        whole: OnGroup,
    ) -> None:
        """See `ModelSampler._decode`."""
        P, device = max(len(prompt) for prompt in prompts), self.model.device
        rows = [[self.pad_token_id] * (P - len(p)) + p for p in prompts]
        masks = [[0] * (P - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = (
            torch.tensor(x, device=device).repeat_interleave(num_generations, 0)
            for x in (rows, masks)
        )
        drawing = _Drawing(temperature, uniform_numbers(seeds, num_generations, device))
        # Overrides the model's generation_config: no penalties, no top_k, no max_length.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # Some layers treat a single token as a decoding step.
            use_cache=ids.shape[1] > 1,
            disable_compile=True,
            eos_token_id=self.eos_ids.tolist() or None,
            pad_token_id=self.pad_token_id,
        )
        with self._generating_by(config):
            sequences = self.model.generate(
                inputs=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([drawing]),
            )
        assert isinstance(sequences, Tensor)
        tokens = sequences[:, ids.shape[1] :]
        logprobs = torch.stack(drawing.logprobs[: tokens.shape[1]], dim=1)
        ends = torch.isin(tokens, self.eos_ids)
        before = ends.cumsum(1) - ends.long()  # end-of-sequence tokens before each token
        lengths, finished = (before == 0).sum(1), ends.any(1)
        name = own_class(self.model).__name__
        completions = completions_of(tokens, logprobs, lengths, finished, model=name)
        for group in range(len(prompts)):
            first = group * num_generations
            whole(group, completions[first : first + num_generations])

    @contextmanager
    def _generating_by(self, config: GenerationConfig) -> Iterator[None]:
        """Replace the model's generation_config, from which `generate` would fill open options."""
        own = self.model.generation_config
        with held():  # the model could be saved meanwhile
            try:
                self.model.generation_config = config
                with as_outside():
                    yield
            finally:
                self.model.generation_config = own


def supports_left_padding(model: PreTrainedModel) -> bool:
    """Whether padding on the left of a prompt changes nothing but rounding.

    Two prompts are completed together, with two padding tokens, and each alone. The padding token
    may not change a bit; the amount of padding may change log-probs by rounding only. Biases are
    perturbed for the test, since biases of 0, as in a new model, would hide a leak. False for
    16-bit weights, whose rounding would hide one as well.
    """
    if model.dtype != torch.float32:
        return False
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    prompts = [[(i * 7919 + n + 11) % vocabulary for i in range(n)] for n in _LENGTHS]

    def answer(prompts: list[list[int]], pad_token_id: int = 0) -> list[Completion]:
        decoding = Decoding(eos_token_ids=(), pad_token_id=pad_token_id, batch_size=len(prompts))
        sampler = GenerateSampler(model, decoding, pads=True)
        groups = sampler.sample(
            prompts,
            num_generations=1,
            max_new_tokens=_NEW_TOKENS,
            temperature=0.0,
            seeds=[0] * len(prompts),
        )
        return [group[0] for group in groups]

    with _stirred_biases(model):
        together = answer(prompts)
        if together != answer(prompts, pad_token_id=vocabulary - 1):
            return False
        return all(
            _alike(completion, answer([prompt])[0])
            for completion, prompt in zip(together, prompts, strict=True)
        )


def _alike(a: Completion, b: Completion) -> bool:
    a_T, b_T = torch.tensor(a.logprobs), torch.tensor(b.logprobs)
    off = float((a_T - b_T).abs().max())
    return a.token_ids == b.token_ids and off <= _ROUNDING * max(1.0, float(b_T.abs().max()))


@contextmanager
def _stirred_biases(model: PreTrainedModel) -> Iterator[None]:
    """Move one-dimensional parameters by up to 1 for the block."""
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.ndim == 1]
    with held():  # the model may be the user's
        try:
            with torch.no_grad():
                for parameter, _ in kept:
                    places = torch.arange(parameter.numel(), device=parameter.device)
                    parameter += (1.7 * places).cos().to(parameter.dtype)
            with as_outside():
                yield
        finally:
            with torch.no_grad():
                for parameter, values in kept:
                    parameter.copy_(values)


class _Drawing(LogitsProcessor):
    """Draws a token for every row and masks all others, so that greedy `generate` takes it.

    logprobs: (B,) of every step.
    """

    def __init__(self, temperature: float, numbers: Iterator[Tensor]) -> None:
        self.temperature, self.numbers = temperature, numbers
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logprob = draw(scores.float(), self.temperature, next(self.numbers))
        self.logprobs.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
