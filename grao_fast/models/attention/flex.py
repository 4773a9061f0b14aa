"""Attention over packed groups in one FlexAttention call, for CUDA.

The mask is a function of two positions in the packed row. PyTorch compiles it into its kernel,
which skips blocks of 128 x 128 pairs that are masked entirely. Grouped heads are not repeated.

Shapes: H query heads, J key/value heads, L packed tokens, d head width, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from grao_fast.data.packing import Segment
from grao_fast.kernels.devices import to_device
from grao_fast.system.errors import UserError

BLOCK = 128
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    query: Tensor,  # (1, H, L, d)
    key: Tensor,  # (1, J, L, d)
    value: Tensor,  # (1, J, L, d)
    segments: tuple[Segment, ...],
    *,
    window: int | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Attention output (1, H, L, d); every suffix attends to its group's prefix and itself.

    Raises UserError on dropout, which FlexAttention does not have.
    """
    if dropout:
        raise UserError(
            f"attention dropout is {dropout}, which FlexAttention does not have; "
            'set attention_backend="sdpa", or the dropout in the model\'s config to 0'
        )
    # Under autocast, models that normalise queries and keys leave them in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    run = _compiled() if query.is_cuda else flex_attention
    return run(
        query,
        key,
        value,
        score_mod=None if softcap is None else softcap_of(softcap, query.device),
        block_mask=block_mask(segments, window, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    """FlexAttention, compiled on the first calls, for rows of any length.

    Rows of one block of 128 tokens and longer rows are compiled apart, with and without gradients,
    a score cap or other heads; a new length compiles nothing. It is compiled as a full graph: past
    PyTorch's recompilation limit, it would otherwise fall back to eager code that materialises all
    scores.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def softcap_of(softcap: float, device: torch.device) -> Score:
    """softcap * tanh(score / softcap), one function for all layers, as the kernel contains it."""
    # A tensor, since FlexAttention's lowering refuses captured floats, which are dynamic.
    cap = torch.tensor(softcap, dtype=torch.float32, device=device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def mask_of(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> Mask:
    """The mask function: whether the token at position q sees the one at position k.

    It does if k is in the prefix of q's group or in q's own suffix, is not later than q, and is in
    the window that ends at q. The function captures tensors only: numbers would be compiled in.
    """
    owners: list[int] = []  # the number of the prefix or suffix that a token is in
    prefixes: list[int] = []  # the number of its group's prefix
    positions: list[int] = []
    number = 0
    for segment in segments:
        P, prefix = segment.prefix_length, number
        spans = [(0, P), *((P, P + length) for length in segment.suffix_lengths)]
        for first, stop in spans:
            owners += [number] * (stop - first)
            prefixes += [prefix] * (stop - first)
            positions += range(first, stop)
            number += 1
    # Not views of one tensor of three rows: PyTorch takes dimensions of one size for one dimension,
    # so what it first compiled for a table of three blocks would be for three blocks alone.
    owner_L, prefix_L, position_L = (
        to_device(torch.tensor(numbers), device) for numbers in (owners, prefixes, positions)
    )
    reach_L = torch.zeros_like(position_L) if window is None else position_L - (window - 1)

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        related = (owner_L[k] == owner_L[q]) | (owner_L[k] == prefix_L[q])
        return related & (position_L[k] <= position_L[q]) & (position_L[k] >= reach_L[q])

    return sees


@lru_cache(maxsize=16)  # the windows of a model's layers, for the few micro-batches in flight
def block_mask(
    segments: tuple[Segment, ...], window: int | None, device: torch.device
) -> BlockMask:
    """The mask and its table of blocks, shared by all layers and passes of a micro-batch."""
    sees, L = mask_of(segments, window, device), segments[-1].stop
    # PyTorch's create_block_mask materialises all L x L pairs; this, one row of blocks at a time.
    rows = [_row_of_blocks(sees, first, L, device) for first in range(0, L, BLOCK)]
    any_BB, all_BB = (torch.stack(each) for each in zip(*rows, strict=True))
    return BlockMask.from_kv_blocks(
        *_ordered(any_BB & ~all_BB),
        *_ordered(all_BB),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(L, L),
    )


def _row_of_blocks(sees: Mask, first: int, L: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two (B,) bools for the block of queries at `first`: any pair is seen; all pairs are."""
    q = torch.arange(first, first + BLOCK, device=device)[:, None]
    k = torch.arange((L + BLOCK - 1) // BLOCK * BLOCK, device=device)
    nowhere = torch.zeros((), dtype=torch.int64, device=device)
    seen = sees(nowhere, nowhere, q.clamp(max=L - 1), k.clamp(max=L - 1)) & (q < L) & (k < L)
    blocks = seen.view(BLOCK, -1, BLOCK)
    return blocks.any(2).any(0), blocks.all(2).all(0)


def _ordered(chosen_BB: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the count of chosen blocks (1, 1, B) and their order (1, 1, B, B)."""
    counts = chosen_BB.sum(1, dtype=torch.int32)
    order = chosen_BB.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], order[None, None]
