"""The tables and the picture of the trainers, made of a few figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import table
import trainer_tables

FACTS = {
    "command": "c",
    "date": "2026-01-02",
    "machine": {"device": "A", "threads": 2, "load": 1},
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


def filled(results: Path, name: str, result: dict[str, Any]) -> str:
    (results / f"{name}.json").write_text(json.dumps(result))
    return table.write_tables(f"<!-- table: {name} -->\nold\n<!-- end -->")


def spread(median: float, q1: float, q3: float) -> dict[str, float]:
    return {"rounds": 5, "median": median, "q1": q1, "q3": q3}


def test_trainers_stand_below_each_other(results: Path) -> None:
    shared = {"sample": 4.0, "score": 0.0021, "update": 5.5, "learned_tokens": 744.0}
    ours = {"variant": "ours", "label": "ours", "own_tokens": 744.0, "peak_mib": 3284.4, "over": {}}
    theirs = {"variant": "grao_trainer", "label": "theirs", "own_tokens": 736, "peak_mib": None}
    theirs["over"] = {"ours": spread(2.0, 1.9, 2.14), "grpo": spread(0.9, 0.8, 1.0)}
    rows = [ours | spread(9.5, 9.0, 10.04) | shared, theirs | spread(19.0, 18.0, 20.0) | shared]
    settings = {"prompts": 2, "samples": 8, "new_tokens": 48}
    result = FACTS | {"settings": settings, "absent": {}, "minutes": 9.5, "rows": rows}
    text = filled(results, "trainers-here", result)
    assert "| ours | 9.50 (9.00 to 10.0) | - | 4.00 | 0.002 | 5.50 | 744 | 744 | 3284 |" in text
    assert "| theirs | 19.0 (18.0 to 20.0) | 2.00 (1.90 to 2.14) | 4.00 |" in text
    assert "| 5.50 | 736 | 744 | - |" in text
    assert "2 prompts with 8 samples of at most 48 tokens" in text and "Medians of 5 rounds" in text
    assert "A step of GRAOTrainer over one of GRPOTrainer is 0.90 (0.80 to 1.00)." in text
    assert "The whole took 9.50 minutes." in text


def test_curves_say_how_far_they_are_apart(results: Path) -> None:
    def run(shift: float, same: list[int]) -> list[dict[str, float]]:
        step = {"reward": 0.5 + shift, "loss": 1.0, "reference/logprob": -1.0 - 2 * shift}
        return [step | {"same": count} for count in same]

    runs = {
        "ours": run(0.0, [4] * 10),
        "replayed": run(1e-6, [4] * 10),
        "shared": run(0.25, [4, 4] + [3] * 8),
        "own": run(0.5, [0] * 10),
    }
    result = FACTS | {"settings": {"prompts": 2, "samples": 2}, "runs": runs}
    text = filled(results, "trainer_curves-here", result)
    assert "| reward of the samples | 1.0e-06 | 2.5e-01 | 0.500 | 0.500 | 0.750 | 1.000 |" in text
    assert "| log p(reference) | 2.0e-06 | 5.0e-01 | -1.000 |" in text
    assert "the first 2 steps have the same samples, and 32 of 40 are the same in all" in text
    (path,) = trainer_tables.draw_curves("trainer_curves-here", result, results)
    assert path.read_bytes().startswith(b"\x89PNG")
