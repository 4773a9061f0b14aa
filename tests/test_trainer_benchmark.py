"""The benchmark of the trainers is fair: from equal tokens all take the formulas' steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("trl")

from trainer_curves import METRICS, curves
from trainer_ours import samples_of
from trainer_problem import GRAO_IN_TRL, GRPO, OURS, Run, Settings, order_of, right_and_brief
from trainer_race import check_first_step, check_texts, result_of, rollout_of
from trainer_sides import Replay, train
from transformers import AutoTokenizer

# By this seed no sample holds <pad>, which TRL does not decode.
SETTINGS = Settings(steps=2, prompts=2, samples=3, new_tokens=6, learning_rate=0.0, seed=2)
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"{n} + 4 = ?"}],
        "reference": f"It is {n + 4}.",
        "answer": str(n + 4),
    }
    for n in range(4)
]


class _Kept(Run):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[SimpleNamespace] = []

    def end(self, step: int, figures: dict[str, float]) -> None:
        self.steps.append(
            SimpleNamespace(figures=figures, said=list(self.said), sampled=list(self.sampled))
        )


@pytest.fixture(scope="module")
def runs(tiny_model: Path) -> dict[str, list[SimpleNamespace]]:
    kept, known = {}, samples_of(tiny_model, ROWS, SETTINGS)
    for side in (GRPO, GRAO_IN_TRL, OURS):
        kept[side] = _Kept()
        train(side, tiny_model, ROWS, SETTINGS, kept[side], sampling="replaced", known=known)
    assert [step.sampled for step in kept[OURS].steps] == known
    return {side: own.steps for side, own in kept.items()}


@pytest.fixture(scope="module")
def rollout(runs, tiny_model: Path) -> Any:
    rows = [ROWS[i] for i in order_of(ROWS, SETTINGS).batch(0)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return rollout_of(runs[GRPO][0].sampled, rows, tokenizer, SETTINGS.samples)


def first(runs) -> dict[str, dict[str, float]]:
    return {side: dict(own[0].figures) for side, own in runs.items()}


def test_all_take_the_formulas_first_step(runs, rollout, tiny_model: Path) -> None:
    check_first_step(first(runs), rollout, tiny_model)


@pytest.mark.parametrize(
    ("side", "name"), [(OURS, "grad_norm"), (GRPO, "grad_norm"), (GRAO_IN_TRL, "loss")]
)
def test_another_step_is_refused(runs, rollout, tiny_model: Path, side: str, name: str) -> None:
    figures = first(runs)
    figures[side][name] *= 1.001
    with pytest.raises(AssertionError, match="is off by"):
        check_first_step(figures, rollout, tiny_model)


def test_every_round_has_the_same_texts(runs) -> None:
    for turn in range(SETTINGS.steps):
        said = {side: list(own[turn].said) for side, own in runs.items()}
        check_texts(said, SETTINGS.prompts)
        said[GRAO_IN_TRL][0] += "?"
        with pytest.raises(AssertionError, match="grao_trainer has scored other texts"):
            check_texts(said, SETTINGS.prompts)


def test_results_are_of_the_rounds_after_the_warm_up(runs) -> None:
    factors = {GRPO: 3.0, GRAO_IN_TRL: 1.5, OURS: 1.0}
    steps = {
        side: [own[1].figures | {"step": factors[side] * took} for took in (100.0, 1.0, 2.0, 4.0)]
        for side, own in runs.items()
    }
    result = result_of(steps, SETTINGS, load=0.5, minutes=2.0)
    for row in result["rows"]:
        factor = factors[row["variant"]]
        assert row["rounds"] == 3 and row["median"] == 2.0 * factor
        assert [each["step"] / factor for each in row["each_round"]] == [1.0, 2.0, 4.0]
        for other, over in row["over"].items():
            assert over["q1"] == over["median"] == over["q3"] == factor / factors[other]
    assert len({row["learned_tokens"] for row in result["rows"]}) == 1


def test_trl_draws_its_own_samples_and_learns_from_those_known() -> None:
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=1),
        _tokenize_prompts=lambda prompts: ([[5], [5]], None),
        _generate_single_turn=lambda *arguments: ([[1], [2, 3]], None),
    )
    known = [[], [([5], [7, 7, 7]), ([5], [8])]]
    for sampling, own in (("replaced", [([5], [1]), ([5], [2, 3])]), ("replayed", [])):
        replay = Replay(SETTINGS, known, sampling)
        assert replay(["p", "p"], trainer)["completion_ids"] == ([7, 7, 7], [8])
        assert replay.own == own


def test_curves_lie_over_each_other(tiny_model: Path) -> None:
    found = curves(tiny_model, ROWS, replace(SETTINGS, learning_rate=1e-3))
    assert [step["same"] for step in found["shared"]] == [SETTINGS.prompts * SETTINGS.samples] * 2
    for name in ("replayed", "shared"):
        for ours, other in zip(found["ours"], found[name], strict=True):
            for metric in METRICS:
                assert other[metric] == pytest.approx(ours[metric], rel=1e-4, abs=1e-5)
    assert found["own"][0]["reference/logprob"] == pytest.approx(
        found["ours"][0]["reference/logprob"], rel=1e-5
    )
    assert found["own"][1]["reward"] != found["ours"][1]["reward"]


def test_the_reward_reads_the_last_number() -> None:
    texts = ["2 + 4 = 6", "6, or 7", "", "-6"]
    right = [score >= 1 for score in right_and_brief(texts, ["6"] * 4)]
    assert right == [True, False, False, False]
