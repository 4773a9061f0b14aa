"""The charts of a report, and the metrics that each of them shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from grao_fast.reporting.page.runs import Run
from grao_fast.reporting.page.svg import Curve, area_svg, line_svg, short_number
from grao_fast.reporting.series import Series, component_shares, components_of, running_mean

L_SAMPLES = "reference/logprob - reference/logprob_gap"  # L(o), which no metric gives by itself


@dataclass(frozen=True)
class Panel:
    """A chart of one or more metrics.

    lines: label of each metric, by its name.
    note: what it shows, in a sentence.
    percent: whether values are shares.
    """

    title: str
    lines: dict[str, str]
    note: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawn panel. `legend` holds a class for the colour, a dash pattern, a label, a value."""

    title: str
    note: str
    svg: Markup
    legend: list[tuple[str, str, str, str]] = field(default_factory=list)


_SECTIONS: dict[str, list[Panel]] = {
    "Learning": [
        Panel(
            "Reward",
            {"reward": "samples", "reference/reward": "references", "eval/reward": "held out"},
            "Mean reward. Held-out answers are greedy; samples are drawn at the temperature.",
        ),
        Panel(
            "Held-out results",
            {"eval/ras": "RAS", "eval/nag": "NAG"},
            "RAS: share of answers that beat the reference. NAG: wins minus losses against the "
            "model before training.",
            percent=True,
        ),
        Panel("Held-out metric", {"eval/metric": "metric"}, "Not seen by training."),
        Panel(
            "Loss",
            {"loss": "loss"},
            "Minus the objective, plus the KL penalty or a router's loss, if any.",
        ),
    ],
    "Samples": [
        Panel(
            "Length",
            {"completions/mean_length": "samples", "reference/mean_length": "references"},
            "Mean number of tokens.",
        ),
        Panel(
            "Truncated samples",
            {"completions/clipped_ratio": "truncated"},
            "Share of samples that max_new_tokens cut.",
            percent=True,
        ),
        Panel(
            "Spread of the reward",
            {"reward_std": "standard deviation"},
            "Within a group, mean over groups. At 0 there is nothing to learn from.",
        ),
        Panel(
            "Groups without a signal",
            {"frac_dead": "all G+1 equal", "frac_reward_zero_std": "samples equal"},
            "Share of groups with equal rewards.",
            percent=True,
        ),
        Panel("Entropy", {"entropy": "entropy"}, "Of the policy at sampled tokens, in nats."),
        Panel(
            "Diversity",
            {"completions/diversity": "diversity"},
            "Share of the pairs of a group's samples that differ.",
            percent=True,
        ),
    ],
    "The reference's health": [
        Panel(
            "Advantage of the reference, A_y",
            {"reference/advantage": "mean A_y"},
            "Above 0 references are imitated. Below 0 samples beat them.",
        ),
        Panel(
            "References with A_y below 0",
            {"reference/frac_negative": "share"},
            "Share of prompts whose samples beat the reference on average.",
            percent=True,
        ),
        Panel(
            "Log-probability, L(y) and L(o)",
            {"reference/logprob": "references, L(y)", L_SAMPLES: "samples, L(o)"},
            "Mean log-probability of a token, in nats. A steep fall of L(y) is a collapse.",
        ),
        Panel(
            "Imitation",
            {"reference/imitation_share": "share of the gradient"},
            "Share of the weights of all sequences that raises references.",
            percent=True,
        ),
    ],
    "Optimisation": [
        Panel("Gradient norm", {"grad_norm": "norm"}, "Before it is clipped."),
        Panel("Learning rate", {"learning_rate": "learning rate"}),
        Panel("KL", {"kl": "KL"}, "To the policy that training began with."),
        Panel(
            "Sampler against policy",
            {"sampling/logp_diff": "mean difference"},
            "Mean difference of the two log-probabilities of a sampled token, in nats.",
        ),
        Panel(
            "Seconds of a step",
            {"time/sample": "sampling", "time/reward": "rewards", "time/update": "update"},
        ),
    ],
}  # fmt: skip
_REWARDS = "Rewards"
OTHERS = "Other metrics"
_SHOWN_OTHERWISE = {"reference/logprob_gap", "epoch"}


def sections_of(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Return the charts of runs by section; panels without any value are left out."""
    metrics = set().union(*(run.metrics for run in runs))
    panels = {**_SECTIONS, _REWARDS: _rewards(metrics)}
    known = {name for section in panels.values() for panel in section for name in panel.lines}
    terms = {name for name in metrics if name.startswith("objective/")}
    others = sorted(metrics - known - _SHOWN_OTHERWISE - (terms if len(terms) > 1 else set()))
    panels[OTHERS] = [Panel(name, {name: name}) for name in others]
    drawn = {
        title: [chart for panel in section if (chart := _chart(panel, runs)) is not None]
        for title, section in panels.items()
    }
    drawn["Learning"] += [chart for run in runs if (chart := _components(run, runs)) is not None]
    return {title: charts for title, charts in drawn.items() if charts}


def _rewards(metrics: set[str]) -> list[Panel]:
    """Return a panel for the mean of each reward function, where there are several."""
    names = sorted(n for n in metrics if n.startswith("rewards/") and n.endswith("/mean"))
    if len(names) < 2:  # it is the reward
        return []
    return [Panel(name.split("/", 1)[1].removesuffix("/mean"), {name: "mean"}) for name in names]


def _series(run: Run, metric: str) -> Series:
    if metric != L_SAMPLES:
        return run.series(metric)
    gaps = dict(zip(*run.series("reference/logprob_gap"), strict=True))
    steps, logprobs = run.series("reference/logprob")
    values = [y - gaps.get(s, math.nan) for s, y in zip(steps, logprobs, strict=True)]
    return ([], []) if all(map(math.isnan, values)) else (steps, values)


def _chart(panel: Panel, runs: Sequence[Run]) -> Chart | None:
    """Draw a panel: colours tell runs apart, dashes metrics; of one run, both tell metrics."""
    curves = []
    for number, run in enumerate(runs):
        for place, (metric, label) in enumerate(panel.lines.items()):
            series = _series(run, metric)
            if series[0]:
                colour = place if len(runs) == 1 else number
                name = label if len(runs) == 1 else run.name
                if len(runs) > 1 and len(panel.lines) > 1:
                    name = f"{run.name}: {label}"
                dots = metric.startswith("eval/")
                curves.append(Curve(name, series, colour=colour, dash=place, dots=dots))
    if not curves:
        return None
    form = _percent if panel.percent else short_number
    svg = line_svg(panel.title, curves, last_step=_last_step(runs), form=form)
    legend = [(f"c{c.colour}", f"d{c.dash}", c.label, form(_latest(c.series))) for c in curves]
    return Chart(panel.title, panel.note, svg, legend)


def _components(run: Run, runs: Sequence[Run]) -> Chart | None:
    steps, columns = component_shares(run.rows)
    if not steps:
        return None
    names = components_of(run.rows)
    title = "Shares of the components" + ("" if len(runs) == 1 else f": {run.name}")
    smooth = [running_mean(column) for column in columns]
    legend = [
        (f"c{place}", "area", name, _percent(column[-1]))
        for place, (name, column) in enumerate(zip(names, smooth, strict=True))
    ]
    svg = area_svg(title, names, steps, smooth, last_step=_last_step(runs))
    return Chart(title, "Of the magnitudes of the objective's terms.", svg, legend)


def _last_step(runs: Sequence[Run]) -> int:
    return max(run.steps for run in runs)


def _latest(series: Series) -> float:
    return next((value for value in reversed(series[1]) if not math.isnan(value)), math.nan)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
