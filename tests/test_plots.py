"""Tests of plots: of long and short runs, and of runs that lack metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from grao_fast.reporting import plots
from grao_fast.reporting.plots import plot_run
from grao_fast.reporting.series import running_mean

COMPONENTS = ("exploration", "imitation", "alignment")


def step(number: int, **metrics: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": number,
        "loss": 1.0 / number,
        "reward": number / 10,
        "reference/reward": 0.5,
        "objective/exploration": -1.0,
        "objective/imitation": 2.0,
        "objective/alignment": 1.0,
    }
    return row | metrics


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(figure: Figure | None, panel: int = 0) -> dict[str, Any]:
    assert figure is not None
    drawn = figure.axes[panel].get_lines()
    return {line.get_label(): line for line in drawn if not line.get_label().startswith("_")}


def test_files_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": 0, "eval/reward": 0.0, "eval/ras": 0.25}]
    rows += [step(number) for number in range(1, 31)]
    rows.append({"step": 30, "eval/reward": 1.0, "eval/ras": 0.5, "eval/nag": 0.25})
    written = plot_run(write(tmp_path, rows))
    assert written == [tmp_path / n for n in ("reward.png", "loss.png", "components.png")]
    for path in written:
        image = imread(path)
        assert min(image.shape[:2]) >= 500  # 150 dots an inch
        assert image[..., :3].std() > 0.05  # something is drawn


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([step(1)], ["reward", "loss", "components"]),
        ([{"step": 0, "eval/reward": 0.5}], ["reward"]),
        ([{"step": 0, "eval/nag": -0.5}], ["reward"]),
        ([{"step": 1, "loss": 0.0}], ["loss"]),
        ([step(1, **{"reward": None, "reference/reward": None, "loss": None})], ["components"]),
        ([step(1, **{f"objective/{c}": 0.0 for c in COMPONENTS})], ["reward", "loss"]),
    ],
)
def test_plots_without_metrics_are_left_out(tmp_path, rows, names) -> None:
    assert [path.stem for path in plot_run(write(tmp_path, rows))] == names


def test_reward_plot() -> None:
    rows = [{"step": 0, "eval/reward": -1.0, "eval/ras": 0.25, "eval/nag": None}]
    rows += [step(1), step(2, reward=None), step(3)]
    rows.append({"step": 3, "eval/reward": 1.0, "eval/ras": 0.5, "eval/nag": -0.25})
    figure = plots._reward(rows)
    drawn = lines(figure)
    assert list(drawn) == ["samples", "references", "evaluation, greedy"]
    samples = drawn["samples"]
    assert samples.get_xdata().tolist() == [1, 2, 3]
    np.testing.assert_equal(samples.get_ydata(), [0.1, math.nan, 0.3])  # null is a gap
    assert drawn["evaluation, greedy"].get_xydata().tolist() == [[0, -1], [3, 1]]
    below = list(lines(figure, panel=1).values())
    np.testing.assert_equal(below[0].get_xydata(), [[0, 0.25], [3, 0.5]])
    np.testing.assert_equal(below[1].get_xydata(), [[0, math.nan], [3, -0.25]])
    assert figure.axes[1].get_xlabel() == "step"


def test_component_shares_are_of_magnitudes_and_fill_the_plot() -> None:
    figure = plots._components([step(1), step(2, **{"objective/exploration": 5.0}), step(3)])
    assert figure is not None
    areas = figure.axes[0].collections
    assert [area.get_label() for area in areas] == ["exploration", "imitation", "alignment"]
    tops = []
    for area in areas:
        points = area.get_paths()[0].vertices
        tops.append([points[points[:, 0] == x, 1].max() for x in (1, 2, 3)])
    # |-1|, |2|, |1| are 1/4, 1/2, 1/4; then 5/8, 2/8, 1/8
    np.testing.assert_allclose(tops, [[1 / 4, 5 / 8, 1 / 4], [3 / 4, 7 / 8, 3 / 4], [1, 1, 1]])


def test_steps_without_components_are_left_out() -> None:
    dead = {f"objective/{name}": 0.0 for name in COMPONENTS}
    figure = plots._components([step(1), step(2, **dead), step(3)])
    assert figure is not None
    points = figure.axes[0].collections[0].get_paths()[0].vertices
    assert set(points[:, 0]) == {1, 3}


def test_running_mean() -> None:
    short = [1.0, 5.0, 2.0]
    assert running_mean(short) == short
    values = [float(number) for number in range(30)]
    values[10] = math.nan
    smooth = running_mean(values)
    assert smooth[0] == 1.0  # of 0, 1, 2
    assert smooth[20] == 20.0
    assert smooth[10] == 10.0  # of 8, 9, 11, 12
    assert math.isnan(running_mean([math.nan] * 9)[4])


def test_folders_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl: give the output_dir of a run"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="holds nothing to plot"):
        plot_run(write(tmp_path, [{"step": 1, "epoch": 0.5}]))
