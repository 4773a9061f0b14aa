"""SRFT: imitation and reinforcement in one stage, weighed by entropies, in two passes.

    loss = (1/N) sum_n of
        imitation       -w_SFT (1/|y|) sum_t logp_t,            w_SFT = 0.5 sg(exp(-H_y))
        demonstration   -A_y (1/|y|) sum_t p_t
        exploration     -(1/G) sum_i R_i w_i (1/|o_i|) sum_t logp_t

        R_i = 1 and w_i = w_RL = 0.1 sg(exp(H_i))   if the sample's reward is above the threshold
        R_i = -1 and w_i = 1                        if not

H is the mean entropy of a sequence's tokens. References of which the policy is unsure are imitated
less; samples that succeed are reinforced more where it is unsure. A_y is the reference's advantage
in a group with the samples, (r_y - mean) / sigma. p_t = pi(y_t) is the ratio to a policy that is
sure of the reference, without a clip, as in LUFFY. A first pass over the head gives entropies and
probabilities, and a second one the gradient.

exp(H) is at most V, the size of the vocabulary: w_RL is meant for policies that are sure of most
tokens, and is large for one that knows little.

The paper leaves open over what H is taken. Here every sequence has its own, so that the gradient of
a step does not depend on its micro-batches. The paper's rewards are 1 and -1.

Source: arXiv 2506.19767, section 4: the weights w_SFT and w_RL, and the sum of three losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.kernels import group_advantages
from grao_fast.objectives.base import Groups, Objective, Rows, SecondPass
from grao_fast.objectives.options import check_number
from grao_fast.objectives.sequences import live_rows
from grao_fast.objectives.statistics import sample_counts, with_imitation


@dataclass(frozen=True)
class SRFT(Objective):
    """Supervised reinforcement fine-tuning.

    threshold: the reward above which a sample succeeds.
    """

    threshold: float = 0.0

    terms: ClassVar[tuple[str, ...]] = ("imitation", "demonstration", "exploration")
    has_dead_groups: ClassVar[bool] = False
    clip: ClassVar[tuple[float, float] | None] = None
    two_passes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "threshold")

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        """R_i of samples and 0.5 + A_y of references, their weight at H = 0 and p = 1."""
        return with_imitation(self._signs(rewards_NK), 0.5 + self._demonstration(rewards_NK))

    def coefficients(self, groups: Groups) -> Tensor:
        """What is known before the first pass: `second_pass` multiplies by what depends on H.

        The weight of imitation is K here, not 0.5, above any |A_y|: a row whose terms cancel is not
        computed, and these only seem to.
        """
        rewards_NK, length_NK = groups.rewards_NK, groups.length_NK
        weights_3NK = torch.zeros(3, *rewards_NK.shape, dtype=torch.float64)
        weights_3NK[0, :, -1] = rewards_NK.shape[1]
        weights_3NK[1, :, -1] = self._demonstration(rewards_NK)
        exploration_NK = self._signs(rewards_NK).nan_to_num(0.0) / sample_counts(rewards_NK)
        weights_3NK[2, :, :-1] = exploration_NK[:, :-1]
        weights_3NK = weights_3NK / (length_NK.clamp(min=1) * len(length_NK))
        return torch.where(length_NK > 0, weights_3NK, 0.0)

    def sequence_weights(self, groups: Groups) -> Tensor:
        weights_NK = self.advantages(groups.rewards_NK)
        weights_NK[:, :-1] /= sample_counts(groups.rewards_NK)
        return weights_NK.where(groups.length_NK > 0, 0.0).nan_to_num(0.0)

    def second_pass(self, terms_CT: Tensor, rows: Rows) -> SecondPass:
        live = live_rows(terms_CT, rows)
        imitation_R, demonstration_R, exploration_R = (live.take(term_T) for term_T in terms_CT)
        entropy_R = live.means(live.entropy_R)[live.sequence_R]
        imitation_R = imitation_R * (0.5 / rows.K) * (-entropy_R).exp()
        demonstration_R = demonstration_R * live.logprob_R.exp()
        succeeds_R = exploration_R > 0
        exploration_R = exploration_R * torch.where(succeeds_R, 0.1 * entropy_R.exp(), 1.0)
        values_3 = torch.stack(
            [
                (imitation_R * live.logprob_R).sum(),
                demonstration_R.sum(),  # of p, whose gradient is p times that of logp
                (exploration_R * live.logprob_R).sum(),
            ]
        )
        terms_3R = torch.stack([imitation_R, demonstration_R, exploration_R])
        return SecondPass(live.spread(terms_3R, terms_CT.shape[1]), values_3)

    def _demonstration(self, rewards_NK: Tensor) -> Tensor:
        """(N,) A_y; 0 without a reward."""
        return group_advantages(rewards_NK.double())[:, -1].nan_to_num(0.0)

    def _signs(self, rewards_NK: Tensor) -> Tensor:
        signs_NK = torch.where(rewards_NK.double() > self.threshold, 1.0, -1.0).double()
        return signs_NK.where(~rewards_NK.isnan(), torch.nan)
