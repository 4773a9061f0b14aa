"""Attention over packed groups: every suffix sees its group's prefix and itself.

    out_q = sum_k softmax_k(q . k * scaling) v_k

over the k of the prefix and of its own suffix whose position is at most that of q.

Registered with Transformers as "grao_shared_prefix", so that stock models run it: the keyword
argument `segments` of the model's forward reaches `shared_prefix_attention` in every layer.

Shapes: H query heads, J key/value heads (H a multiple of J), L packed tokens, d head width,
S suffixes of a group, R tokens of the longest of them, P tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from grao_fast.batch import Segment

SHARED_PREFIX = "grao_shared_prefix"
_NOT_PASSED: Any = object()
_WINDOWS = ("sliding_window", "attention_chunk_size")


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, d)
    key: Tensor,  # (1, J, L, d)
    value: Tensor,  # (1, J, L, d)
    attention_mask: Tensor | None,
    *,
    segments: Sequence[Segment],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _NOT_PASSED,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,  # Transformers hands every attention function all that the model was called with
) -> tuple[Tensor, None]:
    """Transformers' attention signature; returns (1, L, H, d) and no weights."""
    for name, given in (("attention sinks", s_aux), ("a position bias", position_bias)):
        if given is not None:
            raise ValueError(
                f"{type(module).__name__} uses {name}, which a shared prefix cannot serve; "
                "set share_prefix=False"
            )
    if sliding_window is _NOT_PASSED:
        sliding_window = None
        _refuse_window_of_mask(module)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap}
    outputs = []
    for segment in segments:
        q, k, v = (x[:, :, segment.start : segment.stop] for x in (query, key, value))
        P = segment.prefix_length
        prefix = (x[:, :, :P] for x in (q, k, v))
        outputs.append(_attend(*prefix, window=sliding_window, **options)[0])
        outputs += _suffixes(q, k, v, segment, sliding_window, options)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None], None


def _refuse_window_of_mask(module: nn.Module) -> None:
    """A model that keeps its window to its mask would lose it here, where there is no mask."""
    for name in _WINDOWS:
        window = getattr(getattr(module, "config", None), name, None)
        if window is not None:
            raise ValueError(
                f"{type(module).__name__} applies {name}={window} through its mask alone, which a "
                "shared prefix does not use; set share_prefix=False"
            )


def _suffixes(
    q: Tensor, k: Tensor, v: Tensor, segment: Segment, window: int | None, options: dict[str, Any]
) -> list[Tensor]:
    """All suffixes of a segment as one right-padded batch: S tensors of (H, length, d).

    The causal mask is the whole mask: the padding of a short suffix stands behind its tokens.
    """
    P, lengths = segment.prefix_length, segment.suffix_lengths
    R = max(lengths)

    def padded(x: Tensor, *, with_prefix: bool) -> Tensor:
        parts = x[0, :, P:].split(lengths, dim=1)
        suffixes = torch.stack([F.pad(part, (0, 0, 0, R - part.shape[1])) for part in parts])
        if not with_prefix:
            return suffixes
        return torch.cat([x[:, :, :P].expand(len(lengths), -1, -1, -1), suffixes], dim=2)

    out = _attend(
        padded(q, with_prefix=False),
        padded(k, with_prefix=True),
        padded(v, with_prefix=True),
        window=window,
        **options,
    )
    return [out[s, :, :length] for s, length in enumerate(lengths)]


def _causal_mask(Q: int, K: int, window: int | None, device: torch.device) -> Tensor:
    """(Q, K) bool: the last Q of K positions see themselves and the window - 1 before them."""
    distance = torch.arange(K - Q, K, device=device)[:, None] - torch.arange(K, device=device)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def _attend(
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
    # heads repeated here: with a mask, PyTorch's fused CUDA kernels take no grouped heads
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, lambda **unused: None)


@contextmanager
def shared_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` on packed groups inside.

    Backward passes belong inside too: they run checkpointed layers again.
    """
    stock = model.config._attn_implementation
    model.set_attn_implementation(SHARED_PREFIX)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
