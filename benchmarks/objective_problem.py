"""One batch for all objectives, with the log-probs that they compare their own with.

Shapes: T rows (tokens), D width, V vocabulary, N prompts, K = G + 1 sequences a prompt with the
reference last, S = N K sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from batches import SEQUENCE_ROWS, K, make_batch
from torch import Tensor

from grao_fast.kernels import linear_logprobs
from grao_fast.objectives import Groups, Objective, token_terms

LIVE = 0.5  # the share of rows that are no prompt's, in groups whose rewards differ
PROGRESS = 0.25  # of the run, for schedules

# (T, D, V). All objectives have one shape, so that their rows compare.
OBJECTIVE_SHAPES = {
    "cuda": (8192, 4096, 151936),
    "cpu": (1024, 576, 16384),
    "tiny": (1024, 32, 1031),
}


class Problem(NamedTuple):
    """A step's rows, on one device but for sequence_T and groups, which are on the CPU.

    hidden_TD, head_VD: leaves.
    sequence_T: n K + k, or -1 for a prompt's row.
    old_logprob_T: float32, of the rollout's policy; NaN in rows that were not sampled, as
        `as_batch_of` has it.
    initial_hidden_TD, initial_logprob_T: of the policy that training began with, float32 the
        log-probs. Its head is head_VD.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor
    groups: Groups
    old_logprob_T: Tensor
    initial_hidden_TD: Tensor
    initial_logprob_T: Tensor

    @property
    def K(self) -> int:
        return self.groups.rewards_NK.shape[1]

    @property
    def is_reference_T(self) -> Tensor:
        """On the CPU; True in rows of no sequence where all sequences are references."""
        return self.sequence_T % self.K == self.K - 1


def make_problem(
    shape_TDV: tuple[int, int, int], dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Problem:
    """Make groups of sequences whose targets have probabilities of all sizes.

    Half of the dead rows are prompts', half belong to groups of equal rewards, as `make_batch`
    spreads them. A target's logit is between 0 and that of a probability of about 0.8, so that
    functions of a row's own probability matter. Ratios keep away from the bounds of every clip:
    where a contender rounds, no row crosses one.
    """
    T, _, V = shape_TDV
    groups = make_batch((T, 1, 1), torch.float32, "cpu", live=LIVE, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    hidden_TD, head_VD, target_T = _operands(shape_TDV, generator)
    with torch.no_grad():
        row_TD = head_VD[target_T]
        logit_T = torch.rand(T, generator=generator, device=device) * (math.log(V) + 2)
        wanting_T = (logit_T - (hidden_TD * row_TD).sum(1)) / row_TD.square().sum(1)
        hidden_TD = (hidden_TD + wanting_T[:, None] * row_TD).to(dtype)
        noise_TD = torch.randn(hidden_TD.shape, generator=generator, device=device)
        initial_hidden_TD = (hidden_TD + 0.1 * noise_TD).to(dtype)
        head_VD = head_VD.to(dtype)
        logprob_T = linear_logprobs(hidden_TD, head_VD, target_T).logprob_T
        initial_logprob_T = linear_logprobs(initial_hidden_TD, head_VD, target_T).logprob_T
    return Problem(
        hidden_TD.requires_grad_(),
        head_VD.requires_grad_(),
        target_T,
        groups.sequence_T,
        _step(groups.sequence_T, groups.rewards_NK),
        logprob_T - _gaps(T, generator),
        initial_hidden_TD,
        initial_logprob_T,
    )


def as_batch_of(problem: Problem, objective: Objective) -> Problem:
    """The same rows as a batch of an objective, of sequences that it learns from.

    They are samples and references; or samples alone, a group's last one in place of its reference;
    or where nothing is sampled references alone.
    """
    counts_T = problem.sequence_T >= 0
    rewards_NK = problem.groups.rewards_NK
    place_T = torch.arange(len(counts_T)) // SEQUENCE_ROWS
    if not objective.needs_samples:
        rewards_NK = rewards_NK.view(-1, 1)
    elif not objective.uses_references:
        rewards_NK = F.pad(rewards_NK, (0, 1), value=math.nan)
        place_T = place_T // K * (K + 1) + place_T % K
    sequence_T = torch.where(counts_T, place_T, -1)
    found = problem._replace(sequence_T=sequence_T, groups=_step(sequence_T, rewards_NK))
    sampled_T = (counts_T & ~found.is_reference_T).to(problem.old_logprob_T.device)
    return found._replace(old_logprob_T=problem.old_logprob_T.where(sampled_T, math.nan))


def terms_of(problem: Problem, objective: Objective) -> Tensor:
    """(C, T) float32 on the CPU, the coefficients of each row."""
    return token_terms(objective.coefficients(problem.groups), problem.sequence_T)


def _operands(
    shape_TDV: tuple[int, int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head with logits of unit variance, in float32, and targets."""
    T, D, V = shape_TDV
    device = generator.device
    hidden_TD = torch.randn(T, D, generator=generator, device=device)
    head_VD = torch.randn(V, D, generator=generator, device=device).div_(D**0.5)
    return hidden_TD, head_VD, torch.randint(0, V, (T,), generator=generator, device=device)


def _gaps(T: int, generator: torch.Generator) -> Tensor:
    """log rho of each row: of four sizes, and all of every fourth sequence beyond every bound."""
    sizes = torch.tensor([-0.5, -0.1, 0.1, 0.5], device=generator.device)
    chosen_T = torch.randint(0, 4, (T,), generator=generator, device=generator.device)
    far_T = torch.arange(T, device=generator.device) // SEQUENCE_ROWS % 4 == 3
    return sizes[chosen_T] + torch.where(far_T, 1.0, 0.0)


def _step(sequence_T: Tensor, rewards_NK: Tensor) -> Groups:
    length_S = sequence_T[sequence_T >= 0].bincount(minlength=rewards_NK.numel())
    return Groups(
        rewards_NK=rewards_NK.double(),
        length_NK=length_S.view(rewards_NK.shape),
        max_new_tokens=SEQUENCE_ROWS,
        progress=PROGRESS,
    )
