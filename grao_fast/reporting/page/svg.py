"""Draws charts as SVG for a page, whose style sheet gives them colours for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from grao_fast.reporting.series import Series, running_mean, thinned

# Units are pixels of a chart at its usual width, so that its text is as large as the page's.
_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 24
_MOST_POINTS = 400  # of a curve, about one a pixel
_FEW_DOTS = 60  # evaluations beyond these are joined by a line alone


@dataclass(frozen=True)
class Curve:
    """A series to draw.

    colour, dash: numbers of styles.
    dots: whether its points are marked.
    """

    label: str
    series: Series
    colour: int
    dash: int
    dots: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where values lie on a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, step: float, value: float) -> str:
        return f"{self.across(step):.1f},{self.up(value):.1f}"

    def across(self, step: float) -> float:
        low, high = self.x
        return _LEFT + (step - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def line_svg(
    title: str, curves: Sequence[Curve], *, last_step: int, form: Callable[[float], str]
) -> Markup:
    """Draw curves over the steps: raw values faintly, with a running mean on top.

    last_step: where the axis ends.
    form: writes a value.
    """
    values = [v for curve in curves for v in curve.series[1] if not math.isnan(v)]
    frame = _Frame((0, max(1, last_step)), _widened(min(values), max(values)))
    parts = [_axes(frame, form=form)]
    for curve in curves:
        smooth = running_mean(curve.series[1])
        if not curve.dots and smooth != curve.series[1]:
            raw = _path(frame, thinned(curve.series, _MOST_POINTS))
            parts.append(Markup('<path class="raw c{}" d="{}"/>').format(curve.colour, raw))
        drawn = (curve.series[0], curve.series[1] if curve.dots else smooth)
        path = _path(frame, thinned(drawn, _MOST_POINTS))
        parts.append(
            Markup('<path class="line c{} d{}" d="{}"/>').format(curve.colour, curve.dash, path)
        )
        parts += _dots(frame, curve, form)
    return _svg(title, "; ".join(_in_words(curve, form) for curve in curves), parts)


def area_svg(
    title: str,
    labels: Sequence[str],
    steps: Sequence[int],
    columns: Sequence[Sequence[float]],
    *,
    last_step: int,
) -> Markup:
    """Draw shares that sum to 1 as areas, the first at the bottom."""
    frame = _Frame((0, max(1, last_step)), (0.0, 1.0))
    if len(steps) == 1:  # an area needs a width
        steps, columns = [steps[0] - 1, steps[0]], [list(column) * 2 for column in columns]
    kept = range(0, len(steps), max(1, len(steps) // _MOST_POINTS))
    parts, below = [], [0.0] * len(steps)
    for number, column in enumerate(columns):
        above = [low + share for low, share in zip(below, column, strict=True)]
        points = [frame.at(steps[i], above[i]) for i in kept]
        points += [frame.at(steps[i], below[i]) for i in reversed(kept)]
        parts.append(
            Markup('<polygon class="area c{}" points="{}"/>').format(number, " ".join(points))
        )
        below = above
    parts.append(_axes(frame, form=lambda share: f"{100 * share:.0f}%"))
    words = (
        f"{label} from {100 * column[0]:.0f}% to {100 * column[-1]:.0f}%"
        for label, column in zip(labels, columns, strict=True)
    )
    return _svg(title, "; ".join(words), parts)


def short_number(value: float) -> str:
    """Write a number in few characters: 0.3125, -12.5k, 3.2e-07."""
    if math.isnan(value):
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if 1e15 > abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.4g}"


def _svg(title: str, words: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, f"{title}. {words}", Markup("").join(parts)
    )


def _in_words(curve: Curve, form: Callable[[float], str]) -> str:
    present = [
        (step, value) for step, value in zip(*curve.series, strict=True) if not math.isnan(value)
    ]
    (first, start), (last, end) = present[0], present[-1]
    if len(present) == 1:
        return f"{curve.label} {form(start)} at step {first}"
    return f"{curve.label} from {form(start)} at step {first} to {form(end)} at step {last}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return the bounds of an axis: those of its values; of one value alone, it and 0."""
    if high > low:
        return low, high
    return (min(low, 0.0), max(low, 0.0)) if low else (0.0, 1.0)


def _axes(frame: _Frame, *, form: Callable[[float], str]) -> Markup:
    parts = []
    for value in _ticks(*frame.y, 5, whole=False):
        y = f"{frame.up(value):.1f}"
        parts.append(
            Markup(
                '<path class="grid" d="M{},{}H{}"/><text x="{}" y="{}" class="y">{}</text>'
            ).format(_LEFT, y, _WIDTH - _RIGHT, _LEFT - 6, y, form(value))
        )
    for step in _ticks(*frame.x, 5, whole=True):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" class="x">{}</text>').format(
                frame.across(step), _HEIGHT - 6, short_number(step)
            )
        )
    return Markup("").join(parts)


def _ticks(low: float, high: float, most: int, *, whole: bool) -> list[float]:
    found = MaxNLocator(nbins=most, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    reach = (high - low) * 1e-9
    return [float(tick) + 0.0 for tick in found if low - reach <= tick <= high + reach]


def _path(frame: _Frame, series: Series) -> str:
    """Return the `d` of a path with a gap where a value is NaN."""
    commands, pen = [], "M"
    for step, value in zip(*series, strict=True):
        if math.isnan(value):
            pen = "M"
            continue
        commands.append(pen + frame.at(step, value))
        pen = "L"
    return "".join(commands)


def _dots(frame: _Frame, curve: Curve, form: Callable[[float], str]) -> list[Markup]:
    """Return marks of points: of evaluations, and of a curve that is a single point."""
    steps, values = curve.series
    if len(steps) > (_FEW_DOTS if curve.dots else 1):
        return []
    dot = Markup('<circle class="c{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}</title></circle>')
    return [
        dot.format(
            curve.colour, frame.across(step), frame.up(value),
            escape(f"{curve.label}, step {step}: {form(value)}"),
        )
        for step, value in zip(steps, values, strict=True)
        if not math.isnan(value)
    ]  # fmt: skip
