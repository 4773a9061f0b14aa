"""Packed groups and their attention from the definition, with dense masks."""

from __future__ import annotations

import torch
from torch import Tensor

from grao_fast.data.packing import Segment

SEGMENTS = (Segment(0, 150, (140, 7)), Segment(297, 3, (1, 130, 64)), Segment(495, 1, (2,)))


def seen_pairs(window: int | None, segments: tuple[Segment, ...] = SEGMENTS) -> Tensor:
    """(L, L) bool mask, built segment by segment from the definition."""
    L = segments[-1].stop
    seen = torch.zeros(L, L, dtype=torch.bool)
    for segment in segments:
        P, start = segment.prefix_length, segment.start
        first = start + P
        for length in (0, *segment.suffix_lengths):
            places = [*range(start, start + P), *range(first, first + length)]
            for position, q in enumerate(places):
                low = 0 if window is None else max(0, position - window + 1)
                seen[q, places[low : position + 1]] = True
            first += length
    return seen


def dense_attention(
    q: Tensor,  # (H, Q, d)
    k: Tensor,  # (J, K, d)
    v: Tensor,  # (J, K, d)
    seen: Tensor,  # (Q, K)
    *,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """softmax of the scores that are seen, times the values: (H, Q, d)."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    scores = q @ k.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
