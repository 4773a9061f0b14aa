"""Losses and log-probs at the LM head, made inside the model's forward pass.

Suffixes: B or S rows of L tokens, C columns that are scored, T tokens, D width, 3 terms.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grao_fast.integrations.trl.rows import Rows, model_inputs
from grao_fast.integrations.trl.zero import gathering, is_partitioned
from grao_fast.kernels import (
    OffPolicy,
    PolicyLoss,
    Shaping,
    linear_logprobs,
    linear_policy_loss,
)
from grao_fast.models.head import LogitTransform, check_head
from grao_fast.models.objective import HeadInputs, run_at_head
from grao_fast.models.parity import check_parity
from grao_fast.models.policy import Policy, causal_lm_of
from grao_fast.models.sharding import whole_shape
from grao_fast.system.errors import UserError


def embedding_rows_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens that the model embeds; UserError if padding is not one of them."""
    rows, _ = whole_shape(causal_lm_of(model).get_input_embeddings().weight)
    if tokenizer.pad_token_id >= rows:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} is beyond the model's embedding of {rows} "
            "rows: set tokenizer.pad_token=tokenizer.eos_token"
        )
    return rows


def logit_transform_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    autocast_dtype: torch.dtype | None,
    compare: bool,
) -> LogitTransform:
    """The model's logit transform; with `compare`, checked against the model's own logits.

    Where ZeRO-3 has split the model, every process compares, since each has a part of it.

    Raises:
        UserError: the model's logits differ.
    """
    causal_lm = causal_lm_of(model)
    check_head(causal_lm)
    transform = LogitTransform.from_config(causal_lm.config.get_text_config())
    split = is_partitioned(model)
    if not (compare or split):
        return transform
    policy = Policy(
        model=model,
        causal_lm=causal_lm,
        transform=transform,
        autocast_dtype=autocast_dtype,
        pad_token_id=tokenizer.pad_token_id,
    )
    with gathering(model) if split else nullcontext():
        check_parity(policy, gradient=False)  # its layers run as they are
    return transform


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
    model: nn.Module, input_ids_BL: Tensor, mask_BL: Tensor, columns: int, logits: dict[str, Any]
) -> Tensor:
    """(B, columns) log-probs of the last tokens, 0 where they are masked."""
    L = input_ids_BL.shape[1]
    counts_BC = mask_BL[:, L - columns :].bool()
    row_T, column_T = counts_BC.nonzero(as_tuple=True)

    def score(head: HeadInputs) -> Tensor:
        logprob_BC = torch.zeros(counts_BC.shape, device=head.hidden_TD.device)
        logprob_BC[counts_BC] = linear_logprobs(
            head.hidden_TD,
            head.head_VD,
            input_ids_BL[:, L - columns :][counts_BC],
            bias_V=head.bias_V,
            **logits,
        ).logprob_T
        return logprob_BC

    before_T = row_T * L + (L - columns - 1) + column_T  # the row that predicts each token
    return run_at_head(model, model_inputs(input_ids_BL, mask_BL), before_T, score)
