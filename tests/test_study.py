"""The study: two steps of its runs, its arithmetic, and the page that shows its results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from study import plan, preferences, runner, tables, tasks
from study.arms import Budget
from study.plan import Record, Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "study-cpu.json"

pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="needs a checkout")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, after two of pretraining and two of a reward model."""
    monkeypatch.setattr(plan, "BUDGET", Budget(steps=2, prompts_per_step=2, eval_steps=1))
    monkeypatch.setattr(plan, "SAMPLES", 16)
    monkeypatch.setattr(tasks, "HELD_OUT", 20)
    monkeypatch.setattr(tasks, "SHOWN", 50)
    for name in ("IMITATION_STEPS", "STEPS", "PAIRS"):
        monkeypatch.setattr(preferences, name, 2)
    for name, task in tasks.TASKS.items():
        few = dataclasses.replace(task, pretraining_steps=2)
        monkeypatch.setitem(tasks.TASKS, name, few)


def test_a_run_is_measured(small: None, tmp_path: Path) -> None:
    run = Run("learned reward", "GRAO", 3, 1e-3)
    record = runner.execute(run, folder=tmp_path)
    assert [point["step"] for point in record.curve] == [0, 1, 2]
    first, _, last = record.curve
    assert first["sampled"] == first["seconds"] == first["nag"] == 0
    assert 0 < last["sampled"] <= 2 * 16 * 9 and last["seconds"] > 0
    again = runner.execute(run, folder=tmp_path)  # the models that were kept are those trained
    assert [p["reward"] for p in again.curve] == [p["reward"] for p in record.curve]


def test_imitation_samples_nothing(small: None, tmp_path: Path) -> None:
    record = runner.execute(Run("weak base", "SFT", 0, 1e-3), folder=tmp_path)
    assert record.last["step"] == 2
    assert record.last["sampled"] == 0


def test_runs_that_are_done_are_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        Record(Run("weak base", "SFT", 0, 1e-3), [{"step": 0, "in_place": 0.5}]),
        Record(Run("weak base", "SFT", 1, 1e-3), error="the gradient is infinite"),
    ]
    for record in records:
        runner._append(record, tmp_path)
    assert runner.read_records(tmp_path) == records
    runner.run_all([record.run for record in records], tmp_path, workers=1)
    assert capsys.readouterr().out == ""


def ends(task: str, method: str, seed: int, rate: float, **scores: float) -> Record:
    point = {"step": plan.BUDGET.steps, "sampled": 1000, "seconds": 2.0} | scores
    return Record(Run(task, method, seed, rate), [point])


def test_rates_are_chosen_by_the_reward_on_the_tuning_seed() -> None:
    seed = plan.TUNING_SEED
    records = [
        ends("weak base", "SFT", seed, 1e-4, reward=0.5, in_place=0.9),
        ends("weak base", "SFT", seed, 3e-4, reward=0.6, in_place=0.1),
        ends("weak base", "SFT", 0, 1e-3, reward=0.9, in_place=0.9),
        Record(Run("weak base", "SFT", seed, 1e-3), error="the gradient is infinite"),
    ]
    rates = plan.chosen_rates(records)
    assert rates == {("weak base", "SFT"): 3e-4}
    assert plan.reported(["SFT", "GRAO"], rates, seeds=[4]) == [Run("weak base", "SFT", 4, 3e-4)]


def test_every_method_has_as_many_samples() -> None:
    budgets = [method.budget for method in plan.METHODS.values()]
    assert {each.prompts_per_step * each.num_generations for each in budgets} == {plan.SAMPLES}
    assert plan.TUNING_SEED not in plan.SEEDS


def test_differences_are_paired_by_seed() -> None:
    records = [
        ends("weak base", method, plan.TUNING_SEED, 1e-3, reward=0.5)
        for method in ("GRAO", "GRAO, clip")
    ]
    records += [
        ends("weak base", method, seed, 1e-3, in_place=value)
        for method, values in {"GRAO": (0.1, 0.5, 0.9), "GRAO, clip": (0.2, 0.6)}.items()
        for seed, value in enumerate(values)
    ]
    records.append(ends("weak base", "GRAO", 0, 3e-4, in_place=0.7))  # of a rate not chosen
    runs = tables.Runs(records)
    differences = runs.differences("weak base", "GRAO, clip", "GRAO", "in_place")
    assert differences == pytest.approx([0.1, 0.1])
    assert tables.percent(differences, sign=True) == "+10.0 ± 0.0"


def test_intervals_are_students() -> None:
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)


def test_the_page_shows_the_results() -> None:
    runs = tables.Runs([runner.record_of(each) for each in json.loads(RESULTS.read_text())["runs"]])
    page = (ROOT / "docs" / "results" / "study.md").read_text(encoding="utf-8")
    for title, table in tables.all_tables(runs).items():
        assert table in page, f"{title}: run `python benchmarks/study --tables`"
