"""The one tolerance of this repository. It is never widened for a test."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def assert_accurate(
    name: str, actual: Tensor, naive: Tensor, truth: Tensor, dtype: torch.dtype
) -> None:
    """max |actual - truth| <= 2 max |naive - truth| + 8 eps(dtype) max |truth|.

    `truth` is computed in float64, `naive` by the same formula in plain PyTorch in `dtype`. NaN
    must be where the truth has it, and nowhere else. All are compared on the device of `truth`.
    """
    actual, naive, truth = (
        tensor.detach().to(truth.device, torch.float64) for tensor in (actual, naive, truth)
    )
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)}, not {tuple(truth.shape)}"
    assert torch.equal(actual.isnan(), truth.isnan()), f"{name}: NaN in other places"
    if truth.numel() == 0:
        return
    error = (actual - truth).nan_to_num(0).abs().max().item()
    error_naive = (naive - truth).nan_to_num(0).abs().max().item()
    scale = truth.nan_to_num(0).abs().max().item()
    allowed = 2 * error_naive + 8 * torch.finfo(dtype).eps * scale
    assert error <= allowed, (
        f"{name}: error {error:.3g} above {allowed:.3g} "
        f"(error of naive {error_naive:.3g}, largest value {scale:.3g})"
    )


def worst_error(actual: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """The largest error of any tensor, relative to that tensor's largest true value."""
    return max(
        ((a.detach().double().cpu() - t).abs().max() / t.abs().max().clamp(min=1e-30)).item()
        for a, t in zip(actual, truth, strict=True)
    )


def gradients_of(model: torch.nn.Module) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return gradients
