"""Attention over packed groups: every suffix sees its group's prefix and itself.

    out_q = sum_k softmax_k(q . k * scaling) v_k

over the k of the prefix and of its own suffix whose position is at most that of q.

Registered with Transformers as "grao_parts", "grao_flex" and "grao_varlen", so that stock models
run it: the keyword argument `segments` of the model's forward reaches `packed_attention` in every
layer. The three backends, `attend` of `sdpa`, `flex` and `varlen`, have one signature and compute
the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from grao_fast.data.packing import Segment
from grao_fast.models.attention import flex, sdpa, varlen, varlen_kernels
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_NOT_PASSED: Any = object()
_WINDOWS = ("sliding_window", "attention_chunk_size")
_DROPOUTS = ("attention_dropout", "attn_pdrop")
_NARROWEST_HEAD = 16  # the least that FlexAttention's CUDA lowering accepts (torch 2.11, 2.13)


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, L, d)
    key: Tensor,  # (1, J, L, d)
    value: Tensor,  # (1, J, L, d)
    attention_mask: Tensor | None,
    *,
    attend: Callable[..., Tensor],
    segments: tuple[Segment, ...],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _NOT_PASSED,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **unused: Any,  # Transformers passes all keyword arguments of the model to every attention
) -> tuple[Tensor, None]:
    """Attention with Transformers' signature; returns the output (1, L, H, d) and no weights."""
    for name, given in (("attention sinks", s_aux), ("a position bias", position_bias)):
        if given is not None:
            raise UserError(
                f"{type(module).__name__} uses {name}, which a shared prefix cannot serve; "
                "set share_prefix=False"
            )
    if sliding_window is _NOT_PASSED:
        sliding_window = None
        _refuse_window_of_mask(module)
    out = attend(
        query,
        key,
        value,
        segments,
        window=sliding_window,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        softcap=softcap,
    )
    return out.transpose(1, 2), None


def _refuse_window_of_mask(module: nn.Module) -> None:
    """Refuse a model whose sliding window is in its mask alone, which packed rows do not use."""
    for name in _WINDOWS:
        window = getattr(getattr(module, "config", None), name, None)
        if window is not None:
            raise UserError(
                f"{type(module).__name__} applies {name}={window} through its mask alone, which a "
                "shared prefix does not use; set share_prefix=False"
            )


# Transformers treats names that contain "sdpa", "flash" or "flex_attention" specially.
for _name, _backend in (("grao_parts", sdpa), ("grao_flex", flex), ("grao_varlen", varlen)):
    AttentionInterface.register(_name, partial(packed_attention, attend=_backend.attend))
    AttentionMaskInterface.register(_name, lambda **unused: None)


def keep_score_cap(causal_lm: PreTrainedModel) -> None:
    """Use eager attention if scores are capped: SDPA drops the cap (Gemma 2 before 5.21)."""
    cap = getattr(causal_lm.config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and causal_lm.config._attn_implementation == "sdpa":
        logger.info("eager attention, not SDPA, which would drop attn_logit_softcapping=%s", cap)
        causal_lm.set_attn_implementation("eager")


def choose_attention(
    causal_lm: PreTrainedModel,
    device: torch.device,
    *,
    backend: str,
    share_prefix: bool,
    recompute: bool,
    dtype: torch.dtype,
) -> str | None:
    """The name of the attention that updates run; None: the one that the model was loaded with.

    Args:
        backend: "sdpa", "flex", "varlen", "flash_attention_2", or "auto": with a shared prefix
            FlexAttention on CUDA and SDPA elsewhere, and without one the model's own.
        recompute: whether the backward pass recomputes layers.
        dtype: in which attention computes.

    Raises:
        ValueError: the backend cannot serve this model, device or layout.
    """
    if not share_prefix:
        return _unshared(causal_lm, device, backend)
    if backend == "flash_attention_2":
        raise UserError(
            'attention_backend="flash_attention_2" serves rows that repeat their prompts, and '
            'share_prefix is True; use "varlen", which gives shared prompts to flash-attn, or set '
            "share_prefix=False"
        )
    if backend == "varlen":
        if why_not := _why_not_varlen(causal_lm, device, dtype):
            raise UserError(f'attention_backend="varlen": {why_not}; use "sdpa" or "auto"')
        logger.info("variable-length attention: the kernel is %s", varlen_kernels.kernel_name())
        return "grao_varlen"
    why_not = _why_not_flex(causal_lm, device, recompute=recompute)
    if backend == "flex" and why_not:
        raise UserError(f'attention_backend="flex": {why_not}; use "sdpa" or "auto"')
    if backend == "auto" and why_not and device.type == "cuda":
        logger.info("attention in SDPA's parts, not FlexAttention: %s", why_not)
    return "grao_parts" if backend == "sdpa" or why_not else "grao_flex"


def head_width(config: Any) -> int:
    """Head dimension of a Transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _why_not_flex(
    causal_lm: PreTrainedModel, device: torch.device, *, recompute: bool
) -> str | None:
    if device.type != "cuda":
        return f"FlexAttention has no gradients on device {str(device)!r}"
    config = causal_lm.config.get_text_config()
    if dropout := _dropout(config):
        return f"{dropout}, and FlexAttention has no dropout"
    if recompute and getattr(config, "attn_logit_softcapping", None) is not None:
        # PyTorch traces the cap's derivative in each forward pass, and the tensors which that saves
        # shift the order of the recomputed ones: gradients are NaN, without an error (torch 2.13).
        return (
            "its cap on scores gives wrong gradients in recomputed layers (gradient_checkpointing)"
        )
    width = head_width(config)
    if width < _NARROWEST_HEAD:
        return f"heads are {width} wide, and FlexAttention's kernels take {_NARROWEST_HEAD} or more"
    return None


def _why_not_varlen(
    causal_lm: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> str | None:
    if device.type != "cuda":
        return f"variable-length attention needs CUDA, and this run is on device {str(device)!r}"
    config = causal_lm.config.get_text_config()
    if dropout := _dropout(config):
        return f"{dropout}, and variable-length attention is not given any"
    cap = getattr(config, "attn_logit_softcapping", None)
    return varlen_kernels.why_not(head_width(config), dtype, cap)


def _dropout(config: Any) -> str | None:
    """The dropout of attention in a config, by name; None where there is none."""
    found = ((name, getattr(config, name, 0.0)) for name in _DROPOUTS)
    return next((f"{name}={value}" for name, value in found if value), None)


def _unshared(causal_lm: PreTrainedModel, device: torch.device, backend: str) -> str | None:
    if backend in ("flex", "varlen"):
        raise UserError(
            f'attention_backend="{backend}" serves a shared prefix, and share_prefix is False; '
            'use "auto", "sdpa" or "flash_attention_2"'
        )
    if backend == "auto":
        return None
    if backend == "flash_attention_2" and device.type != "cuda":
        logger.info("flash_attention_2 is off: it needs CUDA, and this run is on %s", device)
        return None
    try:
        with attending(causal_lm, backend):
            return backend
    except (ImportError, ValueError) as error:
        raise UserError(
            f'attention_backend="{backend}" cannot serve {type(causal_lm).__name__}: {error}; '
            'pip install "grao-fast[flash]" for flash-attn, or use "auto"'
        ) from error


@contextmanager
def attending(model: PreTrainedModel, attention: str | None) -> Iterator[None]:
    """Run `model` with an attention of `choose_attention` in the block.

    Backward passes belong in the block too, since they recompute checkpointed layers.
    """
    stock = model.config._attn_implementation
    model.set_attn_implementation(attention or stock)
    try:
        yield
    finally:
        model.set_attn_implementation(stock)
