"""Properties of objectives' coefficients, values by hand, and the errors of their options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from objective_cases import CASES, LENGTH_NK, REWARDS_NK, K, N, coefficients
from torch import Tensor

from grao_fast import objectives
from grao_fast.objectives.awr import AWR
from grao_fast.objectives.base import Groups, Objective, token_terms
from grao_fast.objectives.grpo import GRPO, DrGRPO
from grao_fast.objectives.mixtures import CHORD, HPT, UFT
from grao_fast.objectives.policy_gradient import REINFORCE, RLOO
from grao_fast.objectives.rft import RFT
from grao_fast.objectives.sft import SFT
from grao_fast.system.errors import UserError

CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def two_prompts() -> Groups:
    """Rewards 1, 0 and a reference of 4; then 1, 1, 0.5."""
    rewards_NK = torch.tensor([[1.0, 0.0, 4.0], [1.0, 1.0, 0.5]], dtype=torch.float64)
    return Groups(rewards_NK, torch.tensor([[2, 4, 5], [1, 2, 3]]), max_new_tokens=10)


@pytest.mark.parametrize(
    "objective, expected",
    [
        (SFT(), [[[0, 0, 1 / 8], [0, 0, 1 / 8]]]),
        (RFT(), [[[2 / 7, 0, 0], [1 / 7, 1 / 7, 0]]]),  # 2 + 1/2 + 2/2 tokens
        (RFT(best=None, threshold=1.0), [[[1 / 5, 0, 0], [1 / 5, 1 / 5, 0]]]),
        (AWR(), [[[math.exp(0.5) / 9, math.exp(-0.5) / 9, 0], [1 / 9, 1 / 9, 0]]]),
        (AWR(temperature=0.25, cap=3.0), [[[3 / 9, math.exp(-2) / 9, 0], [1 / 9, 1 / 9, 0]]]),
        (REINFORCE(), [[[1 / 16, -3 / 16, 0], [1 / 16, 1 / 16, 0]]]),
        (RLOO(), [[[1 / 4, -1 / 4, 0], [0, 0, 0]]]),
        (GRPO(), [[[1 / 8, -1 / 16, 0], [0, 0, 0]]]),
        (GRPO(sigma="sample"), [[[0.5**0.5 / 8, -(0.5**0.5) / 16, 0], [0, 0, 0]]]),
        (DrGRPO(), [[[1 / 80, -1 / 80, 0], [0, 0, 0]]]),
        (
            CHORD(mu_start=0.75),
            [[[1 / 36, -1 / 36, 0], [0, 0, 0]], [[0, 0, 3 / 32], [0, 0, 3 / 32]]],
        ),
        (
            UFT(hint_coef=0.5, hint_start=0.5),
            [[[1 / 8, -1 / 16, 0], [0, 0, 0]], [[0, 0, 1 / 8], [0, 0, 1 / 8]]],
        ),
        (
            HPT(gate=0.5, sft_coef=0.5),
            [[[0, 0, 0], [0, 0, 0]], [[0, 0, 1 / 20], [0, 0, 0]]],
        ),
    ],
)
def test_coefficients_by_hand(objective: Objective, expected: list) -> None:
    torch.testing.assert_close(
        objective.coefficients(two_prompts()), torch.tensor(expected, dtype=torch.float64), **CLOSE
    )


@pytest.mark.parametrize("name", CASES)
def test_order_of_groups_and_samples_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    groups_N = torch.randperm(N, generator=generator)
    samples_K = torch.cat([torch.randperm(K - 1, generator=generator), torch.tensor([K - 1])])

    def permuted(values: Tensor) -> Tensor:
        return values[..., groups_N, :][..., samples_K]

    terms_CNK = coefficients(CASES[name])
    moved_CNK = coefficients(CASES[name], permuted(REWARDS_NK), permuted(LENGTH_NK))
    torch.testing.assert_close(moved_CNK, permuted(terms_CNK), **CLOSE)
    assert not moved_CNK.isnan().any() and (moved_CNK != 0).any()


@pytest.mark.parametrize("name", CASES)
def test_reward_of_the_reference_does_not_matter(name: str) -> None:
    rewards_NK = REWARDS_NK.clone()
    rewards_NK[:, -1] = torch.linspace(-3, 5, N)
    terms_CNK = coefficients(CASES[name])
    assert torch.equal(coefficients(CASES[name], rewards_NK), terms_CNK)
    # Nor is a reference weighed by a term of samples, or a sample by one of references.
    imitation = [term == "imitation" for term in CASES[name].objective.terms]
    for of_references, terms_NK in zip(imitation, terms_CNK, strict=True):
        assert not (terms_NK[:, :-1] if of_references else terms_NK[:, -1]).any()


@pytest.mark.parametrize("name", CASES)
def test_what_is_absent_has_no_weight(name: str) -> None:
    case = CASES[name]
    terms_CNK, advantages_NK = coefficients(case), case.objective.advantages(REWARDS_NK)
    unscored_NK = REWARDS_NK.isnan()
    if "imitation" in case.objective.terms:  # which needs no reward of the reference
        unscored_NK[:, -1] = False
    assert not terms_CNK[:, LENGTH_NK == 0].any() and not terms_CNK[:, unscored_NK].any()
    assert torch.equal(advantages_NK.isnan(), unscored_NK)
    assert terms_CNK.dtype == advantages_NK.dtype == torch.float64
    # The trainer takes a group for dead by its advantages.
    dead_N = (advantages_NK.nan_to_num(0.0) == 0).all(1)
    assert not terms_CNK[:, dead_N].any()
    assert terms_CNK[:, :, -1].any() <= case.objective.uses_references


DEAD = {
    "group": (torch.tensor([[0.1] * 8 + [1.0]], dtype=torch.float64), "rloo grpo dr_grpo"),
    "step": (torch.full((3, 9), 0.1, dtype=torch.float64), "reinforce rloo grpo dr_grpo"),
    "one_sample": (torch.tensor([[0.7, math.nan, 0.3]], dtype=torch.float64), "rloo grpo dr_grpo"),
    "no_sample": (torch.tensor([[math.nan, math.nan, 1.0]], dtype=torch.float64), "rft awr grpo"),
}


@pytest.mark.parametrize("rewards_NK, names", DEAD.values(), ids=DEAD)
def test_dead_groups_weigh_exactly_0(rewards_NK: Tensor, names: str) -> None:
    for name in names.split():
        assert not coefficients(
            CASES[name], rewards_NK, torch.full_like(rewards_NK, 3).long()
        ).any()


def moved(change: Callable[[Tensor], Tensor]) -> Callable[[str], Tensor]:
    return lambda name: coefficients(CASES[name], change(REWARDS_NK))


@pytest.mark.parametrize("name", CASES)
def test_shift_and_scale_of_rewards(name: str) -> None:
    """All but a threshold and a gate are free of the reward's zero; GRPO and SFT of its unit."""
    base_CNK = coefficients(CASES[name])
    absolute = name.startswith("hpt") or "threshold" in name or "above" in name
    same = moved(lambda rewards: rewards + 2.5)(name).allclose(base_CNK, rtol=1e-9, atol=1e-12)
    assert same != absolute
    kind = name.partition("_")[0]
    scaled_CNK = moved(lambda rewards: rewards * 3)(name)
    if kind in ("sft", "grpo", "chord", "uft") or name in ("rft", "rft_best_2"):
        torch.testing.assert_close(scaled_CNK, base_CNK, **CLOSE)
    elif kind in ("reinforce", "rloo", "dr"):
        torch.testing.assert_close(scaled_CNK, 3 * base_CNK, **CLOSE)


