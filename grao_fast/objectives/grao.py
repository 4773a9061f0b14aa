"""GRAO (arXiv 2508.07750, equations 2-4).

    J = (1/G) sum_i A_i L(o_i)                    exploration
      + beta A_y L(y)                             imitation
      + lam (1/G) sum_i A_i (L(o_i) - L(y))       alignment

L(s) is the mean log-prob of a sequence, and A = (r - mu) / sigma within a group. Each term is
linear in the log-probs, so that a token's coefficients follow from rewards and lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from grao_fast.kernels import group_advantages, sequence_weights
from grao_fast.kernels.advantage import advantages_and_terms, tapered_rows
from grao_fast.objectives.base import Groups, Objective
from grao_fast.system.errors import UserError

Statistics = Literal["group", "samples"]
ReferenceAdvantage = Literal["signed", "clip", "floor", "tapered"]


@dataclass(frozen=True)
class GRAO(Objective):
    """beta, lam, statistics, reference_advantage: as `GRAOConfig` explains them."""

    beta: float = 0.5
    lam: float = 0.6
    statistics: Statistics = "group"
    reference_advantage: ReferenceAdvantage = "floor"

    terms: ClassVar[tuple[str, ...]] = ("exploration", "imitation", "alignment")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "lam"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def shaping(self) -> str | None:
        return "dft" if self.reference_advantage == "tapered" else None

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return group_advantages(
            rewards_NK,
            statistics=self.statistics,
            reference_advantage=self.reference_advantage,
        )

    def coefficients(self, groups: Groups) -> Tensor:
        _, terms_3NK = advantages_and_terms(
            groups.rewards_NK,
            statistics=self.statistics,
            reference_advantage=self.reference_advantage,
            beta=self.beta,
            lam=self.lam,
        )
        length_NK = groups.length_NK
        tokens_NK = length_NK.clamp(min=1) * len(length_NK)
        return torch.where(length_NK > 0, terms_3NK / tokens_NK, 0.0)

    def sequence_weights(self, groups: Groups) -> Tensor:
        return sequence_weights(
            self.advantages(groups.rewards_NK),
            beta=self.beta,
            lam=self.lam,
            reference_advantage=self.reference_advantage,
        )

    def shaped_rows(self, terms_CT: Tensor, is_reference_T: Tensor) -> Tensor:
        return tapered_rows(terms_CT, is_reference_T)
