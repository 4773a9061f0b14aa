"""DPO on the best and the worst of each group, in two passes.

    loss = -(1/N) sum_n [(1 - eps) log sigmoid(m_n) + eps log sigmoid(-m_n)]
    m_n  = beta (log pi(y+) / pi_0(y+) - log pi(y-) / pi_0(y-))

pi_0 is the policy that training began with, y+ the sequence with the highest reward in its group,
and y- the one with the lowest, the reference included; among equals, the first. A group whose
rewards are all equal has no pair, and adds nothing to the mean over N prompts. Log-probs are sums
over tokens. A first pass over the head gives m_n, and a second one the gradient, in which a token
of y+ has the coefficient beta u_n / N, a token of y- its negative, and u = (1 - eps) sigmoid(-m) -
eps sigmoid(m).

The paper's pairs are a data set's; here the samples of each step make them, as in online DPO. The
label smoothing eps, the probability that a pair is the other way round, is 0 in the paper.

Sources: arXiv 2305.18290, Eq. 7; arXiv 2402.04792 (pairs of the policy's own samples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grao_fast.objectives.base import Groups, Objective, Rows, SecondPass
from grao_fast.objectives.options import check_number
from grao_fast.objectives.sequences import live_rows
from grao_fast.system.errors import UserError


@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation.

    beta: how much of the log-ratio is reward; small values let the policy go further from pi_0.
    label_smoothing: in [0, 0.5), the probability that a pair is the other way round.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    clip: ClassVar[tuple[float, float] | None] = None
    two_passes: ClassVar[bool] = True
    needs_initial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "beta", above=0)
        check_number(self, "label_smoothing", least=0, below=0.5)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        """1 for the best of a group, -1 for the worst, 0 for the others."""
        rewards_NK = rewards_NK.double()
        absent_NK = rewards_NK.isnan()
        high_N, best_N = rewards_NK.masked_fill(absent_NK, -torch.inf).max(1)
        low_N, worst_N = rewards_NK.masked_fill(absent_NK, torch.inf).min(1)
        is_pair_N1 = (high_N > low_N)[:, None].double()
        advantages_NK = torch.zeros_like(rewards_NK)
        advantages_NK.scatter_(1, best_N[:, None], is_pair_N1)
        advantages_NK.scatter_(1, worst_N[:, None], -is_pair_N1)
        return advantages_NK.masked_fill(absent_NK, torch.nan)

    def coefficients(self, groups: Groups) -> Tensor:
        present_NK = groups.present_NK
        signs_NK = self.advantages(groups.rewards_NK.where(present_NK, torch.nan))
        return signs_NK.where(present_NK, 0.0)[None] / len(signs_NK)

    def second_pass(self, terms_CT: Tensor, rows: Rows) -> SecondPass:
        if rows.ref_logprob_T is None:
            raise UserError("DPO needs ref_logprob_T, of the policy that training began with")
        live = live_rows(terms_CT, rows)
        terms_R = live.take(terms_CT[0])
        by_group = live._replace(sequence_R=live.sequence_R // rows.K)
        # A group's coefficients are 1/N for its best sequence and -1/N for its worst one.
        share_S = by_group.first(terms_R.abs())
        gap_R = live.logprob_R - live.take(rows.ref_logprob_T)
        margin_S = self.beta * by_group.sums(terms_R.sign() * gap_R)
        eps = self.label_smoothing
        value_S = (1 - eps) * logsigmoid(margin_S) + eps * logsigmoid(-margin_S)
        slope_S = (1 - eps) * (-margin_S).sigmoid() - eps * margin_S.sigmoid()
        terms_R = terms_R * self.beta * slope_S[by_group.sequence_R]
        values_1 = (share_S * value_S).sum()[None]
        return SecondPass(live.spread(terms_R[None], terms_CT.shape[1]), values_1)
