"""Which rows the pass computes, and what each of them weighs.

Shapes: T rows, L live ones, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_range
from ..rows.off_policy import Policy


class LiveRows(NamedTuple):
    """The rows to compute, on the device. `index_L` is None where these are all T rows."""

    index_L: Tensor | None
    target_L: Tensor
    weight_L: Tensor
    entropy_weight_L: Tensor | None
    policy: Policy | None
    terms_CL: Tensor
    live_L: Tensor | None  # which of these count after all; None where all do

    def take(self, hidden_TD: Tensor, start: int, stop: int) -> Tensor:
        """The hidden states of rows start to stop."""
        if self.index_L is not None:
            return hidden_TD.index_select(0, self.index_L[start:stop])
        hidden_RD = hidden_TD[start:stop]
        if self.live_L is not None:
            # 0 * NaN is NaN: what a dead row holds must not reach the head's gradient.
            return hidden_RD.where(self.live_L[start:stop, None], 0)
        return hidden_RD

    def all_rows(self, values_L: Tensor | None, T: int) -> Tensor | None:
        """Values of all T rows, NaN in those that were dropped."""
        if values_L is None or self.index_L is None:
            return values_L
        return values_L.new_full((T,), torch.nan).index_copy_(0, self.index_L, values_L)


def find_live_rows(
    terms_CT: Tensor,
    entropy_weight_T: Tensor | None,
    policy: Policy | None,
    target_T: Tensor,
    V: int,
    device: torch.device,
) -> LiveRows:
    """Terms on the CPU: dead rows are dropped here, at no cost to the device.

    Terms on a device: which rows are dead is not known without waiting for it, so all are kept,
    and the row function skips the dead.
    """
    terms_CT = terms_CT.float()
    weight_T = terms_CT.sum(0)
    live_T = weight_T != 0
    if entropy_weight_T is not None:
        entropy_weight_T = entropy_weight_T.float().contiguous()
        live_T |= entropy_weight_T != 0
    if policy is not None:
        live_T |= policy.kl_coef_R != 0
    index_L = live_L = None
    row_T = None
    if weight_T.device.type == "cpu":
        live = live_T.nonzero().squeeze(1)
        if live.numel() < weight_T.numel():
            row_T = live
            weight_T, terms_CT = weight_T[live], terms_CT[:, live]
            if entropy_weight_T is not None:
                entropy_weight_T = entropy_weight_T[live]
            index_L = to_device(live, device)
            if policy is not None:
                policy = policy._replace(
                    logprob_3R=policy.logprob_3R[:, index_L], kl_coef_R=policy.kl_coef_R[live]
                )
            target_T = target_T[live if target_T.device.type == "cpu" else index_L]
        if target_T.device.type == "cpu":
            remedy = ": rows without a target must have no weight"
            check_range(
                "target_T of the rows that count", target_T, 0, V, row_T=row_T, remedy=remedy
            )
    elif device.type != "cpu":
        live_L = live_T
    weight_L = to_device(weight_T, device)
    target_L = to_device(target_T, device).to(torch.int64).contiguous()
    if live_L is not None:
        target_L = target_L.where(live_L, 0)
    if entropy_weight_T is not None:
        entropy_weight_T = to_device(entropy_weight_T, device)
    if policy is not None:
        policy = policy._replace(kl_coef_R=to_device(policy.kl_coef_R, device))
    terms_CL = to_device(terms_CT, device)
    return LiveRows(index_L, target_L, weight_L, entropy_weight_T, policy, terms_CL, live_L)


def normalised(rows: LiveRows, dtype: torch.dtype) -> tuple[LiveRows, Tensor]:
    """For float16, the weights over a power of two that brings the largest to [1/2, 1).

    Token weights of 1e-6 times probabilities of 1e-3 would underflow in float16 gradients. A
    power of two changes no other bit, and is given back when the gradients leave.
    """
    one = rows.weight_L.new_ones(())
    if dtype != torch.float16 or rows.weight_L.numel() == 0:
        return rows, one
    policy, entropy_weight_L = rows.policy, rows.entropy_weight_L
    weights = [rows.weight_L, entropy_weight_L, None if policy is None else policy.kl_coef_R]
    largest = torch.stack([each.abs().amax() for each in weights if each is not None]).amax()
    exponent = largest.frexp().exponent.clamp(-120, 120)  # 2^121 is finite
    weight_L, entropy_weight_L, kl_coef_L = (
        None if each is None else torch.ldexp(each, -exponent) for each in weights
    )
    if policy is not None:
        policy = policy._replace(kl_coef_R=kl_coef_L)
    rows = rows._replace(weight_L=weight_L, entropy_weight_L=entropy_weight_L, policy=policy)
    return rows, torch.ldexp(one, exponent)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for, where there is one to make."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
