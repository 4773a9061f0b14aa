"""Reads what a run has written so far into its folder, for a report.

Any file but metrics.jsonl may be missing, as in a run that has not finished, and any may be torn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grao_fast.reporting.series import Series, as_number, mean_of, series_of
from grao_fast.system.errors import UserError
from grao_fast.system.lines import METRICS_FILE, read_lines

MOST_RUNS = 7  # colours that can be told apart
_STRETCH = 10  # the first and last tenth of a run are compared

# Means over held-out prompts, with their names in the summary.
EVALUATIONS = {"reward": "reward", "ras": "RAS", "nag": "NAG", "metric": "metric"}


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it.

    name: tells it apart from the others of a report.
    rows: of metrics.jsonl.
    config, facts, summary: config.json, run.json and summary.json; empty where there is none.
    """

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    facts: dict[str, Any]
    summary: dict[str, Any]

    def series(self, metric: str) -> Series:
        """Return the steps and values of a metric; empty if it has none."""
        return series_of(self.rows, metric)

    @property
    def metrics(self) -> set[str]:
        """The names of all metrics."""
        return {name for row in self.rows for name in row} - {"step"}

    @property
    def steps(self) -> int:
        """The last step with metrics."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total_steps(self) -> int | None:
        """The steps that the run was to do; None if unknown."""
        for value in (self.facts.get("total_steps"), self.config.get("max_steps")):
            if type(value) is int and value > 0:
                return value
        return None

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end, and wrote its summary."""
        return self.summary.get("steps") == self.steps

    @property
    def status(self) -> str:
        """How far the run is, in words."""
        if self.is_finished:
            return f"finished after {_counted(self.steps, 'step')}"
        of = "" if self.total_steps is None else f" of {self.total_steps:,}"
        return f"not finished: {self.steps:,}{of} steps"

    def change(self, metric: str) -> tuple[float, float]:
        """Return the means of a metric over the first and the last tenth of the run."""
        values = self.series(metric)[1]
        stretch = max(1, len(values) // _STRETCH)
        return mean_of(values[:stretch]), mean_of(values[-stretch:])

    def evaluated(self, metric: str) -> tuple[float, float, tuple[float, float] | None]:
        """Return a held-out mean before and after, and the latter's 95% interval if it is known."""
        values = self.series(f"eval/{metric}")[1]
        if not values:
            return float("nan"), float("nan"), None
        with suppress(KeyError, TypeError, ValueError):
            low, high = self.summary["after"]["intervals"][metric]
            return values[0], values[-1], (as_number(low), as_number(high))
        return values[0], values[-1], None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of packages, by name."""
        found = self.facts.get("versions") or self.summary.get("versions")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these folders.

    Raises:
        UserError: there are none or too many folders, one is given twice, or one holds no run.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    if not 1 <= len(paths) <= MOST_RUNS:
        raise UserError(f"a report shows 1 to {MOST_RUNS} runs, got {len(paths)}")
    real = [path.resolve() for path in paths]
    for path in paths:
        if real.count(path.resolve()) > 1:
            raise UserError(f"{path} is given twice: give each run's output_dir once")
    return [_read(path, name) for path, name in zip(paths, _names(real), strict=True)]


def _read(folder: Path, name: str) -> Run:
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {METRICS_FILE}: give the output_dir of a run")
    rows = read_lines(path)
    if not rows:
        raise UserError(f"{path} holds nothing to report yet")
    facts = (_json(folder / f"{name}.json") for name in ("config", "run", "summary"))
    return Run(name, folder, rows, *facts)


def _json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if there is none, or it cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}


def _names(folders: Sequence[Path]) -> list[str]:
    """Return for each folder the shortest end of its path that no other one has."""
    most = max(len(folder.parts) for folder in folders)
    for parts in range(1, most + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def latest_evaluation(folder: Path) -> tuple[int, Path] | None:
    """Return the step and the file of the last evaluation after training began; None: none."""
    found = []
    for path in folder.glob("eval-*.jsonl"):
        match = re.fullmatch(r"eval-(\d{1,18})\.jsonl", path.name)
        if match and int(match[1]) > 0:
            found.append((int(match[1]), path))
    return max(found, default=None)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
