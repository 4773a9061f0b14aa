"""Sampling with a Transformers model: one prefill per prompt, finished rows dropped.

`generate` prefills a prompt once for every sample and decodes until the last row has ended. Here
the prompt is prefilled once, its key/value cache is repeated for the G samples, and finished rows
leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from grao_fast.models.sharding import own_class
from grao_fast.sampling import OnGroup
from grao_fast.sampling.cache import GrowingLayer, cache_name, drop_rows, growing_cache
from grao_fast.sampling.drawing import completions_of, draw
from grao_fast.sampling.model_sampler import Decoding, ModelSampler
from grao_fast.sampling.seeds import uniform_numbers
from grao_fast.system.errors import UserError

# Static caches have lengths that are multiples of this, since each length is compiled separately.
_STATIC_BLOCK = 256
# The most pairs of tokens that attend to each other at once in a prefill with a mask.
_PAIRS = 2**25


class TransformersSampler(ModelSampler):
    """A `Sampler` over a model whose cache holds keys and values only.

    Args:
        static_cache: decode in a cache of fixed size, in which ended rows stay; on CUDA a step is
            then compiled to CUDA graphs, as Transformers' own `generate` does it. That was not run
            yet: no GPU was at hand.
    """

    def __init__(
        self, model: PreTrainedModel, decoding: Decoding, *, static_cache: bool = False
    ) -> None:
        super().__init__(model, decoding)
        self.static_cache = static_cache
        self._cache_name = cache_name(model)
        self._static: StaticCache | None = None  # kept, since CUDA graphs refer to its memory
        self._static_shape: tuple[int, int] | None = None

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
        cache = growing_cache(self.model.config)
        logits, mask = self._prefill(prompts, cache)
        cache.batch_repeat_interleave(num_generations)
        logits, mask = (x.repeat_interleave(num_generations, 0) for x in (logits, mask))
        position = mask.sum(1, keepdim=True)
        decode, cache, mask = self._decoder(cache, mask, max_new_tokens)
        rows = torch.arange(logits.shape[0], device=logits.device)  # still in the batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        tokens = torch.full((len(rows), max_new_tokens), self.pad_token_id, device=rows.device)
        logprobs = torch.zeros((len(rows), max_new_tokens), dtype=torch.float32, device=rows.device)
        lengths = torch.zeros_like(rows)
        finished = torch.zeros_like(ended)
        name = own_class(self.model).__name__

        def report(group: int) -> None:
            own = slice(group * num_generations, (group + 1) * num_generations)
            columns = tokens[own], logprobs[own], lengths[own], finished[own]
            whole(group, completions_of(*columns, model=name))

        over_groups = _OverGroups(len(prompts), num_generations)
        # One for every original row, so that a row's draws do not depend on when others end.
        numbers = uniform_numbers(seeds, num_generations, rows.device)
        for step, u in zip(range(max_new_tokens), numbers, strict=False):
            token, logprob = draw(logits, temperature, u[rows])
            tokens[rows, step] = torch.where(ended, self.pad_token_id, token)
            logprobs[rows, step] = torch.where(ended, 0.0, logprob)
            lengths[rows] += ~ended
            ended |= torch.isin(token, self.eos_ids)
            finished[rows] = ended
            over = ended.cpu()  # the only device sync in a step
            last = step + 1 == max_new_tokens or bool(over.all())
            for group in over_groups.left() if last else over_groups.ended(over):
                report(group)
            if last:
                break
            if not self.static_cache:
                if over.any():
                    left = drop_rows(cache, over)
                    over_groups.keep(left.cpu())
                    rows, token, mask, ended = rows[left], token[left], mask[left], ended[left]
                    position = position[left]
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = self._forward(decode, token[:, None], mask, position, cache)
            position = position + 1

    def _prefill(self, prompts: list[list[int]], cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Last logits (B, V) and attention mask (B, P) of left-padded prompts."""
        P = max(len(prompt) for prompt in prompts)
        device = self.model.device
        ids = torch.tensor([[self.pad_token_id] * (P - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        first = 0
        for last in self._parts(mask):  # a part attends to the cache of those before it
            logits = self._forward(
                self.model, ids[:, first:last], mask[:, :last], positions[:, first:last], cache
            )
            first = last
        return logits, mask

    def _parts(self, mask: Tensor) -> list[int]:
        """Where the parts end in which prompts are prefilled, by their attention mask (B, P).

        Attention with a mask keeps one or more tensors of all B x P x P pairs. SDPA needs none for
        prompts of one length that each see all of themselves.
        """
        B, P = mask.shape
        config = self.model.config.get_text_config()
        whole = (
            config._attn_implementation == "sdpa"
            and getattr(config, "sliding_window", None) is None
            and bool(mask.all())
        )
        length = P if whole else max(1, _PAIRS // (B * P))
        return [*range(length, P, length), P]

    def _decoder(
        self, cache: DynamicCache, mask: Tensor, max_new_tokens: int
    ) -> tuple[Callable[..., Any], Cache, Tensor]:
        """The function that runs a decoding step, its cache and its mask."""
        if not self.static_cache:
            return self.model, cache, mask
        if any(type(layer) is not GrowingLayer for layer in cache.layers):
            raise UserError(
                f"{own_class(self.model).__name__} has layers that do not attend to all tokens, "
                "which a cache of fixed size is not made for here: set "
                'cache_implementation="dynamic"'
            )
        B, P = mask.shape
        length = -(-(P + max_new_tokens) // _STATIC_BLOCK) * _STATIC_BLOCK
        if self._static is None or self._static_shape != (B, length):
            self._static = StaticCache(config=self.model.config, max_cache_len=length)
            self._static_shape = (B, length)
        self._static.reset()
        for i, layer in enumerate(cache.layers):
            self._static.update(layer.keys, layer.values, i)
        # Positions not yet filled are unmasked, since causality already hides them.
        mask = torch.cat([mask, mask.new_ones(B, length - P)], dim=1)
        on_cuda = self.model.device.type == "cuda"
        step = self.model.get_compiled_call(CompileConfig()) if on_cuda else self.model
        return step, self._static, mask

    def _forward(
        self,
        step: Callable[..., Any],
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Cache,
    ) -> Tensor:
        """Logits (B, V) in float32 for the token after the last of `ids`."""
        output = step(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: cache},
        )
        return output.logits[:, -1].float()


class _OverGroups:
    """Which prompts of a batch have no row left that decodes, each told once.

    Rows are those still in the batch, in its order; G of them belong to each prompt at first.
    """

    def __init__(self, prompts: int, G: int) -> None:
        self._group_of_row = torch.arange(prompts).repeat_interleave(G)
        self._untold = set(range(prompts))

    def ended(self, over: Tensor) -> list[int]:
        """Prompts of which all rows are over now; over: (B,) on the CPU, of the rows."""
        if not over.any():
            return []
        running = set(self._group_of_row[~over].tolist())
        found = sorted(self._untold - running)
        self._untold &= running
        return found

    def keep(self, rows: Tensor) -> None:
        """Take over the rows that stay in the batch."""
        self._group_of_row = self._group_of_row[rows]

    def left(self) -> list[int]:
        """All prompts that have not been told."""
        return sorted(self._untold)
