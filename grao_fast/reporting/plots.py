"""Draws the plots of a run from its metrics.jsonl.

    reward.png      mean reward of the samples and of the references; evaluations; RAS and NAG
    loss.png        the loss
    components.png  shares of the magnitudes of the objective's terms, if it has several: for GRAO
                    |exploration|, |imitation| and |alignment|, the paper's Figure 5

Raw values are drawn faintly, with a running mean on top; a null value is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from grao_fast.reporting.series import (
    Series,
    component_shares,
    components_of,
    running_mean,
    series_of,
)
from grao_fast.system.errors import UserError
from grao_fast.system.files import named_when_full
from grao_fast.system.lines import METRICS_FILE, read_lines
from grao_fast.system.visible import visible_errors

# Okabe and Ito's palette, for colour-blind readers.
_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_GREY = "#666666"
_SIZE_INCHES = (6.4, 3.8)
_DPI = 150
_RATE_MARGIN = 0.05  # above and below the rates, so that noise does not fill the panel
_COLOURS = (_BLUE, _ORANGE, _GREEN)  # of an objective's terms
_RATES = {
    "eval/ras": ("RAS (beats the reference)", _GREEN, "o"),
    "eval/nag": ("NAG (wins minus losses against the base model)", _VERMILION, "s"),
}


@visible_errors()
def plot_run(output_dir: str | Path) -> list[Path]:
    """Draw the plots of a run into its folder.

    Args:
        output_dir: folder of the run, with its metrics.jsonl.

    Returns:
        The files written. A plot without metrics is left out.

    Raises:
        ValueError: there is no metrics.jsonl, or it holds nothing to plot.
    """
    folder = Path(output_dir).expanduser()
    path = folder / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {METRICS_FILE}: give the output_dir of a run")
    rows = read_lines(path)
    figures = {
        "reward.png": _reward(rows),
        "loss.png": _loss(rows),
        "components.png": _components(rows),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            with named_when_full(folder / name, folder / name):
                FigureCanvasAgg(figure).print_png(folder / name)
            written.append(folder / name)
    if not written:
        raise UserError(f"{path} holds nothing to plot yet")
    return written


def _reward(rows: Sequence[dict[str, Any]]) -> Figure | None:
    lines = {
        "samples": (series_of(rows, "reward"), _BLUE),
        "references": (series_of(rows, "reference/reward"), _ORANGE),
    }
    evaluated = series_of(rows, "eval/reward")
    rates = {key: series_of(rows, key) for key in _RATES}
    rates = {key: series for key, series in rates.items() if series[0]}
    if not lines["samples"][0][0] and not evaluated[0] and not rates:
        return None
    figure, axes, *below = _figure("Reward", "mean reward", panels=2 if rates else 1)
    for label, (series, colour) in lines.items():
        _draw(axes, series, label, colour)
    if evaluated[0]:
        axes.plot(
            *evaluated, "D", color=_VERMILION, markersize=5, label="evaluation, greedy", zorder=4
        )
    _legend(axes)
    for key, series in rates.items():
        label, colour, marker = _RATES[key]
        below[0].plot(*series, "-", marker=marker, color=colour, markersize=4, label=label)
    if rates:
        present = [v for _, values in rates.values() for v in values if not math.isnan(v)]
        below[0].set_ylim(min(present) - _RATE_MARGIN, max(present) + _RATE_MARGIN)
        below[0].set_ylabel("share of prompts")
        below[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _legend(below[0])
    return figure


def _loss(rows: Sequence[dict[str, Any]]) -> Figure | None:
    series = series_of(rows, "loss")
    if not series[0]:
        return None
    figure, axes = _figure("Loss", "loss")
    _draw(axes, series, "loss", _BLUE)
    _legend(axes)
    return figure


def _components(rows: Sequence[dict[str, Any]]) -> Figure | None:
    steps, columns = component_shares(rows)
    if not steps:
        return None
    figure, axes = _figure("Share of each component of the objective", "share of summed magnitudes")
    # Means of shares that sum to 1 sum to 1, so the smoothed areas still fill the plot.
    smooth = [running_mean(column) for column in columns]
    if len(steps) == 1:  # an area needs a width
        steps = [steps[0], steps[0] + 1]
        smooth = [column * 2 for column in smooth]
    axes.stackplot(steps, smooth, labels=components_of(rows), colors=_COLOURS, alpha=0.85)
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(  # in the order of the areas, from the top
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
        fontsize=9,
    )  # fmt: skip
    return figure


def _draw(axes: Axes, series: Series, label: str, colour: str) -> None:
    steps, values = series
    if not steps:
        return
    smooth = running_mean(values)
    if smooth != values:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=label, marker=marker)


def _figure(title: str, ylabel: str, *, panels: int = 1) -> tuple[Any, ...]:
    """Return a figure and its axes, from top to bottom; the last one has the steps."""
    width, height = _SIZE_INCHES
    figure = Figure(figsize=(width, height * (1 + 0.6 * (panels - 1))), dpi=_DPI)
    figure.set_layout_engine("constrained")
    ratios = [3, 2][:panels]
    axes = figure.subplots(
        panels, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    for panel in axes:
        panel.grid(True, color="#DDDDDD", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9, colors=_GREY)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_title(title, fontsize=10, loc="left")
    axes[0].set_ylabel(ylabel)
    axes[-1].set_xlabel("step")
    return figure, *axes


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="best")
