"""Attention over packed groups in parts: prefixes, and suffixes in padded batches, by SDPA.

For CPUs, and for CUDA if FlexAttention does not support the model. Shapes: H query heads, J
key/value heads (H a multiple of J), L packed tokens, d head width, S suffixes of a group, R tokens
of the longest of them, P tokens of the prefix.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_fast.data.packing import Segment


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
    outputs = []
    for segment in segments:
        q, k, v = (x[:, :, segment.start : segment.stop] for x in (query, key, value))
        P = segment.prefix_length
        prefix = (x[:, :, :P] for x in (q, k, v))
        outputs.append(causal_attention(*prefix, **options)[0])
        outputs += _suffixes(q, k, v, segment, options)
    return torch.cat(outputs, dim=1)[None]


def _suffixes(
    q: Tensor, k: Tensor, v: Tensor, segment: Segment, options: dict[str, Any]
) -> list[Tensor]:
    """Attend for all suffixes of a segment in one right-padded batch: S tensors (H, length, d).

    The causal mask suffices, since padding comes after the tokens of a suffix.
    """
    P, lengths = segment.prefix_length, segment.suffix_lengths
    R = max(lengths)

    def padded(x: Tensor, *, with_prefix: bool) -> Tensor:
        parts = x[0, :, P:].split(lengths, dim=1)
        suffixes = torch.stack([F.pad(part, (0, 0, 0, R - part.shape[1])) for part in parts])
        if not with_prefix:
            return suffixes
        return torch.cat([x[:, :, :P].expand(len(lengths), -1, -1, -1), suffixes], dim=2)

    out = causal_attention(
        padded(q, with_prefix=False),
        padded(k, with_prefix=True),
        padded(v, with_prefix=True),
        **options,
    )
    return [out[s, :, :length] for s, length in enumerate(lengths)]


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
