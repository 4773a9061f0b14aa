"""Builds the tables that are shown on a terminal: samples of a step, results of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from grao_fast.system.visible import squeezed

_PROMPTS = 3  # prompts in a table of samples
_CHARACTERS = 240  # characters of a text in it


def completions_table(step: int, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of a step's first prompts, with reference, best and worst completion of each.

    rows: as in `Tracker.log_completions`. Without rewards, the first completion is shown.
    """
    table = Table(title=f"samples of step {step}", title_justify="left", expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("advantage", justify="right", no_wrap=True)
    table.add_column("text", ratio=1, overflow="fold")
    for row in rows[:_PROMPTS]:
        table.add_row("prompt", "", "", Text(tail(as_text(row["prompt"])), style="dim"))
        if row["reference"] is not None:
            table.add_row(
                "reference",
                number(row["reference_reward"]),
                number(row["reference_advantage"]),
                Text(head(row["reference"])),
            )
        for name, index in _best_and_worst(row["rewards"]).items():
            table.add_row(
                name,
                number(row["rewards"][index]),
                number(row["advantages"][index]),
                Text(head(row["completions"][index])),
            )
        table.add_section()
    return table


def _best_and_worst(rewards: Sequence[float | None]) -> dict[str, int]:
    present = {
        index: reward
        for index, reward in enumerate(rewards)
        if reward is not None and not math.isnan(reward)
    }
    if not present:
        return {"sample": 0} if rewards else {}
    best, worst = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
    if present[best] == present[worst]:
        return {"sample": best}
    return {"best": best, "worst": worst}


def number(value: float | None, form: str = ".3f") -> str:
    """Format a number for a cell; "-" for None and NaN."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def as_text(prompt: str | Sequence[Any]) -> str:
    """Return a prompt as text, with messages as lines of "role: content"."""
    return prompt if isinstance(prompt, str) else "\n".join(map(_message, prompt))


def _message(message: Any) -> str:
    """Return a message as "role: content", with the text of a list of parts; else as it is."""
    if not isinstance(message, Mapping):
        return str(message)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
        content = "".join(str(part) for part in parts if part is not None)
    calls = message.get("tool_calls")
    shown = [str(part) for part in (content, calls) if part is not None]
    return f"{message.get('role', '')}: {' '.join(shown)}"


def head(text: str, characters: int = _CHARACTERS) -> str:
    """Return the beginning of a text on one line, with "..." if it is cut."""
    line = squeezed(text)
    return line if len(line) <= characters else line[: characters - 3].rstrip() + "..."


def tail(text: str, characters: int = _CHARACTERS) -> str:
    """Return the end of a text on one line, which in a prompt is usually the question."""
    line = squeezed(text)
    return line if len(line) <= characters else "..." + line[len(line) - characters + 3 :].lstrip()


_RESULTS = {
    "reward": "mean reward",
    "ras": "RAS, beats the reference",
    "ras_win_or_tie": "RAS, ties counted as wins",
    "nag": "NAG, wins minus losses against the base model",
    "nag_wins": "NAG, wins alone",
    "metric": "held-out metric, greedy",
}
PASS_AT = "pass_at_"  # and the number of samples
_VARIANTS = {"ras_win_or_tie", "nag_wins"}
_RATES = {"ras", "nag", *_VARIANTS}


def results_table(
    prompts: int, means: Mapping[str, float], intervals: Mapping[str, tuple[float, float]]
) -> Table:
    """Return a table of the results of an evaluation, with rates in percent."""
    answers = "greedy and sampled" if any(name.startswith(PASS_AT) for name in means) else "greedy"
    table = Table(title=f"{prompts} prompts, {answers}", title_justify="left")
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("95% interval", justify="right")
    for name, mean in means.items():
        low, high = (metric_text(name, bound) for bound in intervals[name])
        table.add_row(_described(name), metric_text(name, mean), f"{low} to {high}")
    return table


def evaluation_line(means: Mapping[str, float]) -> str:
    """Return the results of an evaluation in one line, by their short names."""
    shown = (
        f"{_described(name).partition(',')[0]} {metric_text(name, mean)}"
        for name, mean in means.items()
        if name not in _VARIANTS
    )
    return ", ".join(shown)


def _described(name: str) -> str:
    if name.startswith(PASS_AT):
        return f"pass@{name.removeprefix(PASS_AT)}, held-out metric of samples"
    return _RESULTS.get(name, name)


def metric_text(name: str, value: float) -> str:
    """Format a mean of an evaluation, rates in percent."""
    return number(value, ".1%" if name in _RATES else ".3f")
