"""Objectives of a token's own log-prob, and of whole sequences, against their float64 formulas.

An objective takes the path of the trainer: coefficients of all groups of a step, then a weighted
pass over the head for each micro-batch, after one without gradients if it takes two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from formed_cases import CASES, Case
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import (
    OffPolicy,
    Shaping,
    linear_logprobs,
    linear_policy_loss,
    reference,
)
from grao_fast.objectives.base import Groups, Objective, Rows, token_terms
from grao_fast.objectives.dpo import DPO
from grao_fast.objectives.gspo import GSPO
from grao_fast.objectives.luffy import LUFFY
from grao_fast.objectives.srft import SRFT
from grao_fast.system.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAN = math.nan
REWARDS_NK = torch.tensor(
    [
        [0.7, -1.2, 3.0, 2.0, 1.1],
        [0.1, 0.1, 0.1, 0.1, 0.1],  # dead
        [-0.4, NAN, 1.5, 0.9, NAN],  # a sample and the reference are absent
        [1.0, -1.0, 1.0, -1.0, 0.0],  # ties of the best and of the worst
        [1.0, 0.0, 0.0, 0.0, 0.0],  # A_y = -0.5, which cancels SRFT's weight of imitation
        [NAN, NAN, NAN, NAN, NAN],
    ],
    dtype=torch.float64,
)
LENGTH_NK = torch.tensor(
    [
        [3, 2, 0, 1, 3],  # the best sample has no token
        [2, 1, 1, 1, 2],
        [2, 2, 1, 3, 0],  # a sample with tokens and no reward
        [1, 2, 3, 2, 1],
        [1, 2, 3, 1, 2],
        [0, 0, 0, 0, 2],  # a reference without a reward
    ]
)
N, K = REWARDS_NK.shape


@dataclass(frozen=True)
class Problem:
    """Rows in a random order, of which some do not count; log-probs of other policies."""

    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor
    old_logprob_T: Tensor | None
    ref_logprob_T: Tensor

    def rows(self, of_prompts: list[int]) -> Problem:
        """The micro-batch of some prompts, counted anew."""
        prompt_T = self.sequence_T.div(K, rounding_mode="floor")
        chosen_T = sum((prompt_T == n for n in of_prompts), start=prompt_T < 0)
        index_N = torch.full((N,), -1)
        index_N[of_prompts] = torch.arange(len(of_prompts))
        sequence_T = self.sequence_T[chosen_T]
        renumbered_T = index_N[sequence_T.clamp(min=0) // K] * K + sequence_T % K
        return Problem(
            self.hidden_TD[chosen_T],
            self.head_VD,
            self.target_T[chosen_T],
            torch.where(sequence_T >= 0, renumbered_T, -1),
            None if self.old_logprob_T is None else self.old_logprob_T[chosen_T],
            self.ref_logprob_T[chosen_T],
        )


def make_problem(steps: list[float], dtype: torch.dtype, D: int = 9, V: int = 61) -> Problem:
    """The policy's log-probs less `steps`, in turn, are those of the policy that it was.

    The rows that do not count hold NaN, and so do the log-probs of references, which are not
    sampled.
    """
    generator = torch.Generator().manual_seed(0)
    sequence_T = torch.arange(N * K).repeat_interleave(LENGTH_NK.flatten())
    sequence_T = torch.cat([sequence_T, torch.full((3,), -1)])
    sequence_T = sequence_T[torch.randperm(len(sequence_T), generator=generator)]
    T = len(sequence_T)
    hidden_TD = (torch.randn(T, D, generator=generator) / D**0.5).to(dtype)
    head_VD = (2 * torch.randn(V, D, generator=generator)).to(dtype)
    target_T = torch.randint(0, V, (T,), generator=generator)
    hidden_TD[sequence_T < 0] = NAN
    own_T = reference.token_logprobs(hidden_TD.double(), head_VD.double(), target_T)
    step_T = torch.tensor(steps, dtype=torch.float64)[sequence_T % len(steps)]
    # Within a sequence the steps differ by noise around its own.
    noise_T = 0.3 * torch.randn(T, generator=generator, dtype=torch.float64)
    old_T = torch.where(sequence_T % K == K - 1, NAN, own_T - step_T - noise_T)
    ref_T = own_T + torch.randn(T, generator=generator, dtype=torch.float64)
    return Problem(hidden_TD, head_VD, target_T, sequence_T, old_T, ref_T)


def by_formula(case: Case, problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    hidden_TD, head_VD = (
        x.to(dtype, copy=True).requires_grad_() for x in (problem.hidden_TD, problem.head_VD)
    )
    # Rows that do not count are left out, as 0 * NaN would reach the head's gradient.
    live_T = problem.sequence_T >= 0
    sequence_T, target_T = problem.sequence_T[live_T], problem.target_T[live_T]
    given: dict[str, Tensor] = {
        "logprob_T": reference.token_logprobs(hidden_TD[live_T], head_VD, target_T),
        "entropy_T": reference.token_entropies(hidden_TD[live_T], head_VD),
        "ref_logprob_T": problem.ref_logprob_T[live_T].to(dtype),
        "old_logprob_T": torch.full(sequence_T.shape, NAN, dtype=dtype)
        if problem.old_logprob_T is None
        else problem.old_logprob_T[live_T].to(dtype),
        "sequence_T": sequence_T,
        "rewards_NK": REWARDS_NK.to(dtype),
    }
    loss = case.loss(given)
    loss.backward()
    return {"loss": loss.detach(), "hidden": hidden_TD.grad, "head": head_VD.grad}


def by_objective(
    objective: Objective,
    problem: Problem,
    backend: str,
    device: str,
    micro_batches: list[list[int]] | None = None,
) -> dict[str, Tensor]:
    coefficients_CNK = objective.coefficients(Groups(REWARDS_NK, LENGTH_NK, max_new_tokens=8))
    head_VD = problem.head_VD.to(device, copy=True).requires_grad_()
    hidden_TD = problem.hidden_TD.to(device, copy=True).requires_grad_()
    total = torch.zeros(())
    for of_prompts in micro_batches or [list(range(N))]:
        prompt_T = problem.sequence_T.div(K, rounding_mode="floor")
        chosen_T = sum((prompt_T == n for n in of_prompts), start=prompt_T < 0)
        part = replace(problem.rows(of_prompts), hidden_TD=hidden_TD[chosen_T.to(device)])
        terms_CT = token_terms(coefficients_CNK[:, of_prompts], part.sequence_T)
        weighted = _two_passes if objective.two_passes else _one_pass
        loss, value = weighted(objective, part, head_VD, terms_CT, backend, device)
        loss.backward()
        total = total + value
    return {"loss": total, "hidden": hidden_TD.grad, "head": head_VD.grad}


def _one_pass(
    objective: Objective,
    part: Problem,
    head_VD: Tensor,
    terms_CT: Tensor,
    backend: str,
    device: str,
) -> tuple[Tensor, Tensor]:
    old_T = part.old_logprob_T if objective.needs_samples else None
    shaped = objective.shaping is not None
    result = linear_policy_loss(
        part.hidden_TD,
        head_VD,
        part.target_T.to(device),
        terms_CT,
        off_policy=None
        if old_T is None
        else OffPolicy(old_logprob_T=old_T, clip=objective.clip, ratio=objective.ratio),
        shaping=Shaping(objective.shaping, part.sequence_T % K == K - 1) if shaped else None,
        backend=backend,
    )
    torch.testing.assert_close(result.loss.detach(), -result.terms_C.sum())
    return result.loss, result.loss.detach().cpu()


def _two_passes(
    objective: Objective,
    part: Problem,
    head_VD: Tensor,
    terms_CT: Tensor,
    backend: str,
    device: str,
) -> tuple[Tensor, Tensor]:
    args = (part.hidden_TD, head_VD, part.target_T.to(device))
    with torch.no_grad():
        first = linear_logprobs(*args, entropy=True, backend=backend)
    dead_T = (terms_CT == 0).all(0)
    logprob_T, entropy_T = (x.masked_fill(dead_T.to(device), NAN) for x in first)
    old_T, ref_T = (
        None if x is None else x.masked_fill(dead_T, NAN)
        for x in (part.old_logprob_T, part.ref_logprob_T)
    )
    rows = Rows(
        sequence_T=part.sequence_T,
        K=K,
        logprob_T=logprob_T,
        entropy_T=entropy_T,
        old_logprob_T=old_T,
        ref_logprob_T=ref_T if objective.needs_initial else None,
    )
    terms_CT, values_C, _ = objective.second_pass(terms_CT, rows)
    assert terms_CT.dtype == torch.float32 and terms_CT[:, dead_T].eq(0).all()
    assert values_C.shape == (len(objective.terms),)
    loss = linear_policy_loss(*args, terms_CT, backend=backend).loss
    return loss, -values_C.sum().float()


def assert_matches(name: str, dtype: torch.dtype, backend: str, device: str) -> None:
    case = CASES[name]
    problem = make_problem(case.steps, dtype)
    truth = by_formula(case, problem, torch.float64)
    naive = by_formula(case, problem, dtype)
    ours = by_objective(case.objective, problem, backend, device)
    worst = 0.0
    for output, expected in truth.items():
        assert expected.isfinite().all() and expected.any()
        assert_accurate(output, ours[output], naive[output], expected, dtype)
        error = (ours[output].cpu() - expected).abs().max() / expected.abs().max()
        worst = max(worst, error.item())
    print(f"worst error of {name}, {backend}, {dtype}: {worst:.1e}")


@pytest.mark.parametrize("name", ["dapo", "cispo", "luffy", "dft", "gspo", "dpo", "srft"])
def test_matches_its_formula(name: str, backend: str, device: str) -> None:
    assert_matches(name, torch.float32, backend, device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_option_matches_its_formula(name: str, dtype: torch.dtype) -> None:
    assert_matches(name, dtype, "torch", "cpu")


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up_to_the_step(name: str) -> None:
    case = CASES[name]
    problem = make_problem(case.steps, torch.float32)
    truth = by_formula(case, problem, torch.float64)
    naive = by_formula(case, problem, torch.float32)
    parts = by_objective(case.objective, problem, "torch", "cpu", [[4, 1], [3], [5, 0, 2]])
    for output in truth:
        assert_accurate(output, parts[output], naive[output], truth[output], torch.float32)


@pytest.mark.parametrize("name", ["dapo", "cispo", "luffy", "gspo"])
def test_gradient_on_policy(name: str) -> None:
    """Without old log-probs, where every ratio is 1, the gradient is the formula's there."""
    case = CASES[name]
    problem = replace(make_problem(case.steps, torch.float32), old_logprob_T=None)
    truth = by_formula(case, problem, torch.float64)
    naive = by_formula(case, problem, torch.float32)
    ours = by_objective(case.objective, problem, "torch", "cpu")
    for output in ("hidden", "head"):
        assert_accurate(output, ours[output], naive[output], truth[output], torch.float32)


