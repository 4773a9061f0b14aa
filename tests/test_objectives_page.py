"""The table of docs/objectives.md says of every objective what its class says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from grao_fast.objectives import OBJECTIVES, Objective

PAGE = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("`"): cells
    for line in re.findall(r"^\| (`\w+` .*) \|$", PAGE, re.MULTILINE)
    for cells in [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)]]
    if len(cells) == 6
}


def class_of(objective: Objective) -> str:
    clipped_as_in_ppo = objective.ratio == "clipped" and objective.clip in (None, Objective.clip)
    if objective.two_passes:
        return "two passes"
    if objective.shaping or not clipped_as_in_ppo:
        return "of a row's own log-prob"
    return "before the head"


def needs_of(objective: Objective) -> str:
    needs = ["samples, rewards"] if objective.needs_samples else []
    if objective.needs_references:
        needs.append("references")
    elif objective.uses_references:
        needs.append("references if any")
    return "; ".join([*needs, *(["initial policy"] if objective.needs_initial else [])])


def test_every_objective_has_a_row_in_the_order_of_classes() -> None:
    assert set(ROWS) == set(OBJECTIVES)
    classes = [class_of(OBJECTIVES[name]()) for name in ROWS]
    assert classes == sorted(
        classes, key=["before the head", "of a row's own log-prob", "two passes"].index
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_says_what_the_class_says(name: str) -> None:
    objective = OBJECTIVES[name]()
    _, _, coefficients, flops, needs, _ = ROWS[name]
    assert coefficients.partition(";")[0] == class_of(objective)
    assert flops == ("8 D V" if objective.two_passes else "6 D V")
    assert needs == needs_of(objective)
    for option in re.findall(r"`(\w+)`", ROWS[name][1]):
        fields = set(OBJECTIVES[name].__dataclass_fields__) | set(OBJECTIVES) | {"max_new_tokens"}
        assert option in fields, option
