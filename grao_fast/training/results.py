"""What a run leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from grao_fast.config import GRAOConfig
from grao_fast.evaluation.evaluate import EvaluationResult
from grao_fast.system.files import write_file
from grao_fast.system.visible import get_logger
from grao_fast.training.state import versions
from grao_fast.training.step import Rollout

logger = get_logger(__name__)

_BASELINE = "baseline.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    steps: steps done, those before a resume included.
    metrics: of the last step, by the names in metrics.jsonl.
    before, after: evaluations at step 0 and at the end; None without an eval_dataset.
    output_dir: holds metrics.jsonl, completions.jsonl, summary.json, checkpoints and `final/`.
    model: the aligned model, as in `final/`.
    """

    steps: int
    metrics: dict[str, float]
    before: EvaluationResult | None
    after: EvaluationResult | None
    output_dir: Path
    model: nn.Module


def samples(rollout: Rollout) -> list[dict[str, Any]]:
    """A row for every prompt of a step, for the tables of samples."""
    return [
        {
            "prompt": prompt.example.prompt,
            "reference": prompt.reference_text,
            "completions": rollout.texts[n],
            "rewards": rollout.rewards_NK[n, :-1].tolist(),
            "advantages": rollout.advantages_NK[n, :-1].tolist(),
            "reference_reward": float(rollout.rewards_NK[n, -1]),
            "reference_advantage": float(rollout.advantages_NK[n, -1]),
        }
        for n, prompt in enumerate(rollout.prompts)
    ]


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


def write_baseline(output_dir: Path, texts: Sequence[str], *, data: str) -> None:
    """Keep the greedy answers from before training, which a run that resumes cannot make again.

    Args:
        data: digest of the prompts that they answer.
    """
    write_file(output_dir / _BASELINE, json.dumps({"data": data, "texts": list(texts)}))


def read_baseline(output_dir: Path, *, data: str, prompts: int) -> list[str] | None:
    """The answers that `write_baseline` kept; None, said in a line, where there are none of these.

    Args:
        data: digest of the prompts to be answered.
        prompts: how many there are.
    """
    path = output_dir / _BASELINE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        digest, texts = kept["data"], kept["texts"]
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise TypeError("its texts are none")
    except FileNotFoundError:
        reason = f"{_BASELINE} is not in {output_dir}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        reason = f"{path} is damaged"
    else:
        if digest == data and len(texts) == prompts:
            return texts
        reason = "eval_dataset is not the one this run began with"
    logger.warning(
        "%s, and the answers from before training cannot be made again: no NAG in this run", reason
    )
    return None
