"""Writes the report of one or several runs as a single HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from grao_fast.reporting.page.charts import OTHERS, sections_of
from grao_fast.reporting.page.runs import EVALUATIONS, Run, read_runs
from grao_fast.reporting.page.samples import samples_of
from grao_fast.reporting.page.svg import short_number
from grao_fast.reporting.tables import metric_text
from grao_fast.system.errors import UserError
from grao_fast.system.files import write_file
from grao_fast.system.visible import visible, visible_errors, visible_lines

REPORT_FILE = "report.html"
OVERLAID_FILE = "grao-report.html"  # in the working directory
_SAMPLES = 6


@visible_errors()
def report(
    *output_dirs: str | Path, path: str | Path | None = None, samples: int = _SAMPLES
) -> Path:
    """Write a report of one or several runs as a single HTML file that needs no network.

    Args:
        output_dirs: folders of up to 7 runs, finished or not, whose curves are laid over each
            other.
        path: of the file; None: report.html in the folder of a single run, else grao-report.html
            in the working directory.
        samples: the most prompts of each run whose answers are shown.

    Returns:
        The path of the file. An existing file is replaced.

    Raises:
        ValueError: a folder holds no run, one is given twice, or there are too many.
        OSError: the file cannot be written.
    """
    if samples < 0:
        raise UserError(f"samples must be at least 0, got {samples}")
    runs = read_runs(output_dirs)
    if path is None:
        path = runs[0].folder / REPORT_FILE if len(runs) == 1 else Path(OVERLAID_FILE)
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it, or choose another path")
    write_file(path, page_of(runs, samples=samples))
    return path


def page_of(runs: Sequence[Run], *, samples: int) -> str:
    """Return the HTML of a report."""
    names = [run.name for run in runs]
    return _template().render(
        title="GRAO: " + ", ".join(names),
        names=names,
        summary=_summary(runs),
        sections=sections_of(runs),
        others=OTHERS,
        samples=samples_of(runs, samples),
        options=_options(runs),
        versions=_table([run.versions for run in runs]),
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _summary(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the first table: a name, and a cell for each run."""
    rows = [("progress", [run.status for run in runs])]
    rows.append(("mean reward, first and last tenth", [_reward(run) for run in runs]))
    for metric, name in EVALUATIONS.items():
        rows.append((f"held out: {name}", [_evaluated(run, metric) for run in runs]))
    seconds = [run.summary.get("seconds") for run in runs]
    rows.append(("duration, from the latest start", [_duration(value) for value in seconds]))
    return [(name, cells) for name, cells in rows if any(cells)]


def _reward(run: Run) -> str:
    text = _from_to(*run.change("reward"))
    if text and run.config.get("sampler") == "dataset":
        text += " (of stored completions, whatever the policy has learned)"
    return text


def _from_to(before: float, after: float) -> str:
    return "" if math.isnan(after) else f"{short_number(before)} → {short_number(after)}"


def _evaluated(run: Run, metric: str) -> str:
    before, after, interval = run.evaluated(metric)
    if math.isnan(after):
        return ""
    text = f"{metric_text(metric, before)} → {metric_text(metric, after)}"
    if metric == "nag":  # it compares with before
        text = metric_text(metric, after)
    if interval is not None:
        text += " (95%: " + " to ".join(metric_text(metric, bound) for bound in interval) + ")"
    return text


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e9:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _options(runs: Sequence[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return tables of options: those worth a look, and all."""
    table = _table([run.config for run in runs])
    changed = {name for run in runs for name in run.facts.get("changed") or ()}
    notable = [row for row in table if row[0] in changed or len(set(row[1])) > 1]
    return {"notable": notable, "all": table}


def _table(columns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return a row for every name in any column, with a cell for each column."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(visible(name), [_cell(column, name) for column in columns]) for name in names]


def _cell(column: Mapping[str, Any], name: str) -> str:
    if name not in column:
        return "-"
    value = column[name]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return visible_lines(text)
