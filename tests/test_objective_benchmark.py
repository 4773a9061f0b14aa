"""What benchmarks/bench_objectives.py times is every objective, and wrong results are seen."""

from __future__ import annotations

import pytest
import torch
from measure import outputs
from objective_problem import Problem, as_batch_of, make_problem
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
        case = CASES[text]
        found = outputs(sides(text, case)[name], as_batch_of(problem, case.objective))
        assert max(truth.errors(text, case, found).values()) < 1e-5, name


def test_a_wrong_result_fails(problem: Problem, truth: Truth) -> None:
    batch = as_batch_of(problem, CASES["dapo"].objective)
    of_dapo = outputs(sides("dapo", CASES["dapo"])["ours"], batch)
    with pytest.raises(AssertionError, match="grpo: loss is off by"):
        truth.errors("grpo", CASES["grpo"], of_dapo)


def test_batches_are_of_the_sequences_that_an_objective_learns_from(problem: Problem) -> None:
    """Prompts' rows are dead, and for advantages those of a group of equal rewards."""
    counted = int((problem.sequence_T >= 0).sum())
    live = {text: facts_of(text, case, problem)["live"] * 1024 for text, case in CASES.items()}
    assert live["sft"] == live["awr"] == live["reinforce"] == counted < 1024
    assert live["grpo"] == live["gspo(low=0.2, high=0.28)"] == counted - 8 * 32  # one group
    for text, samples, references in (("sft", 0, 32), ("grpo", 32, 0), ("chord", 28, 4)):
        batch = as_batch_of(problem, CASES[text].objective)
        present_NK = batch.groups.present_NK
        assert (present_NK[:, :-1].sum(), present_NK[:, -1].sum()) == (samples, references)
        sampled_T = ~batch.old_logprob_T.isnan()
        assert sampled_T.sum() == batch.groups.length_NK[:, :-1].sum()
