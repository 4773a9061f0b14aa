"""Writes the folders of made-up runs, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>document.title='owned'</script>",
    '"><img src="http://192.0.2.1/x.png" onerror="document.title=1">',
    "</p></section></style><h1>not mine</h1>",
    "\x1b[31mred\x1b[0m \x00 \u202egnp.exe \ud800 &lt;b&gt; {{ 7 * 7 }}",
    "[red]markup[/red] [link=file:///etc]link[/link]",
    "x" * 3000,
)


def metrics(step: int, **more: float | None) -> dict[str, Any]:
    """Return a line of metrics.jsonl as training writes it."""
    return {
        "step": step,
        "reward": step / 10 - 1,
        "reward_std": 0.5,
        "frac_dead": 0.0,
        "reference/reward": 0.25,
        "reference/advantage": 1 - step / 10,
        "reference/frac_negative": min(1.0, step / 40),
        "reference/logprob": -1.0 - step / 100,
        "reference/logprob_gap": 0.5,
        "completions/mean_length": 20.0 + step,
        "loss": 1.0 / step,
        "objective/exploration": -1.0,
        "objective/imitation": 2.0,
        "objective/alignment": 1.0,
        **more,
    }


def answers(texts: Iterable[str], *, baseline: bool) -> list[dict[str, Any]]:
    """Return rows of an evaluation, whose prompts, references and answers are these texts."""
    return [
        {
            "prompt": [{"role": "user", "content": text}],
            "reference": text,
            "completion": text + (" after" if baseline else " before"),
            "baseline": text + " before" if baseline else None,
            "vs_baseline": number - 3.0 if baseline else None,
            "metric": None,
            "reward": 0.5,
            "reference_reward": 0.25,
        }
        for number, text in enumerate(texts)
    ]


def write_run(
    folder: Path,
    *,
    steps: int = 30,
    texts: Iterable[str] = ("first", "second"),
    finished: bool = True,
    **config: Any,
) -> Path:
    """Write a run's folder as training does; returns it."""
    texts = list(texts)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval/reward": 0.0, "eval/ras": 0.25}]
    rows += [metrics(step) for step in range(1, steps + 1)]
    if finished:
        rows.append({"step": steps, "eval/reward": 0.5, "eval/ras": 0.75, "eval/nag": 0.5})
        summary = {
            "steps": steps,
            "seconds": 75.0,
            "after": {"intervals": {"ras": [0.5, 1.0]}},
            "versions": {"torch": "2.0"},
        }
        _write(folder / "summary.json", [summary])
        _write(folder / f"eval-{steps}.jsonl", answers(texts, baseline=True))
    _write(folder / "metrics.jsonl", rows)
    _write(folder / "eval-0.jsonl", answers(texts, baseline=False))
    _write(folder / "config.json", [{"lam": 0.6, "max_steps": steps, **config}])
    facts = {"total_steps": steps, "changed": list(config), "versions": {"torch": "2.0"}}
    _write(folder / "run.json", [facts])
    groups = [
        {
            "step": step,
            "prompt": text,
            "reference": text,
            "reference_reward": None,
            "completions": [f"{text} low", f"{text} high"],
            "rewards": [-1.0, 1.0],
        }
        for step in (10, 20)
        for text in texts
    ]
    _write(folder / "completions.jsonl", groups)
    return folder


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
