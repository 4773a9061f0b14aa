"""The study of prompts worth sampling: its arithmetic, and the page that shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prompt_study as study
import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prompts-cpu.json"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="needs a checkout")


def row(step: int, **more: Any) -> dict[str, Any]:
    step_rows = {"completions/mean_length": 2.0, "tokens": 7.0, "frac_dead": 0.5}
    return {"step": step, "loss": 0.0} | step_rows | more


def test_tokens_are_those_of_all_rounds() -> None:
    further = {"dynamic_sampling/tokens": 90.0, "dynamic_sampling/frac_dead": 0.75}
    rows = [
        {"step": 0, "eval/metric": 0.1, "eval/reward": 0.2},
        row(1),
        row(2, **further),
        {"step": 2, "eval/metric": 0.3, "eval/reward": 0.6},
    ]
    run = study._curve(rows, samples=10)
    assert [(point["sampled"], point["trained"]) for point in run["curve"]] == [(0, 0), (110, 14)]
    assert run["dead"] == {"trained": [0.5, 0.5], "sampled": [0.5, 0.75]}
    assert study.at_tokens(run, 55, "sampled") == pytest.approx(0.4)
    assert study.at_tokens(run, 14, "trained") == pytest.approx(0.6)


def test_the_page_shows_the_results() -> None:
    runs = json.loads(RESULTS.read_text())["runs"]
    page = (ROOT / "docs" / "results" / "prompts.md").read_text(encoding="utf-8")
    assert study.table(runs) in page
