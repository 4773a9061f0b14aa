"""Bootstrap intervals of means over prompts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RESAMPLES = 10_000
_CHUNK = 4_000_000  # resamples x prompts held at once, 32 MB


def bootstrap_intervals(
    per_prompt: Mapping[str, Tensor], *, seed: int
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the means, from resamples of the prompts.

    All metrics share the resamples. Means ignore NaN, as the estimate itself does.
    """
    if not per_prompt:
        return {}
    values_NM = torch.stack(list(per_prompt.values()), dim=1)
    present_NM = (~values_NM.isnan()).double()
    values_NM = values_NM.nan_to_num(0.0)
    N = values_NM.shape[0]
    generator = torch.Generator().manual_seed(seed)
    means = []
    done, chunk = 0, max(1, _CHUNK // N)
    while done < RESAMPLES:
        B = min(chunk, RESAMPLES - done)
        drawn_BN = torch.randint(N, (B, N), generator=generator)
        drawn_BN += N * torch.arange(B)[:, None]
        # Counts of each prompt turn the sums of all resamples into one matrix product.
        count_BN = torch.bincount(drawn_BN.view(-1), minlength=B * N).view(B, N).double()
        means.append((count_BN @ values_NM) / (count_BN @ present_NM))
        done += B
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low_M, high_M = torch.cat(means).nanquantile(quantiles, dim=0).tolist()
    return dict(zip(per_prompt, zip(low_M, high_M, strict=True), strict=True))
