"""The GRAO loss of a linear head: from hidden states and rewards to loss and gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import ops
from .advantage import (
    REFERENCE_ADVANTAGES,
    STATISTICS,
    check_rewards,
)
from .checks import (
    check_choice,
    check_home,
    check_index,
    check_number,
    check_operands,
    choose_backend,
    logit_transform,
)
from .linear_ce import weighted_terms


class GRAOLoss(NamedTuple):
    """`loss` is differentiable, the rest are constants; the three terms sum to -loss."""

    loss: Tensor
    exploration: Tensor
    imitation: Tensor
    alignment: Tensor
    logprob_T: Tensor
    advantages_NK: Tensor


def linear_grao_loss(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    sequence_T: Tensor,
    rewards_NK: Tensor,
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    statistics: str = "group",
    reference_advantage: str = "signed",
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_prompts: float | None = None,
    workspace_mib: float = 512,
    backend: str | None = None,
) -> GRAOLoss:
    """Group Relative Alignment Optimization, in one pass over the vocabulary.

    J = (1/G) sum_i A_i L(o_i) + beta A_y L(y) + lam (1/G) sum_i A_i (L(o_i) - L(y)),
    loss = -sum of J over prompts / num_prompts, with L(s) the mean over s of
    log softmax(z)[target], z = softcap((hidden head^T + bias) * logit_scale) / temperature.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16: what predicts each token, in any order.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32: the token, in [0, V); any value where the row has no weight.
        sequence_T: (T,) int64 or int32: n * K + k for a token of sequence k of prompt n, the
            reference being k = K - 1; -1 for a row that does not count.
        rewards_NK: (N, K) floats, K = G + 1, the reference last; NaN for an absent sequence.
        beta, lam: weights of imitation and of the alignment regulariser.
        statistics, reference_advantage: as in `group_advantages`.
        bias_V, temperature, logit_scale, softcap, workspace_mib, backend: as in
            `linear_weighted_cross_entropy`.
        num_prompts: the divisor, N by default. Give the whole batch's when this call has a part
            of it, and the parts' losses and gradients add up to the whole's.

    `sequence_T` and `rewards_NK` share a device. On the CPU, which is recommended, rows without
    weight (-1, absent, a dead group) are dropped before the head and cost nothing; on hidden's
    CUDA device they are computed and zeroed, as dropping them would make the host wait.

    Returns:
        GRAOLoss: loss (0-d float32, differentiable in hidden_TD, head_VD and bias_V),
        exploration + imitation + alignment = -loss, logprob_T (T,) float32, NaN where the row has
        no weight, and advantages_NK on the device of the rewards.

    Raises:
        ValueError: a shape, dtype, device, option or (on the CPU) index that does not fit.
        RuntimeError: a second backward pass through one loss.

    Source: arXiv 2508.07750, equations 2-4.
    """
    check_operands(hidden_TD, head_VD, target_T, bias_V)
    check_rewards("rewards_NK", rewards_NK)
    check_home("rewards_NK", rewards_NK, hidden_TD)
    check_index("sequence_T", sequence_T, (hidden_TD.shape[0],), hidden_TD)
    if sequence_T.device != rewards_NK.device:
        raise ValueError(
            f"sequence_T is on {sequence_T.device} and rewards_NK on {rewards_NK.device}: "
            "put both on the CPU (recommended), or both beside hidden_TD"
        )
    check_choice("statistics", statistics, STATISTICS)
    check_choice("reference_advantage", reference_advantage, REFERENCE_ADVANTAGES)
    check_number("beta", beta)
    check_number("lam", lam)
    if num_prompts is not None:
        check_number("num_prompts", num_prompts, above=0)
    transform = logit_transform(temperature, logit_scale, softcap)
    backend = choose_backend(backend, hidden_TD.device)

    advantages_NK, terms_3T = ops.grao_terms(
        rewards_NK, sequence_T, beta, lam, statistics, reference_advantage, num_prompts, backend
    )
    loss, parts_3, logprob_T = weighted_terms(
        hidden_TD, head_VD, bias_V, target_T, terms_3T, transform, workspace_mib, backend
    )
    return GRAOLoss(loss, *parts_3.unbind(), logprob_T, advantages_NK)