def test_gspo_of_rows_without_old_logprobs() -> None:
    """They count in the mean over a sequence's tokens, with a ratio of 1."""
    case = CASES["gspo"]
    problem = make_problem(case.steps, torch.float32)
    old_T = problem.old_logprob_T.clone()
    old_T[::3] = NAN
    problem = replace(problem, old_logprob_T=old_T)
    truth = by_formula(case, problem, torch.float64)
    naive = by_formula(case, problem, torch.float32)
    ours = by_objective(case.objective, problem, "torch", "cpu")
    for output in truth:
        assert_accurate(output, ours[output], naive[output], truth[output], torch.float32)


def test_ratios_are_clipped_on_both_sides() -> None:
    """The problems above would not show a clip that is missing on one side otherwise."""
    for name, low, high in (("dapo", 0.8, 1.28), ("cispo", 0.0, 5.0), ("luffy", 0.8, 1.2)):
        problem = make_problem(CASES[name].steps, torch.float32)
        own_T = reference.token_logprobs(
            problem.hidden_TD.double(), problem.head_VD.double(), problem.target_T
        )
        advantage_T = REWARDS_NK.sub(REWARDS_NK[:, :-1].nanmean(1, keepdim=True)).flatten()
        advantage_T = advantage_T[problem.sequence_T]
        rho_T = (own_T - problem.old_logprob_T).exp()
        assert ((advantage_T > 0) & (rho_T > high)).any()
        assert ((advantage_T < 0) & (rho_T > high)).any()
        assert name == "cispo" or ((advantage_T < 0) & (rho_T < low)).any()
        assert name == "cispo" or ((advantage_T > 0) & (rho_T < low)).any()


