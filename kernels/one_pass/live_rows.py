"""Selects the rows that the pass computes, and brings their constants to the device.

Shapes: T rows, L live ones, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_range
from ..devices import to_device
from ..rows.contract import RowInputs
from ..rows.forms import FormRows
from .options import PassInputs


class LiveRows(NamedTuple):
    """The rows to compute, on the device. `index_L` is None where these are all T rows."""

    index_L: Tensor | None
    row: RowInputs
    terms_CL: Tensor
    live_L: Tensor | None  # which of the rows count; None where all do

    def take(self, hidden_TD: Tensor, start: int, stop: int) -> Tensor:
        """The hidden states of rows start to stop."""
        if self.index_L is not None:
            return hidden_TD.index_select(0, self.index_L[start:stop])
        hidden_RD = hidden_TD[start:stop]
        if self.live_L is not None:
            # Dead rows may hold NaN, and 0 * NaN would carry it into the head's gradient.
            return hidden_RD.where(self.live_L[start:stop, None], 0)
        return hidden_RD

    def all_rows(self, values_L: Tensor | None, T: int) -> Tensor | None:
        """Values of all T rows, NaN in those that were dropped."""
        if values_L is None or self.index_L is None:
            return values_L
        return values_L.new_full((T,), torch.nan).index_copy_(0, self.index_L, values_L)


def find_live_rows(inputs: PassInputs, V: int) -> LiveRows:
    """The rows with a weight.

    Terms on the CPU: dead rows are dropped, at no cost to the device. Terms on a device: the host
    would have to wait to learn which rows are dead, so all are kept, and the row function skips the
    dead ones.
    """
    device = inputs.hidden_TD.device
    terms_CT, target_T, forms = inputs.terms_CT.float(), inputs.target_T, inputs.forms
    entropy_weight_T = inputs.entropy_weight_T
    if entropy_weight_T is not None:
        entropy_weight_T = entropy_weight_T.float().contiguous()
    weight_T = terms_CT.sum(0)
    live_T = _is_live(weight_T, entropy_weight_T, forms)
    index_L = live_L = kept = None
    if weight_T.device.type == "cpu":
        live = live_T.nonzero().squeeze(1)
        if live.numel() < weight_T.numel():
            kept, index_L = live, to_device(live, device)
            weight_T, terms_CT = weight_T[live], terms_CT[:, live]
            entropy_weight_T = None if entropy_weight_T is None else entropy_weight_T[live]
            if forms is not None:
                forms = forms._replace(
                    constants_PR=forms.constants_PR[:, index_L],
                    kl_coef_R=forms.kl_coef_R[live],
                )
            target_T = target_T[live if target_T.device.type == "cpu" else index_L]
        _check_targets(target_T, V, kept)
    elif device.type != "cpu":
        live_L = live_T
    weight_L = to_device(weight_T, device)
    target_L = to_device(target_T, device).to(torch.int64).contiguous()
    if live_L is not None:
        target_L = target_L.where(live_L, 0)
    if entropy_weight_T is not None:
        entropy_weight_T = to_device(entropy_weight_T, device)
    if forms is not None:
        forms = forms._replace(kl_coef_R=to_device(forms.kl_coef_R, device))
    row = RowInputs(target_L, weight_L, entropy_weight_T, forms)
    return LiveRows(index_L, row, to_device(terms_CT, device), live_L)


def _is_live(weight_T: Tensor, entropy_weight_T: Tensor | None, forms: FormRows | None) -> Tensor:
    live_T = weight_T != 0
    if entropy_weight_T is not None:
        live_T |= entropy_weight_T != 0
    if forms is not None:
        live_T |= forms.kl_coef_R != 0
    return live_T


def _check_targets(target_L: Tensor, V: int, row_L: Tensor | None) -> None:
    """ValueError for a target outside of [0, V), if targets are on the CPU."""
    if target_L.device.type == "cpu":
        name, remedy = "target_T of the rows that count", ": rows without a target need weight 0"
        check_range(name, target_L, 0, V, row_T=row_L, remedy=remedy)


def normalised(row: RowInputs, dtype: torch.dtype) -> tuple[RowInputs, Tensor]:
    """Inputs whose weights are divided by a scale, and the scale; 1 unless dtype is float16.

    Token weights of 1e-6 times probabilities of 1e-3 would underflow in float16 gradients. The
    scale is a power of two that brings the largest weight to [1/2, 1): it changes no other bit, and
    the gradients are multiplied by it when they leave.
    """
    one = row.weight_R.new_ones(())
    if dtype != torch.float16 or row.weight_R.numel() == 0:
        return row, one
    forms = row.forms
    kl_coef_R = None if forms is None else forms.kl_coef_R
    weights = [row.weight_R, row.entropy_weight_R, kl_coef_R]
    largest = torch.stack([each.abs().amax() for each in weights if each is not None]).amax()
    exponent = largest.frexp().exponent.clamp(-120, 120)  # 2^121 is finite
    weight_R, entropy_weight_R, kl_coef_R = (
        None if each is None else torch.ldexp(each, -exponent) for each in weights
    )
    if forms is not None:
        forms = forms._replace(kl_coef_R=kl_coef_R)
    row = RowInputs(row.target_R, weight_R, entropy_weight_R, forms)
    return row, torch.ldexp(one, exponent)
