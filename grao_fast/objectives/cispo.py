"""CISPO: the log-prob of every token, weighed by a truncated ratio that is held constant.

    loss = -(1 / sum_i |o_i|) sum_i sum_t sg(clip(rho_it, 1 - low, 1 + high)) A_i logp_it
    A_i  = (r_i - mean) / sigma,    rho_it = exp(logp_it - old_it)

over all samples i of the step's prompts. Where PPO's clip takes a token's gradient away, here the
token keeps one. The reference takes no part. On policy, the gradient is that of DAPO.

The paper has no bound from below, and tunes the one from above without giving it. So low = 1 is no
bound; high = 4, a ratio of 5 at most, is of arXiv 2510.13786, which trains with this loss.

Source: arXiv 2506.13585, Eq. 4 and 5, whose sum over i is over one prompt's group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grao_fast.objectives.dapo import DAPO


@dataclass(frozen=True)
class CISPO(DAPO):
    """Clipped importance-sampling-weight policy optimisation."""

    ratio: ClassVar[str] = "truncated"
    clip: ClassVar[tuple[float, float] | None] = (1.0, 4.0)