def test_tied_samples_share_the_last_places() -> None:
    rewards_NK = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 9.0]], dtype=torch.float64)
    for best, kept in {1: [1, 0, 0, 0, 0], 2: [1, 1 / 3, 1 / 3, 1 / 3, 0], 5: [1] * 5}.items():
        advantages_NK = RFT(best=best).advantages(rewards_NK)
        torch.testing.assert_close(advantages_NK, torch.tensor([[*kept, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", {0.0: 0.9, 0.25: 0.475, 0.5: 0.05, 0.99: 0.05}),
        ("cosine", {0.0: 0.9, 0.25: 0.475, 0.125: 0.05 + 0.85 * (1 + 0.5**0.5) / 2, 0.99: 0.05}),
    ],
)
def test_mu_of_chord(schedule: str, expected: dict[float, float]) -> None:
    groups = two_prompts()
    for progress, mu in expected.items():
        at = Groups(groups.rewards_NK, groups.length_NK, groups.max_new_tokens, progress)
        terms_CNK = CHORD(schedule=schedule).coefficients(at)
        assert terms_CNK[0, 0, 0].item() == pytest.approx((1 - mu) / 9)
        assert terms_CNK[1, 0, -1].item() == pytest.approx(mu / 8)


def test_phi_of_chord_is_a_shaping_of_references() -> None:
    assert CHORD().shaping is None and CHORD(phi=True).shaping == "chord"


def test_rows_whose_terms_cancel_are_not_computed() -> None:
    terms_CNK = torch.tensor([[[1.0, 0.5, 2.0]], [[-1.0, 0.25, 0.0]]], dtype=torch.float64)
    terms_CT = token_terms(terms_CNK, torch.tensor([1, 0, -1, 2, 1]))
    expected = [[0.5, 0, 0, 2.0, 0.5], [0.25, 0, 0, 0, 0.25]]
    assert torch.equal(terms_CT, torch.tensor(expected))


def test_example_for_another_trainer() -> None:
    block = "\n".join(re.findall(r"^    (.*)$", objectives.__doc__ or "", re.MULTILINE))
    generator = torch.Generator().manual_seed(0)
    names: dict[str, object] = {
        "rewards_NK": REWARDS_NK,
        "length_NK": LENGTH_NK,
        "sequence_T": torch.arange(N * K).repeat_interleave(LENGTH_NK.flatten()),
        "hidden_TD": torch.randn(int(LENGTH_NK.sum()), 4, generator=generator).requires_grad_(),
        "head_VD": torch.randn(6, 4, generator=generator),
        "target_T": torch.randint(0, 6, (int(LENGTH_NK.sum()),), generator=generator),
    }
    exec(block, names)
    names["loss"].backward()  # type: ignore[attr-defined]
    assert names["hidden_TD"].grad.any()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RFT(best=None), "keeps every sample: set best, threshold or both"),
        (lambda: RFT(best=0), "RFT's best must be at least 1, got 0"),
        (lambda: RFT(best=1.5), "best must be an integer, got 1.5"),  # type: ignore
        (lambda: RFT(threshold=math.nan), "threshold must be finite, got nan"),
        (lambda: AWR(temperature=0), "AWR's temperature must be above 0, got 0"),
        (lambda: AWR(cap="20"), "cap must be a number, got '20'"),  # type: ignore
        (lambda: GRPO(sigma="sampled"), "one of population, sample; got 'sampled'"),  # type: ignore
        (lambda: CHORD(mu_start=1.1), "mu_start must be at least 0 and at most 1, got 1.1"),
        (lambda: CHORD(decay=0.0), "decay must be above 0 and at most 1, got 0.0"),
        (lambda: CHORD(schedule="step"), "one of linear, cosine; got 'step'"),  # type: ignore
        (lambda: CHORD(phi=1), "phi must be true or false, got 1"),  # type: ignore
        (lambda: UFT(hint_coef=-1), "UFT's hint_coef must be at least 0, got -1"),
        (lambda: HPT(gate=None), "gate must be a number, got None"),  # type: ignore
    ],
)
def test_options_are_refused_by_name(make: Callable[[], Objective], message: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value)
