"""GSPO: the clipped ratio of whole sequences, in two passes.

    loss = -(1/N) sum_n (1/G) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)
    s_i  = exp((1/|o_i|) sum_t (logp_it - old_it)),    A_i = (r_i - mean) / sigma

over N prompts and the G samples of each. The gradient of s_i is s_i times that of the mean
log-prob. So a first pass over the head gives s_i, and a second one the gradient, with the
coefficient s_i A_i / (N G |o_i|) for each token, or 0 where s_i is clipped. The reference takes no
part. On policy, s_i = 1, and the gradient is GRPO's.

The bounds are the paper's, far below those of tokens' ratios, as a mean over many tokens hardly
leaves 1. The variant GSPO-token, for advantages that differ within a sequence, has no use here.

Source: arXiv 2507.18071, Eq. 5 (objective), 6 (advantages) and 7 (ratio).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grao_fast.objectives.base import Groups, Objective, Rows, SecondPass
from grao_fast.objectives.grpo import GRPO
from grao_fast.objectives.options import check_number
from grao_fast.objectives.sequences import live_rows


@dataclass(frozen=True)
class GSPO(Objective):
    """Group sequence policy optimisation.

    low, high: a sequence's ratio is clipped to [1 - low, 1 + high].
    """

    low: float = 3e-4
    high: float = 4e-4

    uses_references: ClassVar[bool] = False
    clip: ClassVar[tuple[float, float] | None] = None
    clip_options: ClassVar[tuple[str, ...]] = ("low", "high")
    two_passes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "low", least=0, most=1)
        check_number(self, "high", least=0)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return GRPO().advantages(rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        return GRPO().coefficients(groups)

    def second_pass(self, terms_CT: Tensor, rows: Rows) -> SecondPass:
        live = live_rows(terms_CT, rows)
        terms_R = live.take(terms_CT[0])
        gap_R = torch.zeros_like(live.logprob_R)
        if rows.old_logprob_T is not None:
            # A row without an old log-prob is on policy.
            gap_R = live.logprob_R - live.take(rows.old_logprob_T)
            gap_R = gap_R.where(~gap_R.isnan(), 0.0)
        ratio_S = live.means(gap_R).exp()
        weight_S = live.sums(terms_R)
        held_S = torch.where(
            weight_S > 0, ratio_S.clamp(max=1 + self.high), ratio_S.clamp(min=1 - self.low)
        )
        slope_S = torch.where(held_S == ratio_S, ratio_S, 0.0)
        terms_R = terms_R * slope_S[live.sequence_R]
        values_1 = (weight_S * held_S).sum()[None]
        clipped_S = None
        if rows.old_logprob_T is not None:
            clipped_S = (held_S != ratio_S)[live.sequence_R.unique()].float()
        return SecondPass(live.spread(terms_R[None], terms_CT.shape[1]), values_1, clipped_S)
