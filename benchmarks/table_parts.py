"""The parts that tables have in common: numbers, shapes, and what was measured where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]


def by_value(rows: Iterable[Row], key: str) -> list[tuple[Any, list[Row]]]:
    """Group rows by a value, in the order in which values first appear."""
    groups: dict[str, tuple[Any, list[Row]]] = {}
    for row in rows:
        groups.setdefault(str(row[key]), (row[key], []))[1].append(row)
    return list(groups.values())


def shape_text(shape_TDV: list[int], rows: list[Row]) -> str:
    return "T={} D={} V={}, {}".format(*shape_TDV, rows[0]["dtype"])


def unit_of(rows: list[Row]) -> tuple[str, int]:
    return ("ms", 1000) if max(row["median"] for row in rows) < 1 else ("seconds", 1)


def number(value: float) -> str:
    """Format with three digits, or more before the point."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def mib(row: Row) -> str:
    return "-" if row["peak_extra_mib"] is None else str(round(row["peak_extra_mib"]))


def ratio(median: dict[float, float], share: float, whole: float) -> str:
    if share not in median or whole not in median:
        return "-"
    return f"{median[share] / median[whole]:.2f}"


def facts_text(result: Result) -> str:
    """The machine, how busy it was, versions, date and command."""
    machine = {name: value for name, value in result["machine"].items() if value != "not installed"}
    known = ("device", "threads", "load")
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in known)
    return f"{_hardware(result)}; {versions}; {result['date']}; `{result['command']}`."


def source_text(name: str, result: Result) -> str:
    """The same, with the file of its versions in their place."""
    return (
        f"{_hardware(result)}; {result['date']}; `{result['command']}`; versions in "
        f"`benchmarks/results/{name}.json`."
    )


def _hardware(result: Result) -> str:
    machine = result["machine"]
    load = "" if machine["load"] is None else f", load average {machine['load']:.1f} at the start"
    return f"{machine['device']}, {machine['threads']} CPU threads{load}"


def absent_text(result: Result) -> str:
    """Return who did not run, grouped by reason."""
    labels: dict[str, list[str]] = {}
    for label, reason in result["absent"].items():
        labels.setdefault(reason, []).append(label)
    reasons = [f"{', '.join(who)} ({reason})" for reason, who in labels.items()]
    return f" Not run: {'; '.join(reasons)}." if reasons else ""
