"""The rewards of a group's samples and reference: their totals, and what counts as equal.

Suffixes: S rows of all processes, F reward functions, N prompts, K = G + 1 sequences of each, the
reference last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter, signature
from math import nan
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from grao_fast.kernels.checks import check_number
from grao_fast.system.errors import UserError

REWARD_COLUMN = "reference_reward"

# TRL's rewards and weights are float32, so each product is off by one eps of itself at most, and
# the totals of two sequences by two eps of what they add up; twice that leaves room for the rest.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


def totals(rewards_SF: Tensor, weights_F: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sums of rewards, as TRL forms them, and of their absolute values.

    Both are (S,) float64 on the CPU, since some devices have no float64. A sum is NaN where every
    function gave None.
    """
    rewards_SF = rewards_SF.cpu().double()
    weighted_SF = rewards_SF * weights_F.cpu().double()
    total_S = weighted_SF.nansum(1).where(~rewards_SF.isnan().all(1), torch.nan)
    return total_S, weighted_SF.abs().nansum(1)


def equal_to_rounding(rewards_NK: Tensor, size_N: Tensor) -> Tensor:
    """Rewards, with the lowest sample's in place of those that differ from it by rounding alone.

    Otherwise a group of 0.1 + 0.2 and 0.3 would not be dead: advantages are in units of a group's
    standard deviation, however small.

    size_N: the largest absolute value in each group of what its rewards are sums of.
    """
    low_N1 = rewards_NK[:, :-1].nan_to_num(torch.inf).amin(1, keepdim=True)
    near_NK = (rewards_NK - low_N1).abs() <= _ROUNDING * size_N[:, None]
    return torch.where(near_NK, low_N1, rewards_NK)


def given_reward(row: Mapping[str, Any], where: str) -> float:
    """The reward that a row gives its reference; NaN if it gives none."""
    value = row.get(REWARD_COLUMN)
    if value is None:
        return nan
    check_number(f"{where}, `{REWARD_COLUMN}`", value)
    return float(value)


def names_needing(
    fields: Iterable[str], rewards: Sequence[Any], names: Sequence[str]
) -> dict[str, list[str]]:
    """Fields that reward functions have as parameters without a default, and their names."""
    parameters = {
        name: signature(reward).parameters
        for reward, name in zip(rewards, names, strict=True)
        if not isinstance(reward, nn.Module)
    }
    needing = {
        field: [
            name
            for name, own in parameters.items()
            if field in own and own[field].default is Parameter.empty
        ]
        for field in fields
    }
    return {field: found for field, found in needing.items() if found}


def refuse_unscored(needing: Mapping[str, Sequence[str]], references: str) -> NoReturn:
    """Raise the error of references that reward functions cannot score.

    needing: fields that samples alone have, and the functions that need them.
    """
    field, names = next(iter(needing.items()))
    raise UserError(
        f"{', '.join(names)} needs `{field}`, which samples alone have: give {references} a reward "
        f"in the column `{REWARD_COLUMN}`, on the scale of the samples' weighted sum of rewards"
    )
