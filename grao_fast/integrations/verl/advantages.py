"""Advantages for verl, from which its loss is GRAO's (arXiv 2508.07750, equations 2-4).

verl averages over sequences, whose token losses it has averaged: with K = G + 1 sequences a prompt,

    loss = -(1 / (N K)) sum_s a_s L(s)

so that a_s = K w_s makes it GRAO's, with the weights w_s of J = sum_s w_s L(s).

Suffixes: B rows (sequences), L places of a response, K sequences of a prompt, the reference last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from grao_fast.kernels import group_advantages, sequence_weights

NAME = "grao"
_DEFAULTS = {"beta": 0.5, "lam": 0.6, "statistics": "group", "reference_advantage": "floor"}


def is_reference(response_mask_BL: Tensor) -> Tensor:
    """(B,) bool: which rows are references.

    The response of a reference begins with the prompt's last token, which does not count; see
    `GRAOAgentLoop`. A sample's first token always counts, and a row without any is no reference.
    """
    mask_BL = response_mask_BL.bool()
    return ~mask_BL[:, 0] & mask_BL.any(1)


@register_adv_est(NAME)
def grao_advantages(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any],
    config: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages of every token, K w_s, and the same again in place of returns.

    Args:
        token_level_rewards: (B, L); a sequence's reward is their sum.
        response_mask: (B, L), not 0 for tokens that count.
        index: B identities of the prompts, whose sequences may be in any order.
        config: verl's `algorithm`; options of GRAO are in its `grao`: beta, lam, statistics and
            reference_advantage, as in `grao_fast.kernels.linear_grao_loss`.

    Returns:
        Two tensors (B, L) of the rewards' dtype, 0 where the mask is.

    Raises:
        ValueError: an option is unknown or wrong, or a prompt has several references.
    """
    options = _options(config)
    reward_B = token_level_rewards.double().sum(1)
    reference_B = is_reference(response_mask)
    advantage_B = torch.zeros_like(reward_B)
    rows_of: dict[Any, list[int]] = {}
    for row, prompt in enumerate(index):
        rows_of.setdefault(prompt, []).append(row)
    for prompt, rows in rows_of.items():
        samples = [row for row in rows if not reference_B[row]]
        references = [row for row in rows if reference_B[row]]
        if len(references) > 1:
            raise ValueError(f"prompt {prompt} has {len(references)} references; it may have one")
        if samples:
            advantage_B[samples + references] = _weights(reward_B, samples, references, options)
    advantage_BL = advantage_B[:, None] * response_mask
    advantage_BL = advantage_BL.to(token_level_rewards.dtype)
    return advantage_BL, advantage_BL.clone()


def _weights(
    reward_B: Tensor, samples: list[int], references: list[int], options: dict[str, Any]
) -> Tensor:
    """K w_s of a group's samples, then of its reference, if it has one."""
    absent = reward_B.new_full((1 - len(references),), torch.nan)
    rewards_1K = torch.cat([reward_B[samples + references], absent])[None]
    advantages_1K = group_advantages(
        rewards_1K,
        statistics=options["statistics"],
        reference_advantage=options["reference_advantage"],
    )
    of_weights = {name: options[name] for name in ("beta", "lam", "reference_advantage")}
    weights_1K = sequence_weights(advantages_1K, **of_weights)
    K = len(samples) + len(references)
    return K * weights_1K[0, :K]


def _options(config: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict((config.get("grao") if config is not None else None) or {})
    unknown = sorted(given.keys() - _DEFAULTS.keys())
    if unknown:
        raise ValueError(
            f"algorithm.grao has no option {unknown[0]!r}; it takes {', '.join(_DEFAULTS)}"
        )
    options = _DEFAULTS | given
    if options["reference_advantage"] == "tapered":
        raise ValueError(
            'algorithm.grao.reference_advantage="tapered" needs a loss that knows it, and an '
            'advantage says nothing of it: set "signed", "clip" or "floor"'
        )
    return options
