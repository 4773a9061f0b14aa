"""Checks all sides of all objectives against float64, then times them in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batches import batch_facts
from measure import Measured, interleave, outputs
from objective_problem import Problem, as_batch_of, make_problem, terms_of
from objective_sides import sides
from objective_truth import Case, Truth

CHECKED_ROWS = 1024  # of the batch on which errors are measured: float64 on a GPU is slow

Key = tuple[str, str]  # an objective and a side


def race_objectives(
    problem: Problem, cases: Mapping[str, Case], *, rounds: int
) -> tuple[dict[Key, Measured], dict[Key, str], dict[Key, dict[str, float]]]:
    """Time every side of every case in every round, beside the three GEMMs of the round.

    Returns:
        Measurements; the reasons why a side has none; and the errors of each side's outputs.

    Raises:
        AssertionError: a side's results are wrong.
    """
    runs = {
        (text, name): side
        for text, case in cases.items()
        for name, side in sides(text, case).items()
    }
    absences = {key: reason for key, side in runs.items() if (reason := side.absence(problem))}
    checked = checked_problem(problem)
    truth = Truth(checked)
    found = {}
    for key, side in runs.items():
        if key not in absences:
            text = key[0]
            batch = as_batch_of(checked, cases[text].objective)
            found[key] = truth.errors(text, cases[text], outputs(side, batch))
    del truth
    batches = {text: as_batch_of(problem, case.objective) for text, case in cases.items()}
    functions = {
        key: (lambda side=runs[key], batch=batches[key[0]]: outputs(side, batch)) for key in found
    }
    if checked is not problem:  # the first call compiles
        for function in functions.values():
            function()
    return interleave(functions, problem, rounds), absences, found


def checked_problem(problem: Problem) -> Problem:
    """The problem itself, or a shorter one of the same width and vocabulary."""
    hidden_TD = problem.hidden_TD
    if hidden_TD.shape[0] <= CHECKED_ROWS:
        return problem
    shape = CHECKED_ROWS, hidden_TD.shape[1], problem.head_VD.shape[0]
    return make_problem(shape, hidden_TD.dtype, hidden_TD.device)


def facts_of(text: str, case: Case, problem: Problem) -> dict[str, Any]:
    """What results say of a case: `live` is the share of rows that have a coefficient."""
    batch = as_batch_of(problem, case.objective)
    live_T = (terms_of(batch, case.objective) != 0).any(0)
    return batch_facts(problem) | {
        "objective": text,
        "passes": 2 if case.objective.two_passes else 1,
        "off_policy": case.off_policy,
        "live": live_T.double().mean().item(),
    }
