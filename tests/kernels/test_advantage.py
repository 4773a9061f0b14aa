"""From rewards to advantages to coefficients, against the specification."""

from __future__ import annotations

import math

import pytest
import torch

from grao_fast.kernels import advantage, reference

NAN = math.nan
GROUPS = [
    [0.3, -1.2, 2.0, 0.5],
    [0.1, 0.1, 0.1, 0.1],
    [1.0, 1.0, 1.0, 2.0],
    [NAN, 0.5, 1.0, NAN],
    [NAN, NAN, NAN, 1.0],
    [NAN, NAN, NAN, NAN],
    [0.0, 1.0, 2.0, -1.0],
    [1e-30, 2e-30, 3e-30, 5e-30],
    [1e30, -1e30, 0.0, 1e29],
]
STATISTICS = ("group", "samples")
REFERENCE_ADVANTAGES = ("signed", "clip", "floor", "tapered")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference_advantage", REFERENCE_ADVANTAGES)
@pytest.mark.parametrize("statistics", STATISTICS)
def test_matches_specification(statistics, reference_advantage, dtype, device) -> None:
    groups = GROUPS if dtype in (torch.float64, torch.float32) else GROUPS[:-2]
    rewards_NK = torch.tensor(groups, dtype=torch.float64).to(dtype)
    truth_NK = reference.group_advantages(
        rewards_NK.double(), statistics=statistics, reference_advantage=reference_advantage
    )
    options = {"beta": 0.4, "lam": 0.7, "reference_advantage": reference_advantage}
    truth_weights_NK = reference.sequence_weights(truth_NK, **options)
    advantages_NK, terms_3NK = advantage.advantages_and_terms(
        rewards_NK.to(device),
        statistics=statistics,
        **options,
    )
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert advantages_NK.dtype == terms_3NK.dtype == kept
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False, "equal_nan": True}
    torch.testing.assert_close(advantages_NK.cpu(), truth_NK, **close)
    torch.testing.assert_close(terms_3NK.sum(0).cpu(), truth_weights_NK, **close)
    weights_NK = advantage.sequence_weights(advantages_NK, **options)
    assert torch.equal(weights_NK, terms_3NK.sum(0))
    assert not terms_3NK[0, :, -1].any() and not terms_3NK[1, :, :-1].any()


def test_row_coefficients_are_means_over_sequences() -> None:
    terms_3NK = torch.arange(1.0, 13.0).reshape(3, 2, 2)
    sequence_T = torch.tensor([3, 0, -1, 3, 3, 1, -1])
    terms_3T = advantage.row_coefficients(terms_3NK, sequence_T, 4)
    length_T = torch.tensor([3, 1, 1, 3, 3, 1, 1])
    expected = terms_3NK.reshape(3, 4)[:, [3, 0, 0, 3, 3, 1, 0]] / (4 * length_T)
    expected[:, sequence_T < 0] = 0
    torch.testing.assert_close(terms_3T, expected)


def test_row_whose_terms_cancel_is_left_out_of_all_three() -> None:
    terms_3NK = torch.tensor([[[0.0, 0.0]], [[0.0, 0.5]], [[1.0, -0.5]]])
    terms_3T = advantage.row_coefficients(terms_3NK, torch.tensor([0, 1]), 1)
    assert torch.equal(terms_3T, torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
