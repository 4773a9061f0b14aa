"""Objectives whose weights are known before the head, against their float64 formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from objective_cases import CASES, LENGTH_NK, RATIOS, REWARDS_NK, Case, K, N, coefficients
from tolerance import assert_accurate, worst_error
from torch import Tensor

from grao_fast.kernels import OffPolicy, Shaping, linear_policy_loss, reference
from grao_fast.objectives.base import token_terms

D, V = 9, 61
OBJECTIVES = [name for name in CASES if "_" not in name or name in ("dr_grpo", "chord_phi")]


@dataclass(frozen=True)
class Batch:
    """Rows in no order, some of which are in no sequence."""

    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor

    def logprobs(self, hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
        return reference.token_logprobs(hidden_TD, head_VD, self.target_T)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    sequence_T = torch.arange(N * K).repeat_interleave(LENGTH_NK.flatten())
    sequence_T = torch.cat([sequence_T, torch.full((5,), -1)])
    T = len(sequence_T)
    return Batch(
        hidden_TD=torch.randn(T, D, generator=generator),
        head_VD=torch.randn(V, D, generator=generator),
        target_T=torch.randint(0, V, (T,), generator=generator),
        sequence_T=sequence_T[torch.randperm(T, generator=generator)],
    )


BATCH = make_batch()


def run_ours(
    case: Case,
    dtype: torch.dtype,
    backend: str | None = None,
    device: str = "cpu",
    counts_N: Tensor | None = None,
    off_policy: OffPolicy | None = None,
) -> list[Tensor]:
    """The loss and the gradients of hidden and head; rows without weight hold NaN.

    counts_N: the groups of a micro-batch; None: all.
    """
    sequence_T = BATCH.sequence_T
    if counts_N is not None:
        sequence_T = torch.where(counts_N[sequence_T // K], sequence_T, -1)
    terms_CT = token_terms(coefficients(case), sequence_T)
    assert len(terms_CT) == len(case.objective.terms)
    hidden_TD = torch.where((terms_CT != 0).any(0)[:, None], BATCH.hidden_TD, math.nan)
    operands = leaves(hidden_TD.to(device), BATCH.head_VD.to(device), dtype=dtype)
    form = case.objective.shaping
    result = linear_policy_loss(
        *operands,
        BATCH.target_T.to(device),
        terms_CT,
        off_policy=off_policy,
        shaping=None if form is None else Shaping(form, sequence_T % K == K - 1),
        backend=backend,
        workspace_mib=0.005,
    )
    result.loss.backward()
    torch.testing.assert_close(result.loss, -result.terms_C.sum())
    return [result.loss.detach(), *(operand.grad for operand in operands)]


def leaves(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]


def run_formula(
    case: Case, dtype: torch.dtype, rounded: torch.dtype, **options: Any
) -> list[Tensor]:
    """As `run_ours`, by the formula in `dtype`, of operands that were rounded before."""
    operands = leaves(BATCH.hidden_TD.to(rounded), BATCH.head_VD.to(rounded), dtype=dtype)
    logprob_T = BATCH.logprobs(*operands)
    loss = case.formula(logprob_T, BATCH.sequence_T, REWARDS_NK, **case.options, **options)
    loss.backward()
    return [loss.detach(), *(operand.grad for operand in operands)]


def assert_matches(case: Case, ours: list[Tensor], dtype: torch.dtype, **options: Any) -> float:
    naive = run_formula(case, dtype, dtype, **options)
    truth = run_formula(case, torch.float64, dtype, **options)
    for name, *values in zip(("loss", "dhidden", "dhead"), ours, naive, truth, strict=True):
        assert_accurate(name, *values, dtype)
    return worst_error(ours, truth)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient(name: str, backend: str, device: str) -> None:
    case = CASES[name]
    error = assert_matches(case, run_ours(case, torch.float32, backend, device), torch.float32)
    print(f"worst error of {name}, {backend}: {error:.1e}")
    assert error < 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if name not in OBJECTIVES])
def test_with_other_options(name: str) -> None:
    case = CASES[name]
    assert assert_matches(case, run_ours(case, torch.float32), torch.float32) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_in_bfloat16(name: str) -> None:
    case = CASES[name]
    error = assert_matches(case, run_ours(case, torch.bfloat16), torch.bfloat16)
    print(f"worst error of {name} in bfloat16: {error:.1e}")
    assert error < 2e-2


def stale_logprobs() -> Tensor:
    """Old log-probs that are a step away, on both sides of either bound and between them."""
    logprob_T = BATCH.logprobs(BATCH.hidden_TD.double(), BATCH.head_VD.double())
    steps = torch.tensor([0.1, -0.5, 0.0, 0.5, -0.1], dtype=torch.float64)
    return logprob_T + steps[torch.arange(len(logprob_T)) % 5]


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name in RATIOS])
def test_clipped_ratio_of_samples(name: str, backend: str, device: str) -> None:
    case, old_T = CASES[name], stale_logprobs()
    of_samples_T = old_T.where(BATCH.sequence_T % K != K - 1, math.nan)
    off_policy = OffPolicy(old_logprob_T=of_samples_T, clip=(0.2, 0.3))
    ours = run_ours(case, torch.float32, backend, device, off_policy=off_policy)
    options = {"old_logprob_T": old_T, "clip": (0.2, 0.3)}
    # A ratio has the rounding of log-probs as low as -26.
    assert assert_matches(case, ours, torch.float32, **options) < 3e-6


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_sum_to_the_step(name: str) -> None:
    whole = run_ours(CASES[name], torch.float32)
    counts_N = torch.arange(N) % 3 == 0
    parts = [run_ours(CASES[name], torch.float32, counts_N=each) for each in (counts_N, ~counts_N)]
    for one, two, both in zip(*parts, whole, strict=True):
        torch.testing.assert_close(one + two, both, rtol=1e-5, atol=1e-7)
