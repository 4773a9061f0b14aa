"""Attention over packed groups in one call of variable-length attention.

A prefix, and each suffix, is a sequence of queries. The keys and values that it may see are
gathered from root to leaf: those of the prefix alone, or [prefix ; suffix]. A sequence's queries
are the last of its keys, so a causal mask aligned at the bottom right is the whole mask, and a
window counts positions. Every suffix has all of its keys: no parts are merged, and no log-sum-exp
is needed.

Queries stay where they are. Of a prefix, S suffixes copy the keys and values S times, or under a
window its last `window - 1` tokens alone.

Shapes: H query heads, J key/value heads, L packed tokens, K gathered tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grao_fast.data.packing import Segment
from grao_fast.kernels.devices import to_device
from grao_fast.models.attention.varlen_kernels import Sequences, attend_sequences
from grao_fast.system.errors import UserError


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

    Raises UserError on dropout.
    """
    if dropout:
        raise UserError(
            f"attention dropout is {dropout}, which variable-length attention is not given; "
            'set attention_backend="sdpa", or the dropout in the model\'s config to 0'
        )
    # Under autocast, models that normalise queries and keys leave them in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    plan = plan_of(segments, window, query.device)
    q_LHd, k_LJd, v_LJd = (x[0].transpose(0, 1) for x in (query, key, value))
    out_LHd = attend_sequences(
        q_LHd,
        gather(k_LJd, plan),
        gather(v_LJd, plan),
        plan.sequences,
        window=window,
        scaling=scaling,
        softcap=softcap,
    )
    return out_LHd.transpose(0, 1)[None]


@dataclass(frozen=True, eq=False)
class Plan:
    """The keys that each sequence of queries is given, and where they come from.

    place_K: int64, the packed token that each gathered one copies.
    copies: for the gradient, int64 indices of gathered tokens: for each number of copies that
        packed tokens have, a row of that many for every such token.
    turn_L: int64, the place of each packed token in the order of those rows.
    """

    sequences: Sequences
    place_K: Tensor
    copies: tuple[Tensor, ...]
    turn_L: Tensor


@lru_cache(maxsize=16)  # the windows of a model's layers, for the few micro-batches in flight
def plan_of(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> Plan:
    """The plan of a micro-batch, shared by its layers of one window and by all passes."""
    lengths_q: list[int] = []
    lengths_k: list[int] = []
    places: list[Tensor] = []
    for segment in segments:
        P, first = segment.prefix_length, segment.start + segment.prefix_length
        prefix = torch.arange(segment.start, first)
        seen = P if window is None else min(P, window - 1)
        lengths_q.append(P)
        lengths_k.append(P)
        places.append(prefix)
        for length in filter(None, segment.suffix_lengths):
            lengths_q.append(length)
            lengths_k.append(seen + length)
            places += [prefix[P - seen :], torch.arange(first, first + length)]
            first += length
    place_K = torch.cat(places)
    copies, turn_L = _copies(place_K)
    return Plan(
        sequences=Sequences.of(lengths_q, lengths_k, device),
        place_K=to_device(place_K, device),
        copies=tuple(to_device(rows, device) for rows in copies),
        turn_L=to_device(turn_L, device),
    )


def _copies(place_K: Tensor) -> tuple[list[Tensor], Tensor]:
    """`Plan.copies` and `Plan.turn_L`; every packed token has a copy."""
    count_L = place_K.bincount()
    by_token_K = place_K.argsort(stable=True)
    first_L = count_L.cumsum(0) - count_L  # of a token's copies in that order
    copies, tokens = [], []
    for count in count_L.unique().tolist():
        tokens.append((count_L == count).nonzero()[:, 0])
        copies.append(by_token_K[first_L[tokens[-1], None] + torch.arange(count)])
    return copies, torch.cat(tokens).argsort()


def gather(x_LJd: Tensor, plan: Plan) -> Tensor:
    """Keys or values as the sequences of a plan are given them, (K, J, d)."""
    return _Gather.apply(x_LJd, plan)


class _Gather(torch.autograd.Function):
    """index_select, whose gradient sums the copies of each token in a fixed order.

    PyTorch's own gradient is index_add, which on CUDA adds in any order and rounds every sum to the
    gradient's dtype. Here a token's copies are selected side by side and reduced by `sum`, which
    accumulates in float32 and rounds once.
    """

    @staticmethod
    def forward(ctx: Any, x_LJd: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_LJd.index_select(0, plan.place_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KJd: Tensor) -> tuple[Tensor, None]:
        plan, row = ctx.plan, grad_KJd.shape[1:]
        total_LJd = grad_KJd.new_empty(len(plan.turn_L), *row)
        parts = total_LJd.split([len(places) for places in plan.copies])
        for part, places in zip(parts, plan.copies, strict=True):
            if places.shape[1] == 1:
                torch.index_select(grad_KJd, 0, places[:, 0], out=part)
            else:
                copies = grad_KJd.index_select(0, places.flatten()).view(*places.shape, *row)
                torch.sum(copies, dim=1, out=part)
        return total_LJd.index_select(0, plan.turn_L), None
