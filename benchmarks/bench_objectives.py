"""Times the head pass of every objective: ours, TRL's log-probs, Liger's losses, the naive formula.

    pytest benchmarks/bench_objectives.py --benchmark-only

All are given one batch, of which half of the rows count, and take turns; `gemm_ratio` is the time
over that of the three bare GEMMs over all rows. Each side's loss and gradients are first compared
with the objective's specification in float64, and wrong ones fail. An objective of two passes is
timed with both.
"""

from __future__ import annotations

import pytest
import torch
from batches import DEVICE, DTYPES, SIZE
from objective_problem import OBJECTIVE_SHAPES, make_problem
from objective_race import facts_of, race_objectives
from objective_sides import NO_SUCH_LOSS, sides
from objective_truth import cases
from replay import clock, report

ROUNDS = {"cuda": 5, "cpu": 3, "tiny": 2}[SIZE]
CASES = cases()
KEYS = [(text, name) for text, case in CASES.items() for name in sides(text, case)]

pytestmark = pytest.mark.benchmark(timer=clock, group="head pass of objectives")


@pytest.fixture(scope="module")
def race():
    torch._dynamo.reset()
    problem = make_problem(OBJECTIVE_SHAPES[SIZE], DTYPES[DEVICE], torch.device(DEVICE))
    measured, absences, errors = race_objectives(problem, CASES, rounds=ROUNDS)
    facts = {text: facts_of(text, case, problem) for text, case in CASES.items()}
    return measured, absences, errors, facts


@pytest.mark.parametrize(("text", "name"), KEYS)
def test_forward_and_backward(benchmark, race, text: str, name: str) -> None:
    measured, absences, errors, facts = race
    key = text, name
    if absences.get(key) == NO_SUCH_LOSS:
        pytest.skip(NO_SUCH_LOSS)
    own = facts[text] | {"errors": errors.get(key)}
    report(benchmark, (measured, absences), key, sides(text, CASES[text])[name], own)
