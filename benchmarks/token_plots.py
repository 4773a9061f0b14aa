"""Plots time and memory of a loss over the tokens of a batch, from benchmarks/results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = (("time", "seconds over tokens"), ("memory", "extra memory over tokens"))
# Okabe and Ito's palette, which colour-blind readers can tell apart. Ours are drawn bold.
_COLOURS = ["#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#999999"]
_MARKERS = "osD^vP*X<>"


def draw(name: str, result: dict[str, Any], folder: Path) -> list[Path]:
    """Plot time and memory over tokens on log axes; a line ends where memory ran out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    written = []
    for kind, title in PANELS:
        figure = _figure(result, kind, f"Forward and backward of an LM head: {title}")
        path = folder / f"{name}-{kind}.png"
        FigureCanvasAgg(figure).print_png(path)
        written.append(path)
    return written


def _figure(result: dict[str, Any], kind: str, title: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(7.2, 4.4), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    key = {"time": "median", "memory": "peak_extra_mib"}[kind]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault(row["label"], []).append(row)
    for index, (label, own) in enumerate(lines.items()):
        points = sorted((row["shape_TDV"][0], row[key]) for row in own if row[key])
        ours = own[0]["variant"].startswith("grao")
        axes.plot(
            [tokens for tokens, _ in points],
            [value for _, value in points],
            label=label.replace("`", ""),
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=2.4 if ours else 1.2,
            zorder=3 if ours else 2,
        )
    if kind == "time":
        floor = sorted({row["shape_TDV"][0]: row["gemm_seconds"] for row in result["rows"]}.items())
        axes.plot(*zip(*floor, strict=True), "k:", linewidth=1.2, label="the three bare GEMMs")
    tokens = sorted({row["shape_TDV"][0] for row in result["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel({"time": "seconds", "memory": "MiB beyond the inputs"}[kind])
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, which="both", color="#DDDDDD", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
