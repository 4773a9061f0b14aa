"""Sums and means over the rows of a sequence, for objectives that take two passes.

They are computed in float64 on the device of the coefficients. That is the CPU wherever rows
without weight are to be dropped, and there a sum has the same bits from run to run.

Suffixes: T rows, S sequences of a micro-batch, R rows that count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grao_fast.objectives.base import Rows


class Live(NamedTuple):
    """The rows that have a coefficient, and what they hold: the others must not matter.

    index_R: places among the T rows.
    sequence_R, logprob_R, entropy_R: as in `Rows`.
    S: sequences, the last one that counts included.
    """

    index_R: Tensor
    sequence_R: Tensor
    logprob_R: Tensor
    entropy_R: Tensor
    S: int

    def sums(self, values_R: Tensor) -> Tensor:
        """(S,) the sum over each sequence's rows."""
        return values_R.new_zeros(self.S).index_add_(0, self.sequence_R, values_R)

    def means(self, values_R: Tensor) -> Tensor:
        """(S,) the mean over each sequence's rows; 0 of none."""
        return self.sums(values_R) / self.sums(torch.ones_like(values_R)).clamp(min=1)

    def first(self, values_R: Tensor) -> Tensor:
        """(S,) a value that all rows of a sequence have; 0 of none."""
        return values_R.new_zeros(self.S).index_copy_(0, self.sequence_R, values_R)

    def take(self, values_T: Tensor) -> Tensor:
        """(R,) float64"""
        return values_T.to(self.index_R.device, torch.float64)[self.index_R]

    def spread(self, values_CR: Tensor, T: int) -> Tensor:
        """(C, T) float32, 0 in the rows that do not count."""
        values_CT = values_CR.new_zeros(len(values_CR), T, dtype=torch.float32)
        return values_CT.index_copy_(1, self.index_R, values_CR.float())


def live_rows(terms_CT: Tensor, rows: Rows) -> Live:
    """The rows of a sequence that have a coefficient in any term."""
    device = terms_CT.device
    sequence_T = rows.sequence_T.to(device)
    index_R = ((terms_CT != 0).any(0) & (sequence_T >= 0)).nonzero().squeeze(1)
    sequence_R = sequence_T[index_R]
    logprob_R, entropy_R = (
        each.to(device, torch.float64)[index_R] for each in (rows.logprob_T, rows.entropy_T)
    )
    S = int(sequence_R.max()) + 1 if sequence_R.numel() else 0
    return Live(index_R, sequence_R, logprob_R, entropy_R, S)
