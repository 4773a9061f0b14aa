"""The detectors of a run's faults, on planted curves and on sound ones; the metrics they read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from grao_fast.config import ReferenceAdvantage
from grao_fast.kernels import sequence_weights
from grao_fast.sampling import Completion
from grao_fast.training.diagnosis import DETECTORS, Diagnosis
from grao_fast.training.history import FIRST, LATEST
from grao_fast.training.metrics import diversity, group_metrics

STEPS = 60
Curve = Callable[[float], float]  # of the share of the run that is over


def run(**curves: Curve | float) -> list[dict[str, float]]:
    """The metrics of a sound run that solves its task, with other curves for some of them."""
    sound: dict[str, Curve | float] = {
        "reward": lambda t: 0.2 + 0.7 * t,
        "reward_std": lambda t: 0.4 - 0.3 * t,
        "frac_reward_zero_std": lambda t: 0.05 + 0.7 * t,
        "frac_dead": lambda t: 0.6 * t,
        "reference/frac_negative": lambda t: 0.1 + 0.7 * t,
        "reference/logprob": lambda t: -1.5 + 0.5 * t,
        "reference/mean_length": 90.0,
        "entropy": lambda t: 2.0 * math.exp(-4 * t),
        "completions/diversity": lambda t: 1.0 - 0.9 * t,
        "completions/mean_length": lambda t: 200 - 120 * t,
        "completions/clipped_ratio": lambda t: 0.6 * (1 - t),
        "sampling/logp_diff": 1e-5,
    }
    named = {name.replace("__", "/"): curve for name, curve in curves.items()}
    generator = torch.Generator().manual_seed(0)
    rows = []
    for step in range(STEPS):
        row = {}
        for name, curve in {**sound, **named}.items():
            value = curve(step / STEPS) if callable(curve) else curve
            noise = 1 + 0.05 * float(torch.randn((), generator=generator))
            row[name] = value * (noise if 0 < abs(value) < 1 else 1)
        rows.append(row)
    return rows


def said(rows: list[dict[str, float]], **options: Any) -> list[str]:
    diagnosis = Diagnosis(**options)
    return [text for step, row in enumerate(rows, 1) for text in diagnosis.messages(step, row)]


FLAT = 0.3  # a reward that does not rise

# By detector: the curves of a run that has the fault, and words of the message.
PLANTED: dict[str, tuple[dict[str, Curve | float], str]] = {
    "no_signal": (
        {"frac_dead": 1.0, "frac_reward_zero_std": 1.0},
        "the loss is 0, since in every group",
    ),
    "falling_references": (
        {"reference__logprob": lambda t: -1.5 - 3 * t},
        "the samples, which are reinforced, draw the policy away from them. Lower learning_rate",
    ),
    "losing_references": ({"reference__frac_negative": 1.0}, "the references lose in 100% of"),
    "lost_entropy": (
        {
            "entropy": lambda t: 2 * math.exp(-8 * t),
            "reward": FLAT,
            "completions__diversity": 0.9,
        },
        "the policy's entropy fell from 1.6 to 0.14 nats a token",
    ),
    "lost_diversity": (
        {"completions__diversity": lambda t: 1 - t, "reward": FLAT, "entropy": 2.0},
        "of the pairs of a prompt's samples are the same text",
    ),
    "lost_length": (
        {"completions__mean_length": lambda t: 200 - 195 * t},
        "completions shrank from 194 to",
    ),
    "rising_truncation": (
        {"completions__clipped_ratio": lambda t: 0.1 + 0.7 * t},
        "of the completions are cut at max_new_tokens, 12% at the start",
    ),
    "blunt_reward": (
        {"frac_reward_zero_std": lambda t: min(1.0, 2 * t)},
        "of groups all samples have the same reward",
    ),
    "other_sampler": (
        {"sampling__logp_diff": lambda t: 1e-5 if t < 0.5 else 2e-3},
        "the sampler's log-probs differ from the policy's by 0.0",
    ),
}


def test_every_detector_has_a_planted_fault() -> None:
    assert PLANTED.keys() == {detector.__name__ for detector in DETECTORS}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_told_once_with_its_remedy(name: str) -> None:
    curves, words = PLANTED[name]
    (message,) = said(run(**curves))
    assert words in message
    assert message.startswith("step ") and "\n" not in message


@pytest.mark.parametrize("form", get_args(ReferenceAdvantage))
def test_advice_on_losing_references_is_that_of_their_form(form: ReferenceAdvantage) -> None:
    """Under the floor none is pushed down, and under the clip the regulariser does it."""
    rows = run(reference__logprob=lambda t: -1.5 - 3 * t, reference__frac_negative=1.0)
    lost, fell = said(rows, reference_advantage=form)
    assert ('Set reference_advantage="floor"' in fell) == (form != "floor")
    assert ("are made less likely" in lost) == (form != "floor")
    assert ("lower lam" in fell) == (form == "clip")


def test_nothing_is_said_of_sound_runs() -> None:
    assert said(run()) == []
    assert said(run(reference__logprob=math.nan, entropy=math.nan, reward=math.nan)) == []
    assert said([{"loss": 0.0}] * STEPS) == []  # metrics of another version


def test_of_a_solved_task_collapses_are_no_faults() -> None:
    """The reward has risen by half a deviation: entropy and diversity had to fall."""
    (curves, _), (others, _) = PLANTED["lost_entropy"], PLANTED["lost_diversity"]
    assert said(run(**(others | curves | {"reward": lambda t: 0.2 + 0.7 * t}))) == []


def test_short_completions_are_no_fault_beside_short_references() -> None:
    curves, _ = PLANTED["lost_length"]
    assert said(run(**curves, reference__mean_length=6.0)) == []


def test_rewards_that_only_nearly_agree_are_told() -> None:
    (message,) = said(run(reward_std=lambda t: 0.4 * math.exp(-9 * t)))
    assert "rewards within a group deviate by 0.00" in message
    assert "the reward no longer tells samples apart" in message


def test_few_steps_are_not_judged() -> None:
    curves, _ = PLANTED["falling_references"]
    fall = run(**curves)[:: STEPS // 10]
    assert said(fall[:LATEST]) == []
    assert said(run(reference__frac_negative=1.0)[: LATEST - 1]) == []
    sudden = run(completions__clipped_ratio=lambda t: 0.1 if t * STEPS < FIRST else 0.9)
    (message,) = said(sudden)
    assert message.startswith(f"step {FIRST + LATEST}: ")


def test_a_loss_of_zero_is_explained() -> None:
    dead = {"frac_dead": 1.0, "reward": math.nan, "frac_reward_zero_std": 1.0}
    (message,) = said([dead] * 12)
    assert message.startswith("step 1: ") and "None for every sample" in message
    assert said([dead | {"kl": 0.01}]) == []  # the KL term gives a loss
    (message,) = said([dead | {"reward": 0.2, "frac_reward_zero_std": 0.5}])
    assert "gives no sequence a weight, though rewards differ (mean 0.2)" in message


def test_the_first_step_tells_what_rounding_causes() -> None:
    def gaps(*values: float) -> list[str]:
        return said([{"sampling/logp_diff": value} for value in values])

    (message,) = gaps(0.02, 0.3, 0.3)
    assert "step 2: the sampler's log-probs differ from the policy's by 0.3 nats" in message
    assert gaps(0.02, math.nan, 0.09) == []
    (message,) = gaps(1e-5, 2e-5, 8e-4, 2e-3)
    assert "step 4: " in message and "more than the 0.001 that rounding explains" in message
    stale = {"sampling/logp_diff": 0.5, "sampling/staleness": 1.0}
    assert said([{"sampling/logp_diff": 1e-5}, stale]) == []


@pytest.mark.parametrize("stop", [3, 30, 45])
def test_a_resumed_run_says_what_it_would_have_said(stop: int) -> None:
    """Findings come from metrics.jsonl, where NaN is null and evaluations have lines too."""
    curves = PLANTED["falling_references"][0] | PLANTED["blunt_reward"][0]
    rows = [row | {"loss": 0.1, "kl": math.nan} for row in run(**curves)]
    whole = said(rows)
    assert len(whole) == 2
    logged = [{"step": step, **row, "kl": None} for step, row in enumerate(rows[:stop], 1)]
    logged.insert(2, {"step": 2, "eval/reward": 0.5})
    resumed = Diagnosis()
    assert resumed.recall(json.loads(json.dumps(logged)))["loss"] == 0.1
    later = [
        text
        for step, row in enumerate(rows[stop:], stop + 1)
        for text in resumed.messages(step, row)
    ]
    assert later == [text for text in whole if int(text.split()[1].rstrip(":")) > stop]


# ---- metrics


def test_share_of_the_gradient_that_imitates() -> None:
    """w_i = (1 + lam) A_i / G, w_y = beta A_y - (lam / G) sum A_i, worked out by hand."""
    advantages_NK = torch.tensor(
        [[-1.0, -1.0, 2.0], [1.0, 1.0, -2.0], [0.0, 0.0, 0.0], [1.0, -1.0, math.nan]]
    )
    weights_NK = sequence_weights(advantages_NK, beta=0.5, lam=0.5, reference_advantage="signed")
    metrics = group_metrics(torch.zeros(4, 3), advantages_NK, weights_NK)
    pulls = 0.5 * 2 + 0.5 / 2 * 2  # of the first group; the second's reference is pushed down
    total = 2 * pulls + 6 * 1.5 * 1 / 2
    assert float(metrics["reference/imitation_share"]) == pytest.approx(pulls / total)
    dead = group_metrics(*[torch.zeros(1, 3)] * 3)
    assert dead["reference/imitation_share"].isnan()


def test_diversity() -> None:
    def group(*texts: list[int]) -> list[Completion]:
        return [Completion(ids, [0.0] * len(ids), True) for ids in texts]

    pair = group([1, 2], [1, 2], [1], [3])  # one of six pairs is the same
    assert diversity([pair]) == pytest.approx(5 / 6)
    assert diversity([pair, group([1], [1])]) == pytest.approx(5 / 12)
    assert diversity([group([1], [2]), group([1])]) == 1.0
    assert math.isnan(diversity([group([1])]))
