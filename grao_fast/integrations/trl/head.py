"""Losses and log-probs at the LM head, made inside the model's forward pass.

Suffixes: B or S rows of L tokens, C columns that are scored, T tokens, D width, 3 terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grao_fast.integrations.trl.layout import lay_out
from grao_fast.integrations.trl.rows import Rows
from grao_fast.kernels import (
    OffPolicy,
    PolicyLoss,
    Shaping,
    linear_logprobs,
    linear_policy_loss,
)
from grao_fast.models.objective import HeadInputs, run_at_head


def loss_of(
    rows: Rows,
    terms_3T: Tensor,
    logits: dict[str, Any],
    off_policy: OffPolicy | None,
    shaping: Shaping | None,
) -> Callable[[HeadInputs], PolicyLoss]:
    """The loss of a micro-batch, its terms, log-probs and entropies, in one pass.

    The coefficients are given, since `linear_grao_loss` weighs whole groups, and TRL's
    micro-batches split them.
    """

    def loss(head: HeadInputs) -> PolicyLoss:
        # No head_grad_VD, since DDP must see the head's gradient.
        return linear_policy_loss(
            head.hidden_TD,
            head.head_VD,
            rows.target_T,
            terms_3T,
            off_policy=off_policy,
            shaping=shaping,
            bias_V=head.bias_V,
            entropy=True,
            **logits,
        )

    return loss


def scores_of(
    model: nn.Module,
    input_ids_BL: Tensor,
    mask_BL: Tensor,
    columns: int,
    logits: dict[str, Any],
    *,
    share_prefix: bool,
) -> Tensor:
    """(B, columns) log-probs of the last tokens, 0 where they are masked."""
    first = input_ids_BL.shape[1] - columns
    counts_BC = mask_BL[:, first:].bool()
    row_T, column_T = counts_BC.nonzero(as_tuple=True)
    layout = lay_out(input_ids_BL, mask_BL, first, share_prefix=share_prefix)

    def score(head: HeadInputs) -> Tensor:
        logprob_BC = torch.zeros(counts_BC.shape, device=head.hidden_TD.device)
        logprob_BC[counts_BC] = linear_logprobs(
            head.hidden_TD,
            head.head_VD,
            input_ids_BL[:, first:][counts_BC],
            bias_V=head.bias_V,
            **logits,
        ).logprob_T
        return logprob_BC

    return run_at_head(model, layout.inputs, layout.before(row_T, first + column_T), score)
