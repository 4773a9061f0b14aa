"""The result of a run, and its summary.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from grao_fast.config import GRAOConfig
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.system.files import write_file
from grao_fast.training.rollout import Rollout
from grao_fast.training.state import versions


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    steps: steps done, those before a resume included.
    metrics: of the last step, by the names in metrics.jsonl.
    before, after: evaluations at step 0 and at the end; None without an eval_dataset.
    output_dir: holds metrics.jsonl, completions.jsonl, summary.json, checkpoints and `final/`.
    model: the aligned model, as in `final/`; with several processes, sharded over them.
    """

    steps: int
    metrics: dict[str, float]
    before: EvaluationResult | None
    after: EvaluationResult | None
    output_dir: Path
    model: nn.Module


def samples(rollout: Rollout) -> list[dict[str, Any]]:
    """A row for every prompt of a step, for tables of completions."""
    return [
        {
            "prompt": prompt.example.prompt,
            "reference": prompt.reference_text,
            "completions": rollout.texts[n],
            "rewards": rollout.rewards_NK[n, : len(rollout.texts[n])].tolist(),
            "advantages": rollout.advantages_NK[n, : len(rollout.texts[n])].tolist(),
            "reference_reward": float(rollout.rewards_NK[n, -1]),
            "reference_advantage": float(rollout.advantages_NK[n, -1]),
            "scores": _scores(rollout, n),
        }
        for n, prompt in enumerate(rollout.prompts)
    ]


def _scores(rollout: Rollout, n: int) -> dict[str, list[float]]:
    """The scores of a prompt's samples by each reward function."""
    if rollout.scores_FNG is None:
        return {}
    scores_FG = rollout.scores_FNG[:, n, : len(rollout.texts[n])]
    return dict(zip(rollout.per_function, scores_FG.tolist(), strict=True))


def write_summary(result: TrainResult, config: GRAOConfig, *, seconds: float) -> None:
    summary = {
        "steps": result.steps,
        "seconds": seconds,
        "before": None if result.before is None else result.before.to_dict(),
        "after": None if result.after is None else result.after.to_dict(),
        "metrics": {k: v if math.isfinite(v) else None for k, v in result.metrics.items()},
        "config": config.to_dict(),
        "versions": versions(),
    }
    write_file(result.output_dir / "summary.json", json.dumps(summary, indent=1))
