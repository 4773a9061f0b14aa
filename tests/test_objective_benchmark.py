"""What benchmarks/bench_objectives.py times is every objective, and wrong results are seen."""

from __future__ import annotations

import pytest
import torch
from measure import outputs
from objective_problem import Problem, make_problem
from objective_race import facts_of
from objective_sides import sides
from objective_truth import Truth, cases

from grao_fast.objectives import OBJECTIVES

CASES = cases()


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem((1024, 16, 67), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Truth:
    return Truth(problem)


def test_every_objective_is_measured() -> None:
    assert {text.partition("(")[0] for text in CASES} == set(OBJECTIVES)


@pytest.mark.parametrize("text", CASES)
def test_ours_and_naive_are_the_specification(text: str, problem: Problem, truth: Truth) -> None:
    for name in ("ours", "naive"):
        side = sides(text, CASES[text])[name]
        assert max(truth.errors(text, CASES[text], outputs(side, problem)).values()) < 1e-5, name


def test_a_wrong_result_fails(problem: Problem, truth: Truth) -> None:
    of_dapo = outputs(sides("dapo", CASES["dapo"])["ours"], problem)
    with pytest.raises(AssertionError, match="grpo: loss is off by"):
        truth.errors("grpo", CASES["grpo"], of_dapo)


def test_rows_are_dead_as_in_a_real_batch(problem: Problem) -> None:
    """Prompts' rows, and for rewards those of a group of equal ones; ratios pass every bound."""
    live = {text: facts_of(text, CASES[text], problem)["live"] for text in ("sft", "grpo", "awr")}
    groups = problem.groups
    counted = groups.length_NK.sum() / 1024
    assert live["sft"] == groups.length_NK[:, -1].sum() / 1024
    assert live["awr"] == pytest.approx(float(counted) - live["sft"])
    assert live["grpo"] < live["awr"]
    assert problem.old_logprob_T.isnan().any() and not problem.old_logprob_T.isnan().all()
