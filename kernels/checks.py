"""Checks of the public functions' arguments.

They read metadata only, so that none waits for a device and a compiler can trace all of them.
Values of index tensors on the CPU are checked inside the operators, by `check_range`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows.contract import LogitConstants

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


def logit_constants(
    temperature: float, logit_scale: float, softcap: float | None
) -> LogitConstants:
    """The constants of z = softcap(x * logit_scale) / temperature; ValueError for a bad one."""
    check_number("temperature", temperature, above=0)
    check_number("logit_scale", logit_scale)
    slope = logit_scale / temperature
    if softcap is None:
        return LogitConstants(slope, slope, None)
    check_number("softcap", softcap, above=0)
    return LogitConstants(slope, logit_scale / softcap, softcap / temperature)


def check_number(name: str, value: object, *, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        converts = hasattr(value, "__float__") and not isinstance(value, bool)
        remedy = f": pass float({name})" if converts else ""
        raise ValueError(f"{name} must be a number, got {value!r}{remedy}")
    # Not math.isfinite, which a compiler cannot trace for a symbolic number.
    if not -math.inf < value < math.inf or (above is not None and value <= above):
        bound = "finite" if above is None else f"finite and above {above}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_hidden(hidden_TD: Tensor) -> None:
    if hidden_TD.ndim != 2:
        raise ValueError(
            f"hidden_TD must be (T, D), got {tuple(hidden_TD.shape)}: flatten batch and length"
        )


def check_token_constants(name: str, values_T: Tensor, hidden_TD: Tensor) -> None:
    """ValueError unless `values_T` holds a floating-point constant for each token."""
    T = hidden_TD.shape[0]
    if tuple(values_T.shape) != (T,):
        raise ValueError(f"{name} must be ({T},), got {tuple(values_T.shape)}")
    check_floating(name, values_T)
    check_constant(name, values_T)
    check_home(name, values_T, hidden_TD)


def check_floating(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {values.dtype}: call float()")


def check_operands(
    hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, bias_V: Tensor | None
) -> None:
    """Check shapes, dtypes and devices of the operands; ValueError names the one that is wrong."""
    check_hidden(hidden_TD)
    T, D = hidden_TD.shape
    if head_VD.ndim != 2 or head_VD.shape[1] != D or head_VD.shape[0] == 0:
        raise ValueError(f"head_VD must be (V, {D}) with V > 0, got {tuple(head_VD.shape)}")
    V = head_VD.shape[0]
    for name, tensor in (("hidden_TD", hidden_TD), ("head_VD", head_VD)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; for float64 "
                "use grao_fast.kernels.reference"
            )
    if head_VD.device != hidden_TD.device:
        raise ValueError(f"head_VD is on {head_VD.device}, hidden_TD on {hidden_TD.device}")
    check_index("target_T", target_T, (T,), hidden_TD)
    if bias_V is not None:
        if tuple(bias_V.shape) != (V,):
            raise ValueError(f"bias_V must be ({V},), got {tuple(bias_V.shape)}")
        if bias_V.dtype not in FLOAT_DTYPES:
            raise ValueError(f"bias_V must be float32, bfloat16 or float16, got {bias_V.dtype}")
        if bias_V.device != hidden_TD.device:
            raise ValueError(f"bias_V is on {bias_V.device}, hidden_TD on {hidden_TD.device}")


def check_index(name: str, tensor: Tensor, shape: tuple[int, ...], hidden_TD: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype not in INDEX_DTYPES:
        raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")
    check_home(name, tensor, hidden_TD)


def check_home(name: str, tensor: Tensor, hidden_TD: Tensor) -> None:
    if tensor.device.type != "cpu" and tensor.device != hidden_TD.device:
        raise ValueError(
            f"{name} must be on the CPU or beside hidden_TD on {hidden_TD.device}; "
            f"it is on {tensor.device}"
        )


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but the loss treats it as constant: detach() it")


def check_range(
    name: str,
    index_T: Tensor,
    low: int,
    high: int,
    *,
    row_T: Tensor | None = None,
    remedy: str = "",
) -> None:
    """ValueError unless low <= index < high; for a tensor on the CPU. row_T: its rows' numbers."""
    wrong_T = (index_T < low) | (index_T >= high)
    if wrong_T.any():
        place = int(wrong_T.nonzero()[0])
        row = place if row_T is None else int(row_T[place])
        raise ValueError(
            f"{name} must be in [{low}, {high}), got {int(index_T[place])} in row {row}{remedy}"
        )
