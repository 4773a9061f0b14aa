"""The specification: GRAO in plain PyTorch, in the dtype of its inputs, with no regard to speed.

    J = (1/G) sum_i A_i L(o_i)                    exploration
      + beta A_y L(y)                             imitation
      + lam (1/G) sum_i A_i (L(o_i) - L(y))       alignment
    A = (r - mu) / sigma,    L(s) = (1/|s|) sum_t log pi(s_t),    loss = -J, averaged over prompts

Source: arXiv 2508.07750, equations 2-4. The rest of the package is tested against this file in
float64.

Shapes: T rows (tokens), D width, V vocabulary, N prompts, G samples a prompt, K = G + 1 sequences
a prompt with the reference y last. A reward of NaN means an absent sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceLoss(NamedTuple):
    """The loss and its terms: exploration + imitation + alignment = kl - loss."""

    loss: Tensor
    exploration: Tensor
    imitation: Tensor
    alignment: Tensor
    logprob_T: Tensor
    advantages_NK: Tensor
    kl: Tensor


def group_advantages(
    rewards_NK: Tensor, *, statistics: str = "group", reference_advantage: str = "floor"
) -> Tensor:
    """A = (r - mu) / sigma in each group of K, with the population's sigma.

    `statistics` selects the rewards behind mu and sigma: all present ones of the "group", or only
    the "samples" (the literal Eq. 4). If these are all equal, or there are none, the group is dead
    and A = 0. The test is for equality, not sigma = 0, because rounding gives eight rewards of 0.1
    a sigma of 1e-9. `reference_advantage="clip"` clips A_y at 0 from below; others leave it.
    """
    advantages_NK = torch.empty_like(rewards_NK)
    for n, rewards_K in enumerate(rewards_NK):
        basis = rewards_K if statistics == "group" else rewards_K[:-1]
        basis = basis[~basis.isnan()]
        if basis.numel() == 0 or basis.max() == basis.min():
            advantages_K = torch.zeros_like(rewards_K)
        else:
            mu = basis.mean()
            sigma = ((basis - mu) ** 2).mean().sqrt()
            advantages_K = (rewards_K - mu) / sigma
        if reference_advantage == "clip":
            advantages_K[-1] = advantages_K[-1].clamp(min=0)
        advantages_NK[n] = torch.where(rewards_K.isnan(), torch.nan, advantages_K)
    return advantages_NK


def sequence_weights(
    advantages_NK: Tensor,
    *,
    beta: float = 0.5,
    lam: float = 0.6,
    reference_advantage: str = "floor",
) -> Tensor:
    """The coefficients of L in J = sum_i w_i L(o_i) + w_y L(y); 0 for an absent sequence.

    w_i = (1 + lam) A_i / G,    w_y = beta A_y - (lam / G) sum_i A_i, G present samples.

    `reference_advantage="floor"` clips w_y at 0 from below; others leave it.
    """
    weights_NK = torch.zeros_like(advantages_NK)
    for n, advantages_K in enumerate(advantages_NK):
        present_G = ~advantages_K[:-1].isnan()
        samples = advantages_K[:-1][present_G]
        G = max(samples.numel(), 1)
        weights_NK[n, :-1][present_G] = (1 + lam) * samples / G
        if not advantages_K[-1].isnan():
            weights_NK[n, -1] = beta * advantages_K[-1] - lam / G * samples.sum()
    if reference_advantage == "floor":
        weights_NK[:, -1].clamp_(min=0)
    return weights_NK


def token_logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(z)[target] of each row, z = softcap((h W^T + b) * logit_scale) / temperature.

    softcap(x) = c tanh(x / c), or x if it is None.
    """
    logprobs_TV = _log_softmax(hidden_TD, head_VD, bias_V, temperature, logit_scale, softcap)
    return logprobs_TV.gather(1, target_T[:, None]).squeeze(1)


