"""Choices that depend on the device: backend, workspace, dtype of the operands; copies to it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

from .checks import check_choice, check_number


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Return `backend`, by default "triton" on CUDA and "torch" elsewhere."""
    if backend is None:
        backend = "triton" if device.type == "cuda" else "torch"
    check_choice("backend", backend, ("triton", "torch"))
    return backend


def check_backend(backend: str, device: torch.device) -> None:
    """Raise ValueError if the backend cannot run; not traceable, since it imports Triton."""
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


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """Return what `choose_backend` does; raise ValueError if that backend cannot run."""
    backend = choose_backend(backend, device)
    check_backend(backend, device)
    return backend


def workspace_bytes(workspace_mib: float | None, device: torch.device) -> int:
    """Return the workspace in bytes, by default the device's; see `one_pass/chunks.py`."""
    if workspace_mib is None:
        workspace_mib = 512 if device.type == "cpu" else 2048
    check_number("workspace_mib", workspace_mib, above=0)
    return int(workspace_mib * 2**20)


def compute_dtype(hidden_TD: Tensor, head_VD: Tensor) -> torch.dtype:
    """Return the dtype of the GEMMs' operands: autocast's if it is on, else the tensors'."""
    device_type = hidden_TD.device.type
    # Not torch.amp.is_autocast_available: torch 2.8 to 2.11 cannot compile it.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    if hidden_TD.dtype != head_VD.dtype:
        raise ValueError(
            f"hidden_TD is {hidden_TD.dtype} and head_VD is {head_VD.dtype}: cast one to the "
            "other, or call under torch.autocast"
        )
    return hidden_TD.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast, for operators, which cast by themselves."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; the host does not wait for a copy to CUDA."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
