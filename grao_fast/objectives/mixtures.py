"""Mixtures of imitation and reinforcement: CHORD, UFT and HPT.

Each has two terms, `policy` on samples and `imitation` on references. References' rows have no
ratio. See each class for its formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.grpo import GRPO, DrGRPO
from grao_fast.objectives.options import check_number
from grao_fast.objectives.statistics import (
    Schedule,
    annealed,
    imitation_coefficients,
    mean_over_sample_tokens,
    reference_lengths,
    sample_rewards,
    with_imitation,
)

_TERMS = ("policy", "imitation")


@dataclass(frozen=True)
class CHORD(Objective):
    """GRPO and SFT, from mostly imitation to mostly exploration.

        loss   = (1 - mu) L_GRPO + mu L_SFT
        L_GRPO = -(sum_i A_i sum_t v_it) / (sum_i |o_i|)
        L_SFT  = -(sum_n sum_t log pi(y_nt)) / (sum_n |y_n|)

    Both are means over all tokens of the step, of samples and of references; A and v are those of
    `GRPO`. With `phi`, a token of L_SFT has the factor p (1 - p), a constant, with p = pi(y_t):
    tokens that are neither certain nor hopeless count most. mu falls from `mu_start` to `mu_end`
    over a share of the run, then stays.

    The paper's mu falls from 0.9 to 0.05 over 200 steps, for which half of the run stands here, in
    the authors' code along a cosine; with phi it is constant, 0.1:
    CHORD(mu_start=0.1, mu_end=0.1, phi=True).

    Source: arXiv 2508.11408, Eq. 1-3 (losses), 5 and 6 (phi).

    mu_start, mu_end: in [0, 1].
    decay: the share of the run over which mu falls.
    schedule: "linear" or "cosine".
    phi: whether references' tokens are weighted by p (1 - p).
    """

    mu_start: float = 0.9
    mu_end: float = 0.05
    decay: float = 0.5
    schedule: Schedule = "linear"
    phi: bool = False

    terms: ClassVar[tuple[str, ...]] = _TERMS
    needs_references: ClassVar[bool] = True
    has_dead_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "mu_start", least=0, most=1)
        check_number(self, "mu_end", least=0, most=1)
        check_number(self, "decay", above=0, most=1)

    @property
    def shaping(self) -> str | None:
        return "chord" if self.phi else None

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return with_imitation(GRPO().advantages(rewards_NK))

    def coefficients(self, groups: Groups) -> Tensor:
        mu = annealed(groups.progress, self.mu_start, self.mu_end, self.decay, self.schedule)
        policy_NK = mean_over_sample_tokens(GRPO().advantages(groups.rewards_NK), groups)
        return torch.stack([(1 - mu) * policy_NK, mu * imitation_coefficients(groups)])


@dataclass(frozen=True)
class UFT(Objective):
    """The objective of unified fine-tuning: GRPO, and the log-likelihood of the hint.

        loss = L_GRPO - hint_coef (1/N) sum_n p sum_t log pi(y_nt)

    In the paper the first l tokens of y are a hint, l ~ Binomial(|y|, p): samples continue it, and
    its own log-likelihood, a sum over its l tokens, is an objective beside their reward. p falls
    from `hint_start` to `hint_end` along half a cosine, and then is 0.

    The objective is what is here; the hint in the prompt is a matter of sampling, which the trainer
    does not do: samples begin at the prompt. So no token of y is in a hint more than another, and
    the sum over l tokens is replaced by its weight in expectation, p on each token of y. Without
    hints the reward of samples is as rare as in GRPO: that half of the method is absent.

    The defaults are the authors': 0.001, and from 0.95 to 0.05 over 300 of 500 steps. Their code
    averages over the hint's tokens, where the paper has a sum.

    Source: arXiv 2505.16984, section 3; Eq. B.1 for the cosine.

    hint_coef: weight of the log-likelihood.
    hint_start, hint_end: p, in [0, 1], the expected share of y in the hint.
    decay: the share of the run over which p falls; after it, p is 0.
    """

    hint_coef: float = 0.001
    hint_start: float = 0.95
    hint_end: float = 0.05
    decay: float = 0.6

    terms: ClassVar[tuple[str, ...]] = _TERMS
    needs_references: ClassVar[bool] = True
    has_dead_groups: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "hint_coef", least=0)
        check_number(self, "hint_start", least=0, most=1)
        check_number(self, "hint_end", least=0, most=1)
        check_number(self, "decay", above=0, most=1)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return with_imitation(GRPO().advantages(rewards_NK))

    def coefficients(self, groups: Groups) -> Tensor:
        share = 0.0
        if groups.progress < self.decay:
            bounds = (self.hint_start, self.hint_end)
            share = annealed(groups.progress, *bounds, self.decay, "cosine")
        has_tokens_NK = (reference_lengths(groups) > 0).double()
        imitation_NK = self.hint_coef * share / len(has_tokens_NK) * has_tokens_NK
        return torch.stack([GRPO().coefficients(groups)[0], imitation_NK])


@dataclass(frozen=True)
class HPT(Objective):
    """Hybrid post-training: reinforcement where a prompt's samples succeed, else imitation.

        loss = (1/N) sum_n { L_Dr.GRPO of prompt n             if P_n > gate
                           { -sft_coef (1/|y|) sum_t log pi(y_t)   if not

    P is the mean reward of the prompt's samples. The paper's reward is 0 or 1 and its gate 0: only
    a prompt that no sample solves is imitated; 2/8 for weaker models. A prompt whose samples have
    no reward is imitated too.

    Source: arXiv 2509.04419, Eq. 10-13 and Algorithm 1. The paper's loss has sft_coef = 1; the
    authors' code 0.3 for the smallest model, and it divides by the tokens of all references.

    gate: the mean reward above which a prompt is reinforced.
    sft_coef: weight of imitation.
    """

    gate: float = 0.0
    sft_coef: float = 1.0

    terms: ClassVar[tuple[str, ...]] = _TERMS
    needs_references: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "sft_coef", least=0)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        reinforced_N1 = self._reinforced(rewards_NK)
        advantages_NK = DrGRPO().advantages(rewards_NK) * reinforced_N1
        return with_imitation(advantages_NK, self.sft_coef * (~reinforced_N1[:, 0]).double())

    def coefficients(self, groups: Groups) -> Tensor:
        reinforced_N1 = self._reinforced(groups.rewards_NK)
        policy_NK = DrGRPO().coefficients(groups)[0] * reinforced_N1
        lengths_NK = reference_lengths(groups)
        imitation_NK = ~reinforced_N1 * (lengths_NK > 0) / lengths_NK.clamp(min=1)
        return torch.stack([policy_NK, self.sft_coef / len(policy_NK) * imitation_NK])

    def _reinforced(self, rewards_NK: Tensor) -> Tensor:
        """(N, 1) bool: whether the samples' mean reward is above the gate."""
        return sample_rewards(rewards_NK).nanmean(1, keepdim=True) > self.gate
