"""The GRAO loss of a linear head: from hidden states and rewards to loss and gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .advantage import (
    REFERENCE_ADVANTAGES,
    STATISTICS,
    check_rewards,
)
from .checks import (
    check_choice,
    check_constant,
    check_home,
    check_index,
    check_number,
    check_operands,
    choose_backend,
    logit_transform,
)
from .linear_ce import weighted_terms
from .one_pass import ops
from .one_pass.live_rows import to_device
from .vocab_parallel import VocabParallel, local_parts


class GRAOLoss(NamedTuple):
    """`loss` is differentiable, the rest are constants; the three terms sum to kl - loss.

    `entropy_T` and `top1_T` are None unless asked for.
    """

    loss: Tensor
    exploration: Tensor
    imitation: Tensor
    alignment: Tensor
    logprob_T: Tensor
    advantages_NK: Tensor
    kl: Tensor
    entropy_T: Tensor | None
    top1_T: Tensor | None


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
    old_logprob_T: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    sampler_logprob_T: Tensor | None = None,
    sampler_cap: float | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float | None = None,
    entropy: bool = False,
    top1: bool = False,
    workspace_mib: float | None = None,
    backend: str | None = None,
    head_grad_VD: Tensor | None = None,
    vocab_parallel: VocabParallel | None = None,
) -> GRAOLoss:
    """Group Relative Alignment Optimization, in one pass over the vocabulary.

    J = (1/G) sum_i A_i L(o_i) + beta A_y L(y) + lam (1/G) sum_i A_i (L(o_i) - L(y)),
    loss = -sum of J over prompts / num_prompts, with L(s) the mean over s of
    log softmax(z)[target], z = softcap((hidden head^T + bias) * logit_scale) / temperature.

    Off policy, a token of weight w adds w * value in place of w * logp: the ratio
    rho = exp(logp - old), or with a clip min(w rho, w clamp(rho, 1 - low, 1 + high)), as in PPO;
    times the constant min(exp(old - sampler), cap). Where rho = 1 gradients are the paper's, to the
    bit. With a frozen reference policy, the loss has one more term: kl, kl_coef times the mean over
    samples of the mean over their tokens of exp(ref - logp) - (ref - logp) - 1. Samples of weight 0
    are computed for it as well. All of it depends on a token's own log-prob: one pass does it.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16: what predicts each token, in any order.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32: the token, in [0, V); any value where the row has no weight.
        sequence_T: (T,) int64 or int32: n * K + k for a token of sequence k of prompt n, the
            reference being k = K - 1; -1 for a row that does not count.
        rewards_NK: (N, K) floats, K = G + 1, the reference last; NaN for an absent sequence.
        beta, lam: weights of imitation and of the alignment regulariser.
        statistics, reference_advantage: as in `group_advantages`.
        old_logprob_T: (T,) floats, constants: log-probs under the policy that made the update's
            data; NaN for a row that is on policy, as a reference y may be: its value is logp.
        clip: (low, high), both at least 0 and low at most 1; None for no clip.
        sampler_logprob_T: (T,), under the sampler's own numerics; NaN for a row of none. Without
            `old_logprob_T`, `old` is the row's own log-prob, and a constant there.
        sampler_cap: C; None for no cap.
        ref_logprob_T: (T,), under the reference policy; NaN for a row of none, whose kl is 0.
        kl_coef: weight of kl; goes with ref_logprob_T.
        entropy, top1: whether to return entropies, and whether the target is the likeliest token.
        bias_V, temperature, logit_scale, softcap, workspace_mib, backend, head_grad_VD,
            vocab_parallel: as in `linear_weighted_cross_entropy`.
        num_prompts: the divisor, N by default. Give the whole batch's when this call has a part
            of it, and the parts' losses and gradients add up to the whole's.

    `sequence_T` and `rewards_NK` share a device. On the CPU, which is recommended, rows without
    weight (-1, absent, a dead group) are dropped before the head and cost nothing; on hidden's
    CUDA device they are computed and zeroed, as dropping them would make the host wait.

    Returns:
        GRAOLoss: loss (0-d float32, differentiable in hidden_TD, head_VD and bias_V),
        exploration + imitation + alignment = kl - loss, logprob_T (T,) float32, NaN where the row
        has no weight, advantages_NK on the device of the rewards, kl, and entropy_T and top1_T,
        (T,) float32, NaN where logprob_T is, or None.

    Raises:
        ValueError: a shape, dtype, device, option or (on the CPU) index that does not fit.
        RuntimeError: a second backward pass through one loss, or one with create_graph=True.

    Source: arXiv 2508.07750, equations 2-4.
    """
    parts = local_parts(hidden_TD, head_VD, bias_V, vocab_parallel)
    hidden_TD = parts.hidden_TD
    check_operands(hidden_TD, parts.head_VD, target_T, parts.bias_V)
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

    policy = (old_logprob_T, sampler_logprob_T, ref_logprob_T)
    bounds = _check_policy(*policy, clip, sampler_cap, kl_coef, hidden_TD)
    off_policy = any(each is not None for each in policy)

    advantages_NK, terms_3T, kl_coef_T = ops.grao_terms(
        rewards_NK,
        sequence_T,
        beta,
        lam,
        statistics,
        reference_advantage,
        num_prompts,
        0.0 if kl_coef is None else kl_coef,
        backend,
    )
    result = weighted_terms(
        parts,
        target_T,
        terms_3T,
        transform,
        workspace_mib,
        backend,
        head_grad_VD,
        policy_3T=_stacked(policy, hidden_TD) if off_policy else None,
        kl_coef_T=kl_coef_T if off_policy else None,
        bounds=bounds,
        entropy=entropy,
        top1=top1,
    )
    return GRAOLoss(
        result.loss,
        *result.parts_C.unbind(),
        result.logprob_T,
        advantages_NK,
        result.kl,
        result.entropy_T if entropy else None,
        result.top1_T if top1 else None,
    )


def _check_policy(
    old_logprob_T: Tensor | None,
    sampler_logprob_T: Tensor | None,
    ref_logprob_T: Tensor | None,
    clip: tuple[float, float] | None,
    sampler_cap: float | None,
    kl_coef: float | None,
    hidden_TD: Tensor,
) -> tuple[float, float, float]:
    """The bounds of the ratio, and of the importance weight; ValueError names what does not fit."""
    T = hidden_TD.shape[0]
    for name, tensor in (
        ("old_logprob_T", old_logprob_T),
        ("sampler_logprob_T", sampler_logprob_T),
        ("ref_logprob_T", ref_logprob_T),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (T,):
            raise ValueError(f"{name} must be ({T},), got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        check_constant(name, tensor)
        check_home(name, tensor, hidden_TD)
    for name, option, tensor_name, tensor in (
        ("clip", clip, "old_logprob_T", old_logprob_T),
        ("sampler_cap", sampler_cap, "sampler_logprob_T", sampler_logprob_T),
        ("kl_coef", kl_coef, "ref_logprob_T", ref_logprob_T),
    ):
        if option is not None and tensor is None:
            raise ValueError(f"{name} has no effect without {tensor_name}: give both, or neither")
    if ref_logprob_T is not None:
        if kl_coef is None:
            raise ValueError("ref_logprob_T has no effect without kl_coef: give both, or neither")
        check_number("kl_coef", kl_coef)
    if sampler_cap is not None:
        check_number("sampler_cap", sampler_cap, above=0)
    if clip is None:
        low, high = -math.inf, math.inf
    else:
        if not isinstance(clip, (tuple, list)) or len(clip) != 2:
            raise ValueError(f"clip must be a pair (low, high), got {clip!r}")
        check_number("clip[0]", clip[0])
        check_number("clip[1]", clip[1])
        if not 0 <= clip[0] <= 1 or clip[1] < 0:
            raise ValueError(f"clip must be (low, high) with 0 <= low <= 1 <= 1 + high, got {clip}")
        low, high = 1 - clip[0], 1 + clip[1]
    return low, high, math.inf if sampler_cap is None else sampler_cap


def _stacked(policy: tuple[Tensor | None, ...], hidden_TD: Tensor) -> Tensor:
    """Old, sampler and ref log-probs, (3, T) float32 beside hidden; NaN for what is not given."""
    absent_T = hidden_TD.new_full(hidden_TD.shape[:1], math.nan, dtype=torch.float32)
    given = [absent_T if each is None else to_device(each, hidden_TD.device) for each in policy]
    return torch.stack([each.float() for each in given])
