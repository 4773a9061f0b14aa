"""PPO's functions against its float64 formulas, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_accurate

from grao_fast.kernels import OffPolicy, linear_policy_loss, reference, reference_objectives
from grao_fast.objectives.ppo import gae, ppo_terms, token_rewards, value_loss, whitened

SEQUENCE_T = torch.tensor([0, 0, 2, -1, 2, 0, 3, 2, 0, -1, 0, 2])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_rubbish(values_T: torch.Tensor) -> torch.Tensor:
    return torch.where(SEQUENCE_T < 0, math.nan, values_T)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_gae_is_its_sum_of_errors(gamma: float, lam: float) -> None:
    rewards_T, values_T = with_rubbish(randn(12)), with_rubbish(randn(12, seed=1))
    truth_T = reference_objectives.ppo.gae(rewards_T, values_T, SEQUENCE_T, gamma=gamma, lam=lam)
    ours = gae(rewards_T.float(), values_T, SEQUENCE_T, gamma=gamma, lam=lam)
    assert_accurate("advantages", ours.advantages_T, truth_T.float(), truth_T, torch.float32)
    live_T = SEQUENCE_T >= 0
    assert (ours.advantages_T[~live_T] == 0).all() and (ours.returns_T[~live_T] == 0).all()
    torch.testing.assert_close(
        ours.returns_T[live_T].double(), (truth_T + values_T)[live_T], rtol=1e-6, atol=1e-6
    )


def test_of_no_rows() -> None:
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert gae(empty, empty, none).advantages_T.shape == (0,)
    assert token_rewards(torch.ones(2), none).shape == (0,)
    assert ppo_terms(whitened(empty, none), none).shape == (1, 0)
    assert value_loss(empty, empty, none) == 0


def test_rewards_are_at_the_last_tokens_less_the_penalties() -> None:
    scores_S = torch.tensor([1.0, 7.0, -2.0, 3.0])
    plain_T = token_rewards(scores_S, SEQUENCE_T)
    expected_T = torch.zeros(12)
    expected_T[10], expected_T[11], expected_T[6] = 1.0, -2.0, 3.0
    assert torch.equal(plain_T, expected_T)
    penalty_T = with_rubbish(randn(12)).float()
    penalised_T = token_rewards(scores_S, SEQUENCE_T, penalty_T)
    live_T = SEQUENCE_T >= 0
    assert torch.equal(penalised_T[live_T], (expected_T - penalty_T)[live_T])
    assert (penalised_T[~live_T] == 0).all()


def test_whitened_over_the_rows_that_count() -> None:
    whitened_R = whitened(with_rubbish(3 + 5 * randn(12)), SEQUENCE_T)[SEQUENCE_T >= 0]
    torch.testing.assert_close(whitened_R.mean(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(whitened_R.square().mean(), torch.ones((), dtype=torch.float64))
    assert (whitened(torch.full((12,), 0.1), SEQUENCE_T) == 0).all()


def test_value_loss_by_hand() -> None:
    """Of errors 1 and 2; held within 0.5 of 0, the first value is 0.5, so its error is 0.5."""
    values_T = torch.tensor([1.0, 2.0, math.nan], requires_grad=True)
    sequence_T = torch.tensor([0, 0, -1])
    returns_T, old_T = torch.tensor([0.0, 4.0, math.nan]), torch.tensor([0.0, 0.0, math.nan])
    loss = value_loss(values_T, returns_T, sequence_T)
    loss.backward()
    assert loss == (1 + 4) / 4
    assert torch.equal(values_T.grad, torch.tensor([0.5, -1.0, 0.0]))
    clipped = value_loss(values_T, returns_T, sequence_T, old_values_T=old_T, clip=0.5)
    assert clipped == (1 + 3.5**2) / 4
    halves = [
        value_loss(values_T[[t]], returns_T[[t]], sequence_T[[t]], num_tokens=2) for t in (0, 1)
    ]
    assert sum(halves) == loss
    with pytest.raises(ValueError, match="old_values_T and clip together"):
        value_loss(values_T, returns_T, sequence_T, clip=0.5)


def test_policy_loss_and_gradients(backend: str, device: str) -> None:
    """In float32 against float64, with ratios beyond both clips for advantages of both signs."""
    T, D, V = 12, 7, 11
    hidden_TD, head_VD, target_T = randn(T, D).float(), randn(V, D).float(), torch.arange(T) % V
    steps_T = torch.tensor([0.5, -0.5, 0.1] * 4, dtype=torch.float64)
    advantages_T = randn(T, seed=2)
    old_T = reference.token_logprobs(hidden_TD.double(), head_VD.double(), target_T) + steps_T
    old_T = with_rubbish(old_T)

    def by_formula(dtype: torch.dtype) -> list[torch.Tensor]:
        hidden, head = (x.to(dtype).requires_grad_() for x in (hidden_TD, head_VD))
        loss = reference_objectives.ppo.ppo_loss(
            reference.token_logprobs(hidden, head, target_T),
            old_T.to(dtype),
            advantages_T.to(dtype),
            SEQUENCE_T,
            low=0.2,
            high=0.3,
        )
        return [loss, *torch.autograd.grad(loss, (hidden, head))]

    def ours(rows: slice) -> list[torch.Tensor]:
        hidden, head = (x.to(device, copy=True).requires_grad_() for x in (hidden_TD, head_VD))
        loss = linear_policy_loss(
            hidden[rows],
            head,
            target_T[rows].to(device),
            ppo_terms(with_rubbish(advantages_T)[rows], SEQUENCE_T[rows], num_tokens=10),
            off_policy=OffPolicy(old_logprob_T=old_T[rows], clip=(0.2, 0.3)),
            backend=backend,
        ).loss
        return [loss, *torch.autograd.grad(loss, (hidden, head))]

    whole, parts = ours(slice(None)), zip(ours(slice(0, 5)), ours(slice(5, T)), strict=True)
    summed = [sum(pair) for pair in parts]
    for each in (whole, summed):
        for name, *values in zip(
            ("loss", "hidden", "head"),
            each,
            by_formula(torch.float32),
            by_formula(torch.float64),
            strict=True,
        ):
            assert_accurate(name, *values, torch.float32)
            error = (values[0].detach().cpu() - values[2]).abs().max() / values[2].abs().max()
            print(f"worst error of ppo's {name}, {backend}: {error.item():.1e}")
