"""Inputs, outputs and constants of a row of logits: the records that all row functions share.

A row function turns a slab of logits into log-probs and gradients:

    policy_rows(logits_RV, dlogits_RV, bias_V, inputs, outputs, constants)

Its meaning and its arguments are documented once, at `torch_rows.policy_rows`.

Shapes: R rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .forms import FormRows


class LogitConstants(NamedTuple):
    """From a logit x = h W^T + b to z, as the constants that the row functions multiply by.

    Without a softcap, z = slope * x. With one, z = cap * tanh(inner * x), slope = cap * inner is
    dz/dx at 0, and dz/dx = slope * (1 - tanh^2).
    """

    slope: float
    inner: float
    cap: float | None


class RowInputs(NamedTuple):
    """Constants of each row. A row is dead if its weights and its KL coefficient are all 0."""

    target_R: Tensor  # int64
    weight_R: Tensor  # float32
    entropy_weight_R: Tensor | None = None  # float32
    forms: FormRows | None = None

    def rows(self, start: int, stop: int) -> RowInputs:
        entropy_weight_R, forms = self.entropy_weight_R, self.forms
        return RowInputs(
            self.target_R[start:stop],
            self.weight_R[start:stop],
            None if entropy_weight_R is None else entropy_weight_R[start:stop],
            None if forms is None else forms.rows(start, stop),
        )


class RowOutputs(NamedTuple):
    """Float32 tensors to write; None for what is not wanted."""

    logprob_R: Tensor
    entropy_R: Tensor | None = None
    top1_R: Tensor | None = None
    target_grad_R: Tensor | None = None  # given together with dlogits_RV

    def rows(self, start: int, stop: int) -> RowOutputs:
        return RowOutputs(*(None if each is None else each[start:stop] for each in self))
