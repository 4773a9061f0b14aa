"""The study's learning curves, over sampled tokens and over CPU seconds."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from study.plan import MAIN, TASKS
from study.tables import Runs

COSTS = {"sampled": "tokens sampled, thousands", "seconds": "CPU seconds"}
_COLOURS = dict(zip(MAIN, ("#555555", "#9467bd", "#2ca02c", "#1f77b4", "#d62728"), strict=True))


def draw(runs: Runs, folder: Path) -> list[Path]:
    """Draw a figure for each cost of training; one panel a task."""
    return [_draw(runs, cost, folder / f"study-{cost}.png") for cost in COSTS]


def _draw(runs: Runs, cost: str, path: Path) -> Path:
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axes, task in zip(panels, TASKS, strict=True):
        _panel(axes, runs, task, cost)
    last.set_axis_off()
    last.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="center")
    figure.savefig(path, dpi=130)
    return path


def _panel(axes: Axes, runs: Runs, task: str, cost: str) -> None:
    """Digits in place of every method, as means over seeds; SFT, which samples nothing, is flat."""
    per = 1000 if cost == "sampled" else 1
    for method, colour in _COLOURS.items():
        shares = [100 * share for share in runs.curve(task, method, "in_place")]
        costs = [spent / per for spent in runs.curve(task, method, cost)]
        if costs and costs[-1] == 0:
            axes.axhline(shares[-1], color=colour, linestyle="--", label=f"{method}, at its end")
        else:
            axes.plot(costs, shares, color=colour, marker=".", label=method)
    axes.set_title(TASKS[task].title, fontsize=10)
    axes.set_xlabel(COSTS[cost])
    axes.set_ylabel("digits in place, percent")
    axes.spines[["top", "right"]].set_visible(False)
