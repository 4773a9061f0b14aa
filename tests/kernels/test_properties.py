"""Properties of any input, drawn by hypothesis, which no other test needs."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("hypothesis")
import test_linear_logprob
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import assert_matches_specification, make_problem
from test_advantage import REFERENCE_ADVANTAGES, STATISTICS

from grao_fast.kernels import group_advantages, reference, sequence_weights
from grao_fast.kernels.one_pass.chunks import padded, plan_chunks

NAN = math.nan


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(2, 9).flatmap(
        lambda K: st.lists(
            st.lists(st.sampled_from([NAN, -1.0, 0.0, 0.1, 1.0]), min_size=K, max_size=K),
            min_size=1,
            max_size=4,
        )
    ),
    st.sampled_from(STATISTICS),
    st.sampled_from(REFERENCE_ADVANTAGES),
)
def test_any_rewards(groups: list, statistics: str, reference_advantage: str) -> None:
    rewards_NK = torch.tensor(groups, dtype=torch.float64)
    options = {"statistics": statistics, "reference_advantage": reference_advantage}
    truth_NK = reference.group_advantages(rewards_NK, **options)
    advantages_NK = group_advantages(rewards_NK, **options)
    torch.testing.assert_close(advantages_NK, truth_NK, equal_nan=True)
    torch.testing.assert_close(
        sequence_weights(advantages_NK, reference_advantage=reference_advantage),
        reference.sequence_weights(truth_NK, reference_advantage=reference_advantage),
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    D=st.integers(1, 20),
    V=st.integers(1, 300),
    N=st.integers(1, 4),
    K=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_grao_loss_of_any_shape(T: int, D: int, V: int, N: int, K: int, seed: int) -> None:
    problem = make_problem(T=T, D=D, V=V, N=N, K=K, seed=seed)
    assert_matches_specification(problem, torch.float32, "torch", "cpu", workspace_mib=0.01)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    D=st.integers(1, 20),
    V=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
def test_logprobs_of_any_shape(T: int, D: int, V: int, seed: int) -> None:
    problem = make_problem(T=T, D=D, V=V, seed=seed)
    test_linear_logprob.assert_matches_specification(
        problem, torch.float32, "torch", "cpu", workspace_mib=0.01
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    L=st.integers(0, 100_000),
    V=st.integers(1, 300_000),
    D=st.integers(1, 20_000),
    itemsize=st.sampled_from([None, 2]),
    workspace_mib=st.floats(0.001, 8192),
)
def test_chunks_fit_the_workspace(L, V, D, itemsize, workspace_mib) -> None:
    stride, budget = padded(V), int(workspace_mib * 2**20)
    rows, slab_rows = plan_chunks(L, stride, D, itemsize, budget)
    assert 1 <= slab_rows <= rows <= max(1, L)
    cost = 4 * stride * slab_rows + (16 * D + (itemsize or 0) * stride) * rows
    assert cost <= budget or rows == 1
    if itemsize is None:
        assert slab_rows == rows
