"""Tables and picture of the trainers: their steps beside each other, and two curves of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_parts import Result, absent_text, facts_text, number

PANELS = {
    "reward": "reward of the samples",
    "loss": "loss",
    "reference/logprob": "log p(reference)",
}
LAST = 8  # steps, of which means are shown
# Okabe and Ito's palette. The second lies on the first, so it is thin and dashed.
_STYLES = {
    "ours": {"color": "#56B4E9", "linewidth": 3.2, "label": "grao_fast.train"},
    "replayed": {
        "color": "#000000",
        "linewidth": 1.1,
        "linestyle": "--",
        "label": "GRAOTrainer, the same samples",
    },
    "shared": {
        "color": "#009E73",
        "linewidth": 1.1,
        "label": "GRAOTrainer, the same sampler and seeds",
    },
    "own": {"color": "#D55E00", "linewidth": 1.1, "label": "GRAOTrainer, TRL's generate"},
}


def trainers_table(name: str, result: Result) -> str:
    """Return a row a trainer: seconds of a step and of its phases, tokens, and peak memory."""
    heads = ["trainer", "seconds a step (quartiles)", "over `grao_fast.train` (quartiles)"]
    heads += ["sampling", "scoring", "update", "tokens it sampled", "sampled tokens learned from"]
    heads += ["peak memory, MiB"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in result["rows"]:
        cells = [
            row["label"],
            _spread(row),
            _spread(row["over"].get("ours")),
            number(row["sample"]),
            f"{row['score']:.3f}",
            number(row["update"]),
            *(_whole(row[name]) for name in ("own_tokens", "learned_tokens", "peak_mib")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    s = result["settings"]
    note = (
        f"{s['prompts']} prompts with {s['samples']} samples of at most {s['new_tokens']} tokens, "
        f"float32, a micro-batch a group. Medians of {result['rows'][0]['rounds']} rounds, in "
        "which all took turns, each in a process of its own. Ratios are of steps of one round; "
        f"medians of phases need not add up to that of steps.{_beside_grpo(result)} Memory is the "
        "most that a process held, with weights, gradients and AdamW's moments, beyond what it had "
        "after importing."
    )
    if result["minutes"] is not None:
        note += f" The whole took {number(result['minutes'])} minutes."
    return "\n".join([*lines, "", f"{note} {facts_text(result)}{absent_text(result)}"])


def _spread(figures: dict[str, float] | None) -> str:
    if figures is None:
        return "-"
    return f"{number(figures['median'])} ({number(figures['q1'])} to {number(figures['q3'])})"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _beside_grpo(result: Result) -> str:
    over = next((row["over"] for row in result["rows"] if row["variant"] == "grao_trainer"), {})
    if "grpo" not in over:
        return ""
    return f" A step of GRAOTrainer over one of GRPOTrainer is {_spread(over['grpo'])}."


def curves_table(name: str, result: Result) -> str:
    """Return the picture, and a row a metric: how far the runs are apart."""
    runs = result["runs"]
    heads = ["metric", "greatest difference, the same samples", "the same sampler and seeds"]
    heads += [f"{style['label']}, last {LAST} steps" for style in _STYLES.values()]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for metric, title in PANELS.items():
        apart = [
            max(
                abs(ours[metric] - other[metric])
                for ours, other in zip(runs["ours"], runs[run], strict=True)
            )
            for run in ("replayed", "shared")
        ]
        means = [sum(step[metric] for step in runs[run][-LAST:]) / LAST for run in _STYLES]
        cells = [title, *(f"{value:.1e}" for value in apart), *(f"{mean:.3f}" for mean in means)]
        lines.append(f"| {' | '.join(cells)} |")
    same = [step["same"] for step in runs["shared"]]
    whole = result["settings"]["prompts"] * result["settings"]["samples"]
    equal = next((n for n, count in enumerate(same) if count < whole), len(same))
    note = (
        f"With the same sampler and seeds, the first {equal} steps have the same samples, and "
        f"{sum(same)} of {whole * len(same)} are the same in all. {facts_text(result)}"
    )
    return "\n".join(
        [f"![The runs over each other](docs/results/{name}.png)", "", *lines, "", note]
    )


def draw_curves(name: str, result: dict[str, Any], folder: Path) -> list[Path]:
    """Plot reward, loss and the references' log-prob of the runs over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.6), dpi=150)
    figure.set_layout_engine("constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for run, style in _STYLES.items():
            values = [step[metric] for step in result["runs"][run]]
            axes.plot(range(1, len(values) + 1), values, **style)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(True, color="#DDDDDD", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_lines()
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path = folder / f"{name}.png"
    FigureCanvasAgg(figure).print_png(path)
    return [path]
