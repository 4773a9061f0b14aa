"""Variable-length attention: flash-attn's on CUDA, or else PyTorch's own; and SDPA on a CPU.

The queries of a sequence are the last of its keys. The CUDA kernels compute in 16 bits, with
grouped heads; a causal mask is aligned at the bottom right (in flash-attn from 2.1 on), and so is a
window. PyTorch's own has no cap on scores, and takes heads whose width is a multiple of 8.

Shapes: H query heads, J key/value heads, L queries, K keys of all sequences, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grao_fast.kernels.devices import to_device
from grao_fast.models.attention import sdpa

_WIDEST_HEAD = 256
# What the functions must know. Others are of releases that cannot serve: flash-attn before 2.6,
# PyTorch's before windows and grouped heads.
_OF_FLASH_ATTN = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
_OF_PYTORCH = {"scale", "window_size", "enable_gqa"}


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where sequences begin among all queries and all keys.

    first_q, first_k: (N + 1,) int32, cumulative lengths.
    lengths_q, lengths_k: of the N sequences.
    """

    first_q: Tensor
    first_k: Tensor
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]

    @classmethod
    def of(cls, lengths_q: list[int], lengths_k: list[int], device: torch.device) -> Sequences:
        first = [torch.tensor([0, *each]).cumsum(0).int() for each in (lengths_q, lengths_k)]
        first_q, first_k = (to_device(each, device) for each in first)
        return cls(first_q, first_k, tuple(lengths_q), tuple(lengths_k))

    @property
    def longest_q(self) -> int:
        """At least 2: for queries of one token flash-attn has a kernel of its own, for decoding."""
        return max(2, *self.lengths_q)

    @property
    def longest_k(self) -> int:
        return max(self.lengths_k)


def attend_sequences(
    q_LHd: Tensor,
    k_KJd: Tensor,
    v_KJd: Tensor,
    sequences: Sequences,
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each sequence's queries to its keys, (L, H, d).

    On a CPU, SDPA attends one sequence at a time: slow, and there to check the rest.
    """
    if not q_LHd.is_cuda:
        attend = _by_sdpa
    elif _flash_attn() is not None:
        attend = _by_flash_attn
    else:
        attend = _by_pytorch
    return attend(q_LHd, k_KJd, v_KJd, sequences, window=window, scaling=scaling, softcap=softcap)


def kernel_name() -> str:
    """The kernel that runs on CUDA."""
    return "PyTorch's" if _flash_attn() is None else "flash-attn's"


def why_not(width: int, dtype: torch.dtype, softcap: float | None) -> str | None:
    """Why the CUDA kernel that is installed cannot serve; None: it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its kernels compute in 16 bits, and this run in {str(dtype).split('.')[-1]}"
    if width > _WIDEST_HEAD:
        return f"heads are {width} wide, and its kernels take {_WIDEST_HEAD} at most"
    if _flash_attn() is not None:
        return None
    without = 'and flash-attn is not installed (pip install "grao-fast[flash]")'
    if _pytorch() is None:
        return f"PyTorch {torch.__version__} has none that serves, {without}"
    if softcap is not None:
        return f"PyTorch's has no cap on scores, which is {softcap} here, {without}"
    if width % 8:
        return f"heads are {width} wide, and PyTorch's takes multiples of 8, {without}"
    return None


@cache
def _flash_attn() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_varlen_func  # also fails where built for another PyTorch
    except ImportError:
        return None
    known = inspect.signature(flash_attn_varlen_func).parameters
    return flash_attn_varlen_func if known.keys() >= _OF_FLASH_ATTN else None


@cache
def _pytorch() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if known.keys() >= _OF_PYTORCH else None


def _by_flash_attn(
    q_LHd: Tensor,
    k_KJd: Tensor,
    v_KJd: Tensor,
    sequences: Sequences,
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    flash_attn_varlen_func = _flash_attn()
    assert flash_attn_varlen_func is not None, "see `why_not`"
    return flash_attn_varlen_func(
        q_LHd,
        k_KJd,
        v_KJd,
        sequences.first_q,
        sequences.first_k,
        sequences.longest_q,
        sequences.longest_k,
        softmax_scale=scaling,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # PyTorch's looks by itself
    )


def _by_pytorch(
    q_LHd: Tensor,
    k_KJd: Tensor,
    v_KJd: Tensor,
    sequences: Sequences,
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    varlen_attn = _pytorch()
    assert varlen_attn is not None and softcap is None, "see `why_not`"
    return varlen_attn(
        q_LHd,
        k_KJd,
        v_KJd,
        sequences.first_q,
        sequences.first_k,
        sequences.longest_q,
        sequences.longest_k,
        scale=scaling,
        window_size=_window_size(window),
        enable_gqa=q_LHd.shape[1] != k_KJd.shape[1],
    )


def _window_size(window: int | None) -> tuple[int, int]:
    """How far a query sees to the left and to the right of itself; -1 is any distance."""
    return (-1 if window is None else window - 1), 0


def _by_sdpa(
    q_LHd: Tensor,
    k_KJd: Tensor,
    v_KJd: Tensor,
    sequences: Sequences,
    *,
    window: int | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    options: dict[str, Any] = {"window": window, "scaling": scaling, "softcap": softcap}
    parts = [
        [part.transpose(0, 1)[None] for part in x.split(lengths)]
        for x, lengths in (
            (q_LHd, sequences.lengths_q),
            (k_KJd, sequences.lengths_k),
            (v_KJd, sequences.lengths_k),
        )
    ]
    return torch.cat(
        [
            sdpa.causal_attention(q, k, v, dropout=0.0, **options)[0].transpose(0, 1)
            for q, k, v in zip(*parts, strict=True)
        ]
    )
