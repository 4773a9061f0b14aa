"""From a rollout to the groups that a step learns from, with the coefficients of its objective.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, the reference last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import Group
from grao_fast.kernels.advantage import sample_shares
from grao_fast.objectives import Groups
from grao_fast.training.rollout import Rollout


def groups_of(rollout: Rollout, objective: ObjectiveOptions) -> Groups:
    """The rewards and lengths of a rollout, from which the objective makes coefficients."""
    return Groups(
        rewards_NK=rollout.rewards_NK,
        length_NK=torch.tensor(
            [[len(ids) for ids in sequences] for sequences in _sequences(rollout)]
        ),
        max_new_tokens=objective.max_new_tokens,
        progress=rollout.progress,
    )


def to_groups(rollout: Rollout, objective: ObjectiveOptions) -> list[Group]:
    """The groups of a rollout, with the coefficients of the objective and of the KL."""
    groups = groups_of(rollout, objective)
    terms_CNK = objective.formula.coefficients(groups)
    kl_coef_NK = _kl_coefficients(groups, objective.kl_coef) if objective.kl_coef else None
    return [
        Group(
            prompt_ids=prompt.prompt_ids,
            sequence_ids=sequences,
            terms_CK=terms_CNK[:, n],
            kl_coef_K=None if kl_coef_NK is None else kl_coef_NK[n],
            sampler_logprobs=[c.logprobs for c in completions],
        )
        for n, (prompt, completions, sequences) in enumerate(
            zip(rollout.prompts, rollout.completions, _sequences(rollout), strict=True)
        )
    ]


def _sequences(rollout: Rollout) -> list[list[list[int]]]:
    """The token ids of each prompt's K sequences, empty where one is absent."""
    G = rollout.rewards_NK.shape[1] - 1
    return [
        [*(c.token_ids for c in group), *[[]] * (G - len(group)), prompt.reference_ids]
        for prompt, group in zip(rollout.prompts, rollout.completions, strict=True)
    ]


def _kl_coefficients(groups: Groups, kl_coef: float) -> Tensor:
    """(N, K) kl_coef times the mean over prompts, samples and tokens; 0 for references."""
    shares_NK = kl_coef * sample_shares(groups.rewards_NK)
    return shares_NK / (groups.length_NK.clamp(min=1) * len(groups.length_NK))
