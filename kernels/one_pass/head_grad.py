"""`head_grad_VD`: a buffer of the caller's, to which the forward pass adds the head's gradient.

It must add once to a loss, and `torch.utils.checkpoint` with use_reentrant=False runs the forward
pass again, inside backward, for the tensors that it saves. What it computes then is thrown away,
so nothing is added. (With use_reentrant=True the first of its two passes is without gradients, and
adds nothing by itself.)
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..checks import check_constant
from .ops import LIBRARY


def check_head_grad(head_grad_VD: Tensor, head_VD: Tensor) -> Tensor:
    """The buffer, or of a DTensor the local part; ValueError where it is not one for this head."""
    if hasattr(head_grad_VD, "to_local"):
        head_grad_VD = head_grad_VD.to_local()
    if head_grad_VD.shape != head_VD.shape or head_grad_VD.device != head_VD.device:
        raise ValueError(
            f"head_grad_VD must be {tuple(head_VD.shape)} on {head_VD.device}, as head_VD is; got "
            f"{tuple(head_grad_VD.shape)} on {head_grad_VD.device}"
        )
    if head_grad_VD.dtype not in (torch.float32, head_VD.dtype):
        raise ValueError(
            f"head_grad_VD must be float32 or {head_VD.dtype}, got {head_grad_VD.dtype}"
        )
    if not head_grad_VD.is_contiguous():
        raise ValueError("head_grad_VD must be contiguous: adding to it would copy it every time")
    check_constant("head_grad_VD", head_grad_VD)
    return head_grad_VD


def is_recomputed() -> bool:
    """Whether a checkpoint runs the caller again, having run it with gradients before.

    PyTorch has no other way to ask: `unpack_hook` is where a backward pass comes to the checkpoint
    for a tensor that it did not keep. Saved-tensor hooks would tell of the innermost ones alone.
    """
    frame = sys._getframe(1)
    while frame is not None:
        place = frame.f_globals.get("__name__"), frame.f_code.co_name
        if place == ("torch.utils.checkpoint", "unpack_hook"):
            return True
        frame = frame.f_back
    return False


def _add_head_grad(head_grad_VD: Tensor, dhead_VD: Tensor, unscale: Tensor) -> None:
    if not is_recomputed():
        head_grad_VD.add_(dhead_VD.float() * unscale)


# What a compiled forward pass adds with: a checkpoint around it runs its code again, too.
LIBRARY.define("add_head_grad(Tensor(a!) head_grad_VD, Tensor dhead_VD, Tensor unscale) -> ()")
LIBRARY.impl("add_head_grad", _add_head_grad, "CompositeExplicitAutograd")
torch.library.register_fake("grao_fast::add_head_grad", lambda *_: None, lib=LIBRARY)
add_head_grad = torch.ops.grao_fast.add_head_grad.default
