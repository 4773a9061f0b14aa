"""Dynamic fine-tuning: SFT with every token weighed by its own probability, held constant.

    loss = -(sum_n sum_t sg(p_nt) logp_nt) / (sum_n |y_n|),    p_nt = exp(logp_nt)

The gradient of SFT is that of a reward of 1 / p, without bound where the policy finds a token
unlikely; the weight p makes it a reward of 1. Nothing is sampled, and no reward is needed. The mean
is that of `SFT`.

Source: arXiv 2508.05629, section 3, its loss of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from grao_fast.objectives.sft import SFT


@dataclass(frozen=True)
class DFT(SFT):
    """Dynamic fine-tuning on references."""

    shaping: ClassVar[str | None] = "dft"
