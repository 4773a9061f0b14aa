"""The boundary: what the public functions accept, and what they say to the rest.

Checks read metadata only, so that none waits for a device and all can be traced by a compiler; the
values of index tensors are checked inside the operators, where they lie on the CPU, which costs
nothing there.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)


class LogitTransform(NamedTuple):
    """From a logit x = h W^T + b to z, in the constants the row functions multiply by.

    Without softcap z = slope * x. With it z = cap * tanh(inner * x), and slope = cap * inner is
    dz/dx at 0; there dz/dx = slope * (1 - tanh^2).
    """

    slope: float
    inner: float
    cap: float | None


def logit_transform(
    temperature: float, logit_scale: float, softcap: float | None
) -> LogitTransform:
    """The constants of z = softcap(x * logit_scale) / temperature; ValueError names a bad one."""
    check_number("temperature", temperature, above=0)
    check_number("logit_scale", logit_scale)
    slope = logit_scale / temperature
    if softcap is None:
        return LogitTransform(slope, slope, None)
    check_number("softcap", softcap, above=0)
    return LogitTransform(slope, logit_scale / softcap, softcap / temperature)


def check_number(name: str, value: object, *, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        converts = hasattr(value, "__float__") and not isinstance(value, bool)
        remedy = f": pass float({name})" if converts else ""
        raise ValueError(f"{name} must be a number, got {value!r}{remedy}")
    # Not math.isfinite: a compiler cannot trace that for a number that it keeps symbolic.
    if not -math.inf < value < math.inf or (above is not None and value <= above):
        bound = "finite" if above is None else f"finite and above {above}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def workspace_bytes(workspace_mib: float | None, device: torch.device) -> int:
    """The workspace that was asked for, or the device's default; see `one_pass/chunks.py`."""
    if workspace_mib is None:
        workspace_mib = 512 if device.type == "cpu" else 2048
    check_number("workspace_mib", workspace_mib, above=0)
    return int(workspace_mib * 2**20)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def compute_dtype(hidden_TD: Tensor, head_VD: Tensor) -> torch.dtype:
    """The dtype of the GEMMs' operands: autocast's where it is on, else the tensors' own."""
    device_type = hidden_TD.device.type
    # Not torch.amp.is_autocast_available: in torch 2.8 to 2.11 it cannot be compiled.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if hidden_TD.dtype != head_VD.dtype:
        raise ValueError(
            f"hidden_TD is {hidden_TD.dtype} and head_VD is {head_VD.dtype}: cast one to the "
            "other, or call under torch.autocast"
        )
    return hidden_TD.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """For inside of an operator, which casts by itself."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_operands(
    hidden_TD: Tensor, head_VD: Tensor, target_T: Tensor, bias_V: Tensor | None
) -> None:
    """Shapes, dtypes and devices of what makes the logits; ValueError names the culprit."""
    if hidden_TD.ndim != 2:
        raise ValueError(
            f"hidden_TD must be (T, D), got {tuple(hidden_TD.shape)}: flatten batch and length"
        )
    T, D = hidden_TD.shape
    if head_VD.ndim != 2 or head_VD.shape[1] != D or head_VD.shape[0] == 0:
        raise ValueError(f"head_VD must be (V, {D}) with V > 0, got {tuple(head_VD.shape)}")
    V = head_VD.shape[0]
    for name, tensor in (("hidden_TD", hidden_TD), ("head_VD", head_VD)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}; for float64 "
                "there is grao_fast.kernels.reference"
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
        raise ValueError(f"{name} requires grad, but is a constant of the loss: detach() it")


def check_range(
    name: str,
    index_T: Tensor,
    low: int,
    high: int,
    *,
    row_T: Tensor | None = None,
    remedy: str = "",
) -> None:
    """low <= index < high, for an index tensor on the CPU; row_T: which rows these are."""
    wrong_T = (index_T < low) | (index_T >= high)
    if wrong_T.any():
        place = int(wrong_T.nonzero()[0])
        row = place if row_T is None else int(row_T[place])
        raise ValueError(
            f"{name} must be in [{low}, {high}), got {int(index_T[place])} in row {row}{remedy}"
        )


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """`choose_backend`, refused at once where it cannot run."""
    backend = choose_backend(backend, device)
    check_backend(backend, device)
    return backend


def choose_backend(backend: str | None, device: torch.device) -> str:
    """ "triton" for CUDA tensors and "torch" for others, unless `backend` says which."""
    if backend is None:
        backend = "triton" if device.type == "cuda" else "torch"
    check_choice("backend", backend, ("triton", "torch"))
    return backend


def check_backend(backend: str, device: torch.device) -> None:
    """ValueError where the backend cannot run; looks for Triton, so not to be traced."""
    if backend != "triton":
        return
    if find_spec("triton") is None:
        raise ValueError(
            "backend 'triton' needs Triton, which is not installed: pip install triton "
            "(Linux only), or pass backend='torch'"
        )
    from .rows.triton_rows import runs_on

    if not runs_on(device):
        raise ValueError(
            f"backend 'triton' cannot run on {device}: pass backend='torch', or set "
            "TRITON_INTERPRET=1 before Triton is imported to interpret the kernels"
        )
