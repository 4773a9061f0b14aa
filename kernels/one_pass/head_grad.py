"""`head_grad_VD`: a buffer of the caller's to which the forward pass adds the head's gradient.

Each loss must add once. `torch.utils.checkpoint` with use_reentrant=False runs the forward pass
again, inside backward, only for the tensors that it saves, so nothing is added then. With
use_reentrant=True the first of the two forward passes has gradients disabled, and adds nothing.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..checks import check_constant
from .ops import LIBRARY, NAMESPACE, OPERATORS


def check_head_grad(head_grad_VD: Tensor, head_VD: Tensor) -> Tensor:
    """The buffer, or a DTensor's local tensor; ValueError if it does not fit the head."""
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
        raise ValueError("head_grad_VD must be contiguous, or each addition would copy it")
    check_constant("head_grad_VD", head_grad_VD)
    return head_grad_VD


def is_recomputed() -> bool:
    """Whether a checkpoint is running the caller again, having run it with gradients before.

    PyTorch has no other way to tell. Backward asks a checkpoint for a tensor that it did not keep
    through `unpack_hook`, which is then on the stack. Saved-tensor hooks would only tell of the
    innermost checkpoint.
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


# The addition of a compiled forward pass, which a checkpoint around it runs again as well.
LIBRARY.define("add_head_grad(Tensor(a!) head_grad_VD, Tensor dhead_VD, Tensor unscale) -> ()")
LIBRARY.impl("add_head_grad", _add_head_grad, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::add_head_grad", lambda *_: None, lib=LIBRARY)
add_head_grad = OPERATORS.add_head_grad.default
