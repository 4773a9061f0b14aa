"""Sampling with a Transformers model: one prefill a prompt, finished rows dropped.

`generate` prefills a prompt once for every sample and decodes until the last row has ended. Here
the prompt is prefilled once, its key/value cache is repeated for the G samples, and rows that have
ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from grao_fast.rollout import Completion
from grao_fast.rollout.cache import GrowingLayer, drop_rows, growing_cache
from grao_fast.router import no_router_loss

if TYPE_CHECKING:
    from grao_fast.policy import Policy

# Tokens whose probabilities are summed before one of them is drawn: about the vocabulary's root,
# and a divisor of most vocabularies, which then need no padding.
_BLOCK = 128
# Lengths of static caches are multiples of this: every new one is compiled anew.
_STATIC_BLOCK = 256


class TransformersSampler:
    """A `Sampler` over a causal language model of Transformers.

    Args:
        model: a causal language model whose cache is a `DynamicCache`.
        eos_token_ids: tokens that end a completion.
        pad_token_id: fills the left of short prompts in a batch; never attended to.
        batch_size: sequences decoded at once; at least one prompt's group.
        dtype: autocast to this dtype (bfloat16 on CUDA); None computes in the model's own.
        static_cache: decode in a cache of fixed size, in which ended rows stay; on CUDA a step is
            then compiled to CUDA graphs, as Transformers' own `generate` does it. That was not run
            yet: no GPU was at hand.
    """

    context_length: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Iterable[int],
        pad_token_id: int,
        batch_size: int,
        dtype: torch.dtype | None = None,
        static_cache: bool = False,
    ) -> None:
        self.model = model
        self.eos_ids = torch.tensor(sorted(eos_token_ids), device=model.device)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.dtype = dtype
        self.static_cache = static_cache
        self._static: StaticCache | None = None  # kept, as CUDA graphs hold on to its memory
        self._static_shape: tuple[int, int] | None = None

    def sync(self, policy: Policy) -> None:
        """Nothing to do: it samples from the very weights that are trained."""

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        """See `Sampler.sample`. Prompts are batched by length, the longest first."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        prompts_per_batch = max(1, self.batch_size // num_generations)
        groups: list[list[Completion]] = [[] for _ in prompts]
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(prompts), prompts_per_batch):
                chosen = longest_first[start : start + prompts_per_batch]
                autocast = torch.autocast(
                    self.model.device.type, dtype=self.dtype, enabled=self.dtype is not None
                )
                with autocast, no_router_loss(self.model):
                    completions = self._decode(
                        [prompts[i] for i in chosen],
                        num_generations,
                        max_new_tokens,
                        temperature,
                        generator,
                    )
                for place, i in enumerate(chosen):
                    first = place * num_generations
                    groups[i] = completions[first : first + num_generations]
        finally:
            self.model.train(training)
        return groups

    def _decode(
        self,
        prompts: list[list[int]],
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
    ) -> list[Completion]:
        """Completions of a batch of prompts, each prompt's one behind the other."""
        cache = growing_cache(self.model.config)
        logits, mask = self._prefill(prompts, cache)
        cache.batch_repeat_interleave(num_generations)
        logits, mask = (x.repeat_interleave(num_generations, 0) for x in (logits, mask))
        position = mask.sum(1, keepdim=True)
        decode, cache, mask = self._decoder(cache, mask, max_new_tokens)
        rows = torch.arange(logits.shape[0], device=logits.device)  # who is still in the batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        tokens = torch.full((len(rows), max_new_tokens), self.pad_token_id, device=rows.device)
        logprobs = torch.zeros((len(rows), max_new_tokens), device=rows.device)
        lengths = torch.zeros_like(rows)
        finished = torch.zeros_like(ended)
        for step in range(max_new_tokens):
            # of every row that there was: what one draws does not depend on when others end
            u = torch.rand(
                len(tokens), 1, dtype=torch.float64, device=rows.device, generator=generator
            )
            token, logprob = _draw(logits, temperature, u[rows])
            tokens[rows, step] = torch.where(ended, self.pad_token_id, token)
            logprobs[rows, step] = torch.where(ended, 0.0, logprob)
            lengths[rows] += ~ended
            ended |= torch.isin(token, self.eos_ids)
            finished[rows] = ended
            over = ended.cpu()  # the one wait for the device in a step
            if step + 1 == max_new_tokens or bool(over.all()):
                break
            if not self.static_cache:
                if over.any():
                    left = drop_rows(cache, over)
                    rows, token, mask, ended = rows[left], token[left], mask[left], ended[left]
                    position = position[left]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = _forward(decode, token[:, None], mask, position, cache)
            position = position + 1
        if bool(logprobs.isnan().any()):
            raise FloatingPointError(
                f"{type(self.model).__name__} gives logits that are NaN or infinite: its weights "
                "may be broken, or have diverged under a learning_rate that is too high"
            )
        return _completions(tokens, logprobs, lengths, finished)

    def _prefill(self, prompts: list[list[int]], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Last logits (B, V) and attention mask (B, P) of left-padded prompts."""
        P = max(len(prompt) for prompt in prompts)
        device = self.model.device
        ids = torch.tensor([[self.pad_token_id] * (P - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return _forward(self.model, ids, mask, positions, cache), mask

    def _decoder(
        self, cache: DynamicCache, mask: Tensor, max_new_tokens: int
    ) -> tuple[Callable[..., Any], Cache, Tensor]:
        """What runs a step, in which cache, under which mask."""
        if not self.static_cache:
            return self.model, cache, mask
        if any(type(layer) is not GrowingLayer for layer in cache.layers):
            raise ValueError(
                f"{type(self.model).__name__} has layers that do not attend to all tokens, which "
                'a cache of fixed size is not made for here: set cache_implementation="dynamic"'
            )
        B, P = mask.shape
        length = -(-(P + max_new_tokens) // _STATIC_BLOCK) * _STATIC_BLOCK
        if self._static is None or self._static_shape != (B, length):
            self._static = StaticCache(config=self.model.config, max_cache_len=length)
            self._static_shape = (B, length)
        self._static.reset()
        for i, layer in enumerate(cache.layers):
            self._static.update(layer.keys, layer.values, i)
        # all places to come are open: causality alone hides those that are not filled yet
        mask = torch.cat([mask, mask.new_ones(B, length - P)], dim=1)
        on_cuda = self.model.device.type == "cuda"
        step = self.model.get_compiled_call(CompileConfig()) if on_cuda else self.model
        return step, self._static, mask


def _forward(
    model: Callable[..., Any], ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
) -> Tensor:
    """Logits (B, V) in float32 behind the last of `ids`."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """A token of every row and its log-prob under the distribution it was drawn from.

    Args:
        logits: (B, V) float32.
        u: (B, 1) float64, uniform in [0, 1).
    """
    p = (logits / temperature if temperature > 0 else logits).softmax(-1)
    token = _invert(p, u) if temperature > 0 else logits.argmax(-1, keepdim=True)
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """The token of every row, (B, 1), at which its distribution function reaches 1 - u.

    First the block of `_BLOCK` tokens, then the token in it: `torch.multinomial` draws a random
    number for every token of the vocabulary, and one sum over all of it had to be held in float64,
    as in float32 it would round rare tokens away. A token of probability 0 is never drawn; a row of
    NaN gives some token.
    """
    V = p.shape[1]
    blocks = (F.pad(p, (0, -V % _BLOCK)) if V % _BLOCK else p).unflatten(1, (-1, _BLOCK))
    mass = blocks.sum(-1).double()
    cdf = mass.cumsum(-1)
    point = (1 - u) * cdf[:, -1:]
    block = torch.searchsorted(cdf, point).clamp(max=mass.shape[1] - 1)
    before = F.pad(cdf, (1, 0)).gather(1, block)
    share = ((point - before) / mass.gather(1, block)).clamp(max=1)  # 0 < share, of the block
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
    within = torch.searchsorted(inside, share * inside[:, -1:])
    return (block * _BLOCK + within).clamp(max=V - 1)


def _completions(
    tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor
) -> list[Completion]:
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    return [
        Completion(token_ids=ids[:length], logprobs=logps[:length], finished=done)
        for ids, logps, length, done in rows
    ]
