"""Times the head pass of every objective beside TRL's log-probs, Liger's losses and naive."""

from __future__ import annotations

from typing import Any

import torch
from measure import outputs
from objective_problem import OBJECTIVE_SHAPES, Problem, as_batch_of, make_problem
from objective_race import checked_problem, facts_of
from objective_sides import sides
from objective_truth import Case, Truth, cases
from peers import Peer

from suite.contend import guarded, take_turns, verdict
from suite.runner import Run, attempt, free_memory

# Those whose passes differ most, in case there is no time for all.
FIRST = ("grpo", "luffy", "dpo", "cispo", "srft", "grao")


def objectives(run: Run) -> str:
    """Report errors, time and memory of every side of every objective."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    problem = make_problem(OBJECTIVE_SHAPES["tiny" if run.tiny else "cuda"], dtype, run.device)
    checked = checked_problem(problem)
    truth = Truth(checked)
    free_memory()
    all_cases = cases()
    ratios = {}
    for text in sorted(all_cases, key=lambda text: text not in FIRST):
        if not run.in_time(text):
            continue
        case = all_cases[text]
        found = _contend(run, text, case, (problem, checked), truth)
        medians = {name: each["median"] for name, each in found.items() if "median" in each}
        ours = medians.pop("ours", None)
        if ours is not None and medians:
            ratios[text] = min(medians.values()) / ours
        free_memory()
    shown = ", ".join(f"{text} {ratio:.2f}x" for text, ratio in list(ratios.items())[:4])
    return verdict(run, f"the best other's time over ours: {shown}")


def _contend(
    run: Run, text: str, case: Case, problems: tuple[Problem, Problem], truth: Truth
) -> dict[str, dict[str, Any]]:
    """Measure every side; one that fails has the reason in place of its figures."""
    facts = facts_of(text, case, problems[0])
    problem, checked = (as_batch_of(each, case.objective) for each in problems)
    found: dict[str, dict[str, Any]] = {}
    run.report[text] = found
    functions = {}
    for name, side in sides(text, case).items():
        found[name] = {"label": side.label}

        def look(side: Peer = side) -> dict[str, Any]:
            if reason := side.absence(problem):
                return {"reason": reason}
            errors = truth.errors(text, case, outputs(side, checked))
            outputs(side, problem)  # compiles, and may find no memory
            return {"errors": errors}

        figures, reason = attempt(look)
        found[name] |= {"reason": reason} if figures is None else figures
        if "reason" not in found[name]:
            functions[name] = guarded(side, problem, found[name])
    _, reason = attempt(lambda: take_turns(run, text, functions, problem, 2 if run.tiny else 3))
    if reason:
        run.leave_out(f"times, {text}", reason)
    for figures in found.values():
        if "median" in figures:
            figures |= facts
    if "median" not in found["ours"]:
        lost = f"ours, {text}: {found['ours'].get('reason', reason)}"
        run.report.setdefault("ours_failed", []).append(lost)
    return found
