"""The specification itself, by hand, in limiting cases and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from problem import make_problem, run

from grao_fast.kernels import reference

NAN = math.nan
FLOOR = {"reference_advantage": "floor"}


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_and_weights_by_hand() -> None:
    """Rewards 1, 3 | 5: mu = 3, sigma = sqrt(8/3), A = (-2, 0, 2) / 1.63299 = (-1.22474, 0, ...).

    G = 2, beta = 0.5, lam = 0.6: w_1 = 1.6 * -1.22474 / 2 = -0.97980, w_2 = 0,
    w_y = 0.5 * 1.22474 + 0.3 * 1.22474 = 0.97980.
    """
    advantages_NK = reference.group_advantages(table([1, 3, 5]))
    expected = table([-1.224744871391589, 0, 1.224744871391589])
    torch.testing.assert_close(advantages_NK, expected)
    weights_NK = reference.sequence_weights(advantages_NK)
    torch.testing.assert_close(weights_NK, table([-0.9797958971, 0, 0.9797958971]))


def test_loss_by_hand() -> None:
    """One sample of two tokens, a reference of one, V = 2, every logit 0 but one.

    Rewards 0 | 1: A = (-1, 1). The sample's log-probs are both log 1/2, so L(o) = -0.693147. The
    reference's logits are (0, log 3): L(y) = log 3/4 = -0.287682.
    exploration = -1 * L(o) = 0.693147; imitation = 0.5 L(y) = -0.143841;
    alignment = 0.6 * -1 * (L(o) - L(y)) = 0.243279; loss = -0.792585.
    """
    result = reference.grao_loss(
        table([0, 0], [0, 0], [0, math.log(3)]),
        table([1, 0], [0, 1]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 1]),
        table([0, 1]),
    )
    by_hand = [-0.7925850, 0.6931472, -0.1438410, 0.2432791]
    torch.testing.assert_close(torch.stack(result[:4]), table(by_hand)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "reference_advantage, mean_logprob",
    [("signed", -0.2876821), ("floor", 0.0), ("tapered", 0.75 * -0.2876821)],
)
def test_a_losing_reference_by_hand(reference_advantage: str, mean_logprob: float) -> None:
    """As above with rewards 1 | 0: A = (1, -1), w_y = -0.5 - 0.6 = -1.1, and L(y) as given.

    exploration = L(o) = -0.693147; imitation = -0.5 L(y); alignment = 0.6 (L(o) - L(y)).
    """
    result = reference.grao_loss(
        table([0, 0], [0, 0], [0, math.log(3)]),
        table([1, 0], [0, 1]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 0, 1]),
        table([1, 0]),
        reference_advantage=reference_advantage,
    )
    sample = -0.6931472
    terms = [sample, -0.5 * mean_logprob, 0.6 * (sample - mean_logprob)]
    by_hand = table([-sum(terms), *terms])[0]
    torch.testing.assert_close(torch.stack(result[:4]), by_hand, rtol=1e-6, atol=1e-6)
    assert result.logprob_T[2].isnan() == (reference_advantage == "floor")


def test_three_terms_equal_sequence_weights() -> None:
    """loss = -sum_s w_s L(s) / N."""
    signed, clip = {"reference_advantage": "signed"}, {"reference_advantage": "clip"}
    for options in ({}, signed, signed | {"statistics": "samples"}, clip, FLOOR):
        problem = make_problem(N=4, K=5, T=60, **options)
        result = run(reference.grao_loss, problem, torch.float64)
        of_weights = {"reference_advantage": options.get("reference_advantage", "floor")}
        weights_S = reference.sequence_weights(result["advantages_NK"], **of_weights).flatten()
        total = torch.zeros((), dtype=torch.float64)
        for s, weight in enumerate(weights_S):
            rows = problem.sequence_T == s
            if weight != 0 and rows.any():
                total += weight * result["logprob_T"][rows].mean()
        torch.testing.assert_close(result["loss"], -total / 4)


def test_gradcheck() -> None:
    problem = make_problem(T=10, D=3, V=5, N=2, K=3, bias=True)

    def loss(hidden_TD, head_VD, bias_V):
        return reference.grao_loss(
            hidden_TD,
            head_VD,
            problem.target_T,
            problem.sequence_T,
            problem.rewards_NK,
            bias_V=bias_V,
            temperature=0.7,
            logit_scale=2.0,
            softcap=4.0,
        ).loss

    leaves = [problem.hidden_TD, problem.head_VD, problem.bias_V]
    assert torch.autograd.gradcheck(loss, [leaf.clone().requires_grad_() for leaf in leaves])


def test_all_samples_losing_is_imitation() -> None:
    """G samples at -1 and the reference at 0: A_y = sqrt(G), A_i = -1 / sqrt(G)."""
    for G in (1, 4, 8):
        advantages_NK = reference.group_advantages(table([-1.0] * G + [0.0]))
        expected = table([-1 / math.sqrt(G)] * G + [math.sqrt(G)])
        torch.testing.assert_close(advantages_NK, expected)


def test_without_beta_and_lam_it_is_a_policy_gradient() -> None:
    result = run(reference.grao_loss, make_problem(beta=0.0, lam=0.0), torch.float64)
    assert result["imitation"] == 0 and result["alignment"] == 0
    assert result["loss"] == -result["exploration"] != 0


def test_samples_statistics_make_the_regulariser_more_exploration() -> None:
    """sum A_i = 0 cancels L(y) in the third term, which is then lam times the first."""
    problem = make_problem(T=60, statistics="samples", lam=0.6)
    result = run(reference.grao_loss, problem, torch.float64)
    torch.testing.assert_close(result["alignment"], 0.6 * result["exploration"])


@pytest.mark.parametrize("statistics", ["group", "samples"])
def test_equal_rewards_are_dead_whatever_they_round_to(statistics: str) -> None:
    rewards_NK = table([0.1] * 9)
    assert not reference.group_advantages(rewards_NK, statistics=statistics).any()
    assert rewards_NK[0, :8].std() < 1e-9  # so that sigma = 0 cannot be tested reliably


def test_samples_statistics_see_only_the_samples() -> None:
    equal = table([1, 1, 5])
    assert not reference.group_advantages(equal, statistics="samples").any()
    advantages_NK = reference.group_advantages(table([1, 3, 5]), statistics="samples")
    torch.testing.assert_close(advantages_NK, table([-1, 1, 3]))


def test_absent_rewards_stay_out() -> None:
    advantages_NK = reference.group_advantages(
        table([1, NAN, 3], [NAN, NAN, 3], [1, 3, NAN], [NAN, NAN, NAN])
    )
    expected = table([-1, NAN, 1], [NAN, NAN, 0], [-1, 1, NAN], [NAN, NAN, NAN])
    torch.testing.assert_close(advantages_NK, expected, equal_nan=True)
    weights_NK = reference.sequence_weights(advantages_NK)
    expected = table([-1.6, 0, 0.5 + 0.6], [0, 0, 0], [-0.8, 0.8, 0], [0, 0, 0])
    torch.testing.assert_close(weights_NK, expected)


def test_clip_holds_the_reference_up_and_leaves_the_samples() -> None:
    rewards_NK = table([1, 2, 0], [0, 1, 2])
    signed = reference.group_advantages(rewards_NK)
    clipped = reference.group_advantages(rewards_NK, reference_advantage="clip")
    assert signed[0, -1] < 0 == clipped[0, -1]
    assert torch.equal(clipped[:, :-1], signed[:, :-1]) and torch.equal(clipped[1], signed[1])
