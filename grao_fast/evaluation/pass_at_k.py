"""pass@k: what the best of k samples of a prompt is worth.

Of n samples with scores x_1 <= ... <= x_n,

    pass_at_k = E[best of k of them, drawn without replacement] = sum_i C(i-1, k-1) x_i / C(n, k)

which is an unbiased estimate of the expected best of k samples. With scores of 0 and 1, c of them
1, it is pass@k of Chen et al., 2021 (arXiv 2107.03374): 1 - C(n-c, k) / C(n, k). pass_at_1 is the
mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grao_fast.reporting.tables import PASS_AT
from grao_fast.system.errors import UserError


def check_samples(num_generations_eval: int | None, metric: object) -> None:
    """Raise UserError if samples would be drawn that nothing scores."""
    if num_generations_eval is not None and metric is None:
        raise UserError(
            f"num_generations_eval={num_generations_eval} has no effect without a metric, which "
            "scores the samples: pass metric=, which may be the reward, or leave it out"
        )


def expected_best(scores: Sequence[float], k: int) -> float:
    """The expected best of k of the scores; NaN are left out, and NaN if fewer than k remain."""
    present = sorted(score for score in scores if not math.isnan(score))
    draws = math.comb(len(present), k)
    if draws == 0:
        return math.nan
    return sum(math.comb(i, k - 1) / draws * score for i, score in enumerate(present))


def pass_at_k(scores_NG: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """(N,) pass_at_k of each prompt, for k = 1, 2, 4... and the number of samples, by name."""
    n = max(map(len, scores_NG), default=0)
    powers = [2**power for power in range(n.bit_length())]  # up to n
    return {
        f"{PASS_AT}{k}": torch.tensor(
            [expected_best(scores, k) for scores in scores_NG], dtype=torch.float64
        )
        for k in sorted({*powers, n})
    }
