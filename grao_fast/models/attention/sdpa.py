"""Attention over packed groups in parts: prefixes, and suffixes in padded batches, by SDPA.

For CPUs, and for CUDA if FlexAttention does not support the model. Small groups of one shape are
attended together, since a call costs more than their arithmetic. Shapes: H query heads, J key/value
heads (H a multiple of J), L packed tokens, d head width, B segments, each with P tokens of a prefix
and S suffixes behind it, R tokens of the longest suffix.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_fast.data.packing import Segment
from grao_fast.kernels.devices import to_device

# The most pairs of tokens that segments attended together have; a larger one is attended alone.
_PAIRS = 2**16


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
    """Attention output (1, H, L, d); every suffix attends to its group's prefix and itself."""
    options = {"window": window, "scaling": scaling, "dropout": dropout, "softcap": softcap}
    plan = _plan(segments, query.device)
    outputs = []
    for part in plan.parts:
        prefix = [_gather(x, part.prefix_BP) for x in (query, key, value)]
        outputs.append(_flat(causal_attention(*prefix, **options)))
        suffixes = _suffixes([_gather(x, part.suffix_NR) for x in (query, key, value)], prefix)
        out = _flat(causal_attention(*suffixes, **options))
        outputs.append(out if part.live is None else out.index_select(1, part.live))
    return torch.cat(outputs, dim=1).index_select(1, plan.order_L)[None]


def _suffixes(suffix: list[Tensor], prefix: list[Tensor]) -> list[Tensor]:
    """Queries, keys and values of suffixes: each has the keys and values of its prefix before it.

    The causal mask suffices, since padding comes after the tokens of a suffix.
    """
    S = suffix[0].shape[0] // prefix[0].shape[0]
    behind = [
        torch.cat([before[:, None].expand(-1, S, -1, -1, -1).flatten(0, 1), own], dim=2)
        for before, own in zip(prefix[1:], suffix[1:], strict=True)
    ]
    return [suffix[0], *behind]


def _gather(x: Tensor, place_NR: Tensor) -> Tensor:
    """(N, heads, R, d) of x (1, heads, L, d)."""
    return x[0].index_select(1, place_NR.flatten()).unflatten(1, place_NR.shape).transpose(0, 1)


def _flat(out: Tensor) -> Tensor:
    """(H, N * R, d) of out (N, H, R, d)."""
    return out.transpose(0, 1).flatten(1, 2)


class _Part(NamedTuple):
    """Places in the packed row of segments that are attended together, with N = B * S suffixes.

    prefix_BP, suffix_NR: a suffix is padded by its last token.
    live: places of the suffixes' own tokens in suffix_NR; None: there is no padding.
    """

    prefix_BP: Tensor
    suffix_NR: Tensor
    live: Tensor | None


class _Plan(NamedTuple):
    """order_L: where the output of each packed token is; a part's prefixes come before suffixes."""

    parts: list[_Part]
    order_L: Tensor


@lru_cache(maxsize=16)  # the few micro-batches in flight, for the layers and passes of a model
def _plan(segments: tuple[Segment, ...], device: torch.device) -> _Plan:
    parts, places = [], []
    for own in _alike(segments):
        start_B = torch.tensor([segment.start for segment in own])
        length_BS = torch.tensor([segment.suffix_lengths for segment in own])
        P, R = own[0].prefix_length, int(length_BS.max())
        prefix_BP = start_B[:, None] + torch.arange(P)
        start_BS = start_B[:, None] + P + length_BS.cumsum(1) - length_BS
        length_N1, place_R = length_BS.flatten()[:, None], torch.arange(R)
        suffix_NR = start_BS.flatten()[:, None] + place_R.minimum(length_N1 - 1)
        live_NR = place_R < length_N1
        live = None if bool(live_NR.all()) else live_NR.flatten().nonzero().flatten()
        places += [prefix_BP.flatten(), suffix_NR[live_NR]]
        parts.append(
            _Part(
                to_device(prefix_BP, device),
                to_device(suffix_NR, device),
                None if live is None else to_device(live, device),
            )
        )
    return _Plan(parts, to_device(torch.cat(places).argsort(), device))


def _alike(segments: tuple[Segment, ...]) -> Iterator[list[Segment]]:
    """Segments of one P, S and R, so many that their pairs of tokens are at most _PAIRS."""
    kinds: dict[tuple[int, int, int], list[Segment]] = {}
    for segment in segments:
        lengths = segment.suffix_lengths
        kinds.setdefault((segment.prefix_length, len(lengths), max(lengths)), []).append(segment)
    for (P, S, R), own in kinds.items():
        count = max(1, _PAIRS // (S * R * (P + R)))
        for first in range(0, len(own), count):
            yield own[first : first + count]


def _causal_mask(Q: int, K: int, window: int | None, device: torch.device) -> Tensor:
    """(Q, K) bool: the last Q of K positions see themselves and the window - 1 before them."""
    distance = torch.arange(K - Q, K, device=device)[:, None] - torch.arange(K, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def causal_attention(
    q: Tensor,  # (S, H, Q, d), the last Q of K positions
    k: Tensor,  # (S, J, K, d)
    v: Tensor,  # (S, J, K, d)
    *,
    window: int | None,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """Causal attention, (S, H, Q, d)."""
    Q, K = q.shape[2], k.shape[2]
    if Q == K and window is None and softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
    mask = _causal_mask(Q, K, window, q.device)
    # Heads are repeated, since PyTorch's fused CUDA kernels take no grouped heads with a mask.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v