def test_sequence_ratios_are_clipped_on_both_sides() -> None:
    """Some sequences of GSPO's case have no gradient, of either sign, and some have one."""
    problem = make_problem(CASES["gspo"].steps, torch.float32)
    ours = by_objective(CASES["gspo"].objective, problem, "torch", "cpu")
    moved_T = ours["hidden"].any(1)
    advantages_NK = CASES["gspo"].objective.advantages(REWARDS_NK).flatten()
    for sign in (1, -1):
        rows_T = (advantages_NK[problem.sequence_T] * sign > 0) & (problem.sequence_T >= 0)
        assert moved_T[rows_T].any() and not moved_T[rows_T].all()


def test_gspo_counts_the_sequences_that_its_bounds_hold() -> None:
    """Those above them with a positive weight, and those below them with a negative one."""
    sequence_T = torch.arange(5).repeat_interleave(2)
    gap_T = torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0, 1.0])
    terms_1T = torch.tensor([[1.0, -1.0, -1.0, 1.0, 0.0]]).repeat_interleave(2, dim=1)
    rows = Rows(sequence_T, 5, gap_T - 3, torch.zeros(10), torch.full((10,), -3.0), None)
    narrow, wide = GSPO(low=0.3, high=0.3), GSPO(low=0.4, high=0.7)
    assert narrow.second_pass(terms_1T, rows).clipped_S.tolist() == [1, 0, 1, 0]
    assert wide.second_pass(terms_1T, rows).clipped_S.tolist() == [0, 0, 0, 0]
    assert wide.second_pass(terms_1T, rows._replace(old_logprob_T=None)).clipped_S is None


