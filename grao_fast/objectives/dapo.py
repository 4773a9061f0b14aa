"""DAPO: GRPO with two clips and the mean over tokens.

    loss = -(1 / sum_i |o_i|) sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
    A_i  = (r_i - mean) / sigma,    rho_it = exp(logp_it - old_it)

over all samples i of the step's prompts, so that a token weighs the same in a long sample as in a
short one. The bound from above is the wider one, low = 0.2 and high = 0.28, for unlikely tokens to
become likelier. The reference takes no part.

Two more parts of the method are elsewhere: dynamic sampling, which draws other prompts in place of
dead groups, is an option of the trainer; overlong reward shaping is a reward, and so is the user's.
There is no KL term.

Source: arXiv 2503.14476, Eq. 8 and 9, whose sums are over one prompt's group; the authors' code
takes the mean over the tokens of a whole batch, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.grpo import GRPO
from grao_fast.objectives.statistics import mean_over_sample_tokens


@dataclass(frozen=True)
class DAPO(Objective):
    """Decoupled clip and dynamic sampling policy optimisation, its loss."""

    uses_references: ClassVar[bool] = False
    clip: ClassVar[tuple[float, float] | None] = (0.2, 0.28)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return GRPO().advantages(rewards_NK)

    def coefficients(self, groups: Groups) -> Tensor:
        return mean_over_sample_tokens(self.advantages(groups.rewards_NK), groups)[None]
