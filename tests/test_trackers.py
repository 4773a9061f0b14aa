"""Tests of the experiment trackers themselves, where they are installed; none needs a network."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from grao_fast import GRAOConfig
from grao_fast.reporting.tracking import Tracker

NAME = 'rewards/Near("answer", most=3)/mean'
PLAIN = "rewards/Near__answer__ most_3_/mean"


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f'needs {package}: pip install "grao-fast[trackers]"')


def report(folder: Path, name: str) -> None:
    """Log two steps, the first without a loss, and an evaluation."""
    options = {"total_steps": 2, "show_progress": False, "config": GRAOConfig().to_dict()}
    with Tracker(folder, report_to=(name,), **options) as run:
        run.log(1, {"reward": 0.25, "loss": float("nan"), NAME: 1.0, "time/sample": 2.0})
        run.log(2, {"reward": 0.5, "loss": -1.0, NAME: 2.0, "time/sample": 2.0})
        run.log(2, {"eval/ras": 0.75})
        assert run._failed == set()


def test_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    report(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "grao-fast"))
    events.Reload()
    assert {"reward", "loss", PLAIN, "time/sample", "eval/ras"} <= set(events.Tags()["scalars"])
    assert [(each.step, each.value) for each in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(2, -1.0)]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when imported
    needs("trackio")
    report(tmp_path, "trackio")
    (path,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(path).execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in rows] == [1, 2, 2]
    assert str(rows[0][1]).count(PLAIN) == 1 and "0.75" in str(rows[2][1])


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    report(tmp_path, "mlflow")
    database = sqlite3.connect(tmp_path / "runs.db")
    rows = database.execute("select key, step, value from metrics order by key, step").fetchall()
    assert (PLAIN, 1, 1.0) in rows and ("eval/ras", 2, 0.75) in rows
    assert [row[1:] for row in rows if row[0] == "loss"] == [(2, -1.0)]
    options = dict(database.execute("select key, value from params").fetchall())
    assert options["beta"] == "0.5"


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    needs("wandb")
    report(tmp_path, "wandb")
    import wandb

    wandb.teardown()  # waits for the process that writes
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    held = path.read_bytes()
    assert b"eval/ras" in held and PLAIN.encode() in held
