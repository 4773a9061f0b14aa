"""The row function of a sharded head: a backend's two half passes with reductions in between.

Shapes: R rows of a slab, V a process's shard of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..vocab_parallel import Shard
from .contract import LogitConstants, RowInputs, RowOutputs
from .statistics import Statistics, row_factors, row_outcome, store


def sharded_policy_rows(
    shard: Shard,
    row_statistics: Callable[..., Statistics],
    row_gradient: Callable[..., None],
) -> Callable[..., None]:
    """`policy_rows` for a sharded head, made of a backend's `row_statistics` and `row_gradient`."""

    def policy_rows(
        logits_RV: Tensor,
        dlogits_RV: Tensor | None,
        bias_V: Tensor | None,
        inputs: RowInputs,
        outputs: RowOutputs,
        constants: LogitConstants,
    ) -> None:
        entropy = outputs.entropy_R is not None
        local_R = shard.local(inputs.target_R, logits_RV.shape[1])
        statistics = row_statistics(logits_RV, bias_V, local_R, constants, entropy)
        statistics = _reduced(statistics, entropy, shard)
        outcome = row_outcome(statistics, entropy, outputs.top1_R is not None)
        if dlogits_RV is not None and outputs.target_grad_R is not None:
            factors, target = row_factors(statistics, outcome.logprob_R, inputs, constants)
            outputs.target_grad_R.copy_(target.grad_R.where(local_R >= 0, 0))
            zero_R = local_R.where(target.whole_R, -1)
            row_gradient(logits_RV, dlogits_RV, bias_V, zero_R, factors, constants)
        store(outcome, inputs, outputs)

    return policy_rows


def _reduced(statistics: Statistics, entropy: bool, shard: Shard) -> Statistics:
    """Statistics of the whole vocabulary, relative to its largest logit."""
    own_peak_R, target_z_R, others_R, rest_R, ties_R, spread_R = statistics
    # A shard whose logits are all -inf adds nothing; -inf - peak would make it NaN.
    own_peak_R = own_peak_R.clamp(min=torch.finfo(own_peak_R.dtype).min)
    peak_R, target_z_R = shard.max_(torch.stack([own_peak_R, target_z_R]))
    fall_R = own_peak_R - peak_R
    decay_R = fall_R.exp()
    if not entropy:
        others_R = shard.sum_(others_R * decay_R)
        return statistics._replace(peak_R=peak_R, target_z_R=target_z_R, others_R=others_R)
    highest_R = own_peak_R == peak_R
    total_R = rest_R + ties_R
    sums_4R = torch.stack(
        [
            others_R * decay_R,
            torch.where(highest_R, rest_R, total_R * decay_R),
            torch.where(highest_R, ties_R, 0),
            (spread_R + fall_R * total_R) * decay_R,
        ]
    )
    return Statistics(peak_R, target_z_R, *shard.sum_(sums_4R))
