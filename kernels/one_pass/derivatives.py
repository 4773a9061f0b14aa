"""Raises for derivatives that the functions of this package do not have.

They have a gradient by one backward pass. Second derivatives, forward mode and the transforms of
torch.func would see constants, and silently give 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_INSTEAD = "grao_fast.kernels.reference, in plain PyTorch, supports it"


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that raises under create_graph=True.

    PyTorch's decorator of this name raises only where a gradient is differentiated whose incoming
    gradient requires one. A loss's mostly does not, so a gradient penalty would silently be 0.
    """

    @functools.wraps(backward)
    def constants(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "this loss has no second derivative: call backward without create_graph=True; "
                + _INSTEAD
            )
        with torch.no_grad():
            return backward(ctx, *gradients)

    return constants


def check_transforms(*operands: Tensor | None, vmap: bool) -> None:
    """ValueError in forward mode and under torch.func's transforms; `vmap` allows torch.vmap."""
    if torch.compiler.is_compiling():
        return
    refused = {"Grad", "Jvp"} if vmap else {"Grad", "Jvp", "Vmap"}
    layers = torch._C._functorch.get_interpreter_stack() or []
    kinds = refused.intersection(layer.key().name for layer in layers)
    dual = any(each is not None and unpack_dual(each).tangent is not None for each in operands)
    if kinds or dual:
        raise ValueError(
            f"torch.func's {', '.join(sorted(kinds)).lower() or 'jvp'} and derivatives in forward "
            f"mode do not pass this function: call backward or torch.autograd.grad; {_INSTEAD}"
        )
