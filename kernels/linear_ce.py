"""Weighted cross-entropy of a linear head, without materialising the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import check_hidden, check_token_constants
from .linear_policy import linear_policy_loss
from .vocab_parallel import VocabParallel


class LinearCrossEntropy(NamedTuple):
    """`loss` is differentiable; `logprob_T` is not, and is NaN in rows of weight 0."""

    loss: Tensor
    logprob_T: Tensor


def linear_weighted_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    weight_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_mib: float | None = None,
    backend: str | None = None,
    head_grad_VD: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> LinearCrossEntropy:
    """loss = -sum_t weight_t log softmax(z_t)[target_t], with weights of either sign.

    This is `linear_policy_loss` with one term, and takes the same arguments.

    Args:
        weight_T: (T,) floats, constants, on the CPU (recommended) or hidden's device.

    Returns:
        LinearCrossEntropy(loss, logprob_T): a 0-d float32 differentiable in hidden_TD, head_VD
        and bias_V; and (T,) float32 log-probs, constants, NaN where the weight is 0. A row of
        weight 0 may hold anything, NaN included; its gradient is exactly 0.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, by name.
        RuntimeError: a second backward pass through one loss, or one with create_graph=True.
    """
    check_hidden(hidden_TD)
    check_token_constants("weight_T", weight_T, hidden_TD)
    result = linear_policy_loss(
        hidden_TD,
        head_VD,
        target_T,
        weight_T[None],
        bias_V=bias_V,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        workspace_mib=workspace_mib,
        backend=backend,
        head_grad_VD=head_grad_VD,
        vocab_parallel=vocab_parallel,
    )
    return LinearCrossEntropy(result.loss, result.logprob_T)
