"""GRAO's loss of a linear head: coefficients from rewards, then `linear_policy_loss`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .advantage import REFERENCE_ADVANTAGES, STATISTICS, check_rewards, tapered_rows
from .checks import check_choice, check_hidden, check_home, check_index, check_number
from .linear_policy import OffPolicy, Shaping, linear_policy_loss
from .one_pass import ops
from .vocab_parallel import VocabParallel


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
    reference_advantage: str = "floor",
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

    Off policy, the log-prob of a token becomes a clipped ratio with an importance weight, as
    `OffPolicy` defines it. At a ratio of 1, gradients are the paper's to the bit. With a frozen
    reference policy, the loss has one more term: kl, kl_coef times the mean over samples of the
    mean over their tokens of exp(ref - logp) - (ref - logp) - 1. Samples of weight 0 have one too,
    and are computed for it.

    Args:
        hidden_TD: (T, D) float32, bfloat16 or float16: what predicts each token, in any order.
        head_VD: (V, D), the same dtype; under `torch.autocast` both are cast to its dtype.
        target_T: (T,) int64 or int32: the token, in [0, V); any value where the row has no weight.
        sequence_T: (T,) int64 or int32: n * K + k for a token of sequence k of prompt n, the
            reference being k = K - 1; -1 for a row that does not count.
        rewards_NK: (N, K) floats, K = G + 1, the reference last; NaN for an absent sequence.
        beta, lam: weights of imitation and of the alignment regulariser.
        statistics: as in `group_advantages`.
        reference_advantage: what becomes of a reference that loses to its samples. "signed", the
            paper's: its log-probs are lowered. "clip": A_y is held at or above 0. "floor": w_y =
            beta A_y - (lam / G) sum_i A_i is; where it is negative, y has no part in any term.
            "tapered": where w_y < 0, y has sg(p) log p in place of log p in all terms, p being each
            token's probability (the shaping "dft"), so that its gradient w_y p fades as y gets
            unlikely.
        old_logprob_T, clip, sampler_logprob_T, sampler_cap, ref_logprob_T: as in `OffPolicy`. A
            reference y that is on policy has old_logprob_T NaN.
        kl_coef: weight of kl; goes with ref_logprob_T.
        bias_V, temperature, logit_scale, softcap, entropy, top1, workspace_mib, backend,
            head_grad_VD, vocab_parallel: as in `linear_policy_loss`.
        num_prompts: the divisor, N by default. A micro-batch takes the whole batch's, so that
            losses and gradients of all micro-batches add up to the batch's.

    `sequence_T` and `rewards_NK` share a device. On the CPU (recommended), rows without weight (-1,
    absent, a dead group) are dropped before the head and cost nothing; on hidden's CUDA device they
    are computed and zeroed, as dropping them would make the host wait.

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
    check_hidden(hidden_TD)
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
    for name, value, needed, other in (
        ("kl_coef", kl_coef, "ref_logprob_T", ref_logprob_T),
        ("ref_logprob_T", ref_logprob_T, "kl_coef", kl_coef),
    ):
        if value is not None and other is None:
            raise ValueError(f"{name} has no effect without {needed}: give both, or neither")
    if kl_coef is not None:
        check_number("kl_coef", kl_coef)
    advantages_NK, terms_3T, kl_coef_T = ops.grao_terms(
        rewards_NK,
        sequence_T,
        beta,
        lam,
        statistics,
        reference_advantage,
        num_prompts,
        0.0 if kl_coef is None else kl_coef,
    )
    shaping = None
    if reference_advantage == "tapered":
        K = rewards_NK.shape[1]
        shaping = Shaping("dft", tapered_rows(terms_3T, sequence_T % K == K - 1))
    result = linear_policy_loss(
        hidden_TD,
        head_VD,
        target_T,
        terms_3T,
        off_policy=OffPolicy(
            old_logprob_T,
            sampler_logprob_T,
            ref_logprob_T,
            None if kl_coef is None else kl_coef_T,
            clip,
            sampler_cap,
        ),
        shaping=shaping,
        bias_V=bias_V,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        entropy=entropy,
        top1=top1,
        workspace_mib=workspace_mib,
        backend=backend,
        head_grad_VD=head_grad_VD,
        vocab_parallel=vocab_parallel,
    )
    return GRAOLoss(
        result.loss,
        *result.terms_C.unbind(),
        result.logprob_T,
        advantages_NK,
        result.kl,
        result.entropy_T,
        result.top1_T,
    )
