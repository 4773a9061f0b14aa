"""Objectives by name: `make_objective`, and what has no effect beside the option `objective`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from grao_fast.config import GRAOConfig
from grao_fast.config.rules import CHOICES
from grao_fast.objectives import OBJECTIVES, Groups, Objective, make_objective
from grao_fast.objectives.base import mean_over_tokens
from grao_fast.objectives.grao import GRAO


@dataclass(frozen=True)
class Halves(Objective):
    """An objective with an option of each kind."""

    beta: float = 0.5
    steps: int = 1

    clip: ClassVar[tuple[float, float] | None] = (0.2, 0.28)

    def advantages(self, rewards_NK: Tensor) -> Tensor:
        return rewards_NK / 2

    def coefficients(self, groups: Groups) -> Tensor:
        return mean_over_tokens(self.advantages(groups.rewards_NK), groups)[None]


@pytest.fixture(autouse=True)
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "halves", Halves)


def test_a_text_names_an_objective_and_its_options() -> None:
    assert make_objective("grao") == GRAO()
    assert make_objective(" halves() ") == Halves()
    made = make_objective("halves(beta=1, steps=3)")
    assert made == Halves(beta=1, steps=3)
    assert make_objective('grao(statistics="samples", lam=0)') == GRAO(statistics="samples", lam=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gra0", "there is no objective 'gra0' .did you mean grao"),
        ("halves(", "neither a name nor one with options"),
        ("halves(0.1)", "neither a name nor one with options"),
        ("halves(**{})", "neither a name nor one with options"),
        ("halves; grao", "neither a name nor one with options"),
        ("halves(bta=1)", "halves has no option 'bta' .did you mean beta.*takes beta, steps"),
        ("halves(steps=x)", "steps must be a number, a word in quotes.*got x"),
        ("halves(steps=0.5)", "steps must be an integer, got 0.5"),
        ("halves(beta=True)", "beta must be a number, got True"),
        ("halves(beta=1e999)", "beta must be finite, got inf"),
        ("grao(statistics='all')", "statistics must be one of group, samples; got 'all'"),
        ("grao(lam=-1)", "lam must be at least 0, got -1"),
    ],
)
def test_what_names_no_objective_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(text)
    with pytest.raises(ValueError):
        GRAOConfig(objective=text)


def test_the_configuration_gives_grao_its_options_and_others_their_own() -> None:
    assert GRAOConfig(beta=0.1, lam=0.2).objective_options.formula == GRAO(beta=0.1, lam=0.2)
    config = GRAOConfig(objective="halves(beta=0.1)", num_iterations=2)
    assert config.objective_options.formula == Halves(beta=0.1)
    assert GRAOConfig.from_dict(config.to_dict()) == config
    assert config.objective_options.clip == (0.2, 0.28)
    assert config.replace(epsilon=0.1).objective_options.clip == (0.1, 0.1)
    assert config.replace(epsilon_high=0.5).objective_options.clip == (0.2, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "grao(beta=0.1)"}, "set objective=.grao. and beta=0.1"),
        (
            {"objective": "halves", "beta": 0.1},
            r"beta=0.1 has no effect without objective='grao'; .* objective=.halves\(beta=0.1\)",
        ),
        (
            {"objective": "halves", "reference_advantage": "clip"},
            "reference_advantage='clip' has no effect without objective='grao': leave it out",
        ),
        ({"objective": "halves", "epsilon": 0.1}, "no effect with num_iterations=1"),
        ({"objective": 3}, "objective must be text, got 3"),
    ],
)
def test_options_of_another_objective_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRAOConfig(**options)


def test_words_of_the_configuration_are_those_of_grao() -> None:
    """The configuration has them again, since its errors need no torch."""
    hints = get_type_hints(GRAO)
    for name in ("statistics", "reference_advantage"):
        assert CHOICES[name] == get_args(hints[name])


def test_grao_gives_a_token_its_sequences_coefficients() -> None:
    """J = sum_s w_s L(s), whose sum over prompts is divided by them; absent sequences have none."""
    rewards_NK = torch.tensor([[1.0, 0.0, 2.0], [0.5, torch.nan, 0.0]], dtype=torch.float64)
    groups = Groups(rewards_NK, torch.tensor([[2, 0, 3], [4, 0, 1]]), max_new_tokens=8)
    grao = GRAO(beta=0.3, lam=0.2)
    terms_3NK = grao.coefficients(groups)
    weights_NK = grao.sequence_weights(groups)
    expected = weights_NK / torch.tensor([[2, torch.inf, 3], [4, torch.inf, 1]]).double() / 2
    assert torch.allclose(terms_3NK.sum(0), expected)
    assert (terms_3NK[0, :, -1] == 0).all() and (terms_3NK[1, :, :-1] == 0).all()
