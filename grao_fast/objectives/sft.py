"""Supervised fine-tuning: the mean log-prob of the references' tokens.

    loss = -(sum_n sum_t log pi(y_nt)) / (sum_n |y_n|)

The mean is over all tokens of the step's references, as in most trainers. Nothing is sampled, and
no reward is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.statistics import imitation_coefficients, with_imitation


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning on references."""

    terms: ClassVar[tuple[str, ...]] = ("imitation",)
    needs_samples: ClassVar[bool] = False
    needs_references: ClassVar[bool] = True
    has_dead_groups: ClassVar[bool] = False
    clip: ClassVar[tuple[float, float] | None] = None

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return with_imitation(rewards_NK.double() * 0)

    def coefficients(self, groups: Groups) -> Tensor:
        return imitation_coefficients(groups)[None]