def test_best_and_worst() -> None:
    advantages_NK = DPO().advantages(REWARDS_NK)
    expected_NK = torch.tensor(
        [
            [0, -1, 1, 0, 0],
            [0, 0, 0, 0, 0],
            [-1, NAN, 1, 0, NAN],
            [1, -1, 0, 0, 0],
            [1, -1, 0, 0, 0],
            [NAN] * 5,
        ],
        dtype=torch.float64,
    )
    assert torch.equal(advantages_NK.nan_to_num(7), expected_NK.nan_to_num(7))


def test_luffy_and_srft_weigh_references_by_the_whole_group() -> None:
    rewards_NK = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    advantages_NK = LUFFY().advantages(rewards_NK)
    torch.testing.assert_close(advantages_NK[0, [0, 4]], torch.tensor([2.0, -0.5]).double())
    assert SRFT().advantages(rewards_NK)[0].tolist() == pytest.approx([1, -1, -1, -1, 0])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GSPO(low=2.0), "low"),
        (lambda: GSPO(high=-1.0), "high"),
        (lambda: DPO(beta=0.0), "beta"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing must be at least 0 and below 0.5"),
        (lambda: SRFT(threshold=math.inf), "threshold"),
    ],
)
def test_options_are_checked(make: Callable[[], Objective], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["gspo", "dpo", "srft"])
def test_second_pass_of_no_rows(name: str) -> None:
    """A micro-batch that only keeps processes in step has terms, and no row that counts."""
    objective = CASES[name].objective
    rubbish_T = torch.full((3,), NAN)
    rows = Rows(torch.full((3,), -1), K, rubbish_T, rubbish_T, rubbish_T, rubbish_T)
    terms_CT, values_C, _ = objective.second_pass(torch.ones(len(objective.terms), 3), rows)
    assert terms_CT.eq(0).all() and values_C.eq(0).all()


def test_dpo_asks_for_the_initial_policy() -> None:
    nothing = torch.zeros(3)
    rows = Rows(torch.tensor([0, 0, 1]), 2, nothing, nothing, None, None)
    with pytest.raises(ValueError, match="ref_logprob_T"):
        DPO().second_pass(torch.tensor([[1.0, 1.0, -1.0]]), rows)