def token_entropies(
    hidden_TD: Tensor,
    head_VD: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """-sum_v p_v log p_v of each row, p = softmax(z), with z as in `token_logprobs`."""
    logprobs_TV = _log_softmax(hidden_TD, head_VD, bias_V, temperature, logit_scale, softcap)
    return -(logprobs_TV.exp() * logprobs_TV).sum(1)


def _log_softmax(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    logits_TV = hidden_TD @ head_VD.T
    if bias_V is not None:
        logits_TV = logits_TV + bias_V
    logits_TV = logits_TV * logit_scale
    if softcap is not None:
        logits_TV = softcap * torch.tanh(logits_TV / softcap)
    return torch.log_softmax(logits_TV / temperature, dim=-1)


def surrogate(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    sampler_logprob_T: Tensor,
    weight: Tensor,
    *,
    clip: tuple[float, float] | None = None,
    sampler_cap: float | None = None,
    ratio: str = "clipped",
) -> Tensor:
    """Each token's value off policy, in place of log pi(s_t), for a sequence of this weight.

    With rho = exp(logp - old): min(w rho, w clamp(rho, 1 - low, 1 + high)) / w, as in PPO, or with
    `ratio="truncated"` clamp(rho, 1 - low, 1 + high) logp with a constant first factor, as in
    CISPO; times the constant min(exp(old - sampler), sampler_cap). Where `old` is NaN the token is
    on policy: its value is logp, and old is its own log-prob. Where `sampler` is NaN the factor is
    1.
    """
    on_policy_T = old_logprob_T.isnan()
    old_logprob_T = torch.where(on_policy_T, logprob_T.detach(), old_logprob_T)
    rho_T = torch.exp(logprob_T - old_logprob_T)
    clipped_T = rho_T if clip is None else rho_T.clamp(1 - clip[0], 1 + clip[1])
    if ratio == "truncated":
        rho_T = clipped_T.detach() * logprob_T
    elif clip is not None:
        rho_T = torch.minimum(weight * rho_T, weight * clipped_T) / weight
    factor_T = torch.exp(old_logprob_T - sampler_logprob_T)
    if sampler_cap is not None:
        factor_T = factor_T.clamp(max=sampler_cap)
    factor_T = torch.where(sampler_logprob_T.isnan(), 1, factor_T)
    return factor_T * torch.where(on_policy_T, logprob_T, rho_T)


def shaped(logprob_T: Tensor, form: str) -> Tensor:
    """Each token's value as a function of its own probability p, in place of log pi(s_t).

    "dft" is p logp with a constant p (arXiv 2508.05629), "chord" is p (1 - p) logp with a constant
    p (1 - p) (arXiv 2508.11408), and "luffy" is p / (p + 0.1) (arXiv 2504.14945).
    """
    p_T = torch.exp(logprob_T)
    if form == "luffy":
        return p_T / (p_T + 0.1)
    factor_T = p_T if form == "dft" else p_T * -torch.expm1(logprob_T)
    return factor_T.detach() * logprob_T


def k3(logprob_T: Tensor, ref_logprob_T: Tensor, old_logprob_T: Tensor | None = None) -> Tensor:
    """Unbiased, non-negative estimates of KL(pi, ref) at samples of pi; 0 where `ref` is NaN.

    With `old`, at samples of that policy: multiplied by exp(logp - old), where NaN stands for pi
    itself, held constant.
    """
    gap_T = torch.where(ref_logprob_T.isnan(), 0, ref_logprob_T - logprob_T)
    kl_T = torch.exp(gap_T) - gap_T - 1
    if old_logprob_T is None:
        return kl_T
    old_logprob_T = torch.where(old_logprob_T.isnan(), logprob_T.detach(), old_logprob_T)
    return torch.exp(logprob_T - old_logprob_T) * kl_T


def grao_loss(
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
    num_prompts: int | None = None,
    old_logprob_T: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    sampler_logprob_T: Tensor | None = None,
    sampler_cap: float | None = None,
    ref_logprob_T: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_times_ratio: bool = False,
) -> ReferenceLoss:
    """The loss and its three components as the paper writes them, one prompt after another.

    `sequence_T` holds n * K + k for a row of sequence k of prompt n, and -1 for a row that does
    not count. L of a sequence that is absent or has no rows is 0. A sequence of weight 0 (in a dead
    group, or a sample at the group's mean) adds nothing and is not computed: its rows may hold
    anything, and `logprob_T` is NaN there. A reference whose weight is held at 0 has L(y) = 0.
    "tapered" replaces log pi of a reference of negative weight by `shaped` of the form "dft".

    Off policy, `surrogate` replaces log pi. With `ref_logprob_T`, the loss has one more term:
    kl = kl_coef (1/G) sum_i mean of `k3` over o_i, samples of weight 0 included; with
    `kl_times_ratio`, of `k3` at samples of the old policy.
    """
    absent_T = torch.full_like(hidden_TD[:, 0], torch.nan)
    old_logprob_T = absent_T if old_logprob_T is None else old_logprob_T.to(absent_T)
    sampler_logprob_T = absent_T if sampler_logprob_T is None else sampler_logprob_T.to(absent_T)
    regularised = ref_logprob_T is not None and kl_coef != 0
    ref_logprob_T = absent_T if ref_logprob_T is None else ref_logprob_T.to(absent_T)
    K = rewards_NK.shape[1]
    prompts = rewards_NK.shape[0] if num_prompts is None else num_prompts
    advantages_NK = group_advantages(
        rewards_NK, statistics=statistics, reference_advantage=reference_advantage
    ).to(hidden_TD.dtype)
    weights_NK = sequence_weights(
        advantages_NK, beta=beta, lam=lam, reference_advantage=reference_advantage
    )
    logprob_T = torch.full_like(hidden_TD[:, 0], torch.nan)
    zero = (hidden_TD[:0].sum() + head_VD[:0].sum()) * 0.0
    exploration, imitation, alignment, kl = zero, zero, zero, zero

    for n, advantages_K in enumerate(advantages_NK):
        present = [k for k in range(K) if not advantages_K[k].isnan()]
        samples = [k for k in present if k < K - 1]
        G = max(len(samples), 1)
        mean_logprob = [zero] * K
        for k in present:
            rows = (sequence_T == n * K + k).nonzero().squeeze(1)
            weight = weights_NK[n, k]
            penalised = regularised and k < K - 1
            if rows.numel() > 0 and (weight != 0 or penalised):
                logprob = token_logprobs(
                    hidden_TD[rows],
                    head_VD,
                    target_T[rows],
                    bias_V=bias_V,
                    temperature=temperature,
                    logit_scale=logit_scale,
                    softcap=softcap,
                )
                logprob_T[rows] = logprob.detach()
                if reference_advantage == "tapered" and k == K - 1 and weight < 0:
                    mean_logprob[k] = shaped(logprob, "dft").mean()
                elif weight != 0:
                    mean_logprob[k] = surrogate(
                        logprob,
                        old_logprob_T[rows],
                        sampler_logprob_T[rows],
                        weight,
                        clip=clip,
                        sampler_cap=sampler_cap,
                    ).mean()
                if penalised:
                    old_logprob = old_logprob_T[rows] if kl_times_ratio else None
                    kl = kl + kl_coef * k3(logprob, ref_logprob_T[rows], old_logprob).mean() / G
        for k in samples:
            exploration = exploration + advantages_K[k] * mean_logprob[k] / G
            gap = mean_logprob[k] - mean_logprob[-1]
            alignment = alignment + lam * advantages_K[k] * gap / G
        if K - 1 in present:
            imitation = imitation + beta * advantages_K[-1] * mean_logprob[-1]

    exploration, imitation, alignment, kl = (
        term / prompts for term in (exploration, imitation, alignment, kl)
    )
    loss = kl - (exploration + imitation + alignment)
    return ReferenceLoss(loss, exploration, imitation, alignment, logprob_T, advantages_NK, kl)
