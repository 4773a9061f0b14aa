"""Comparing completions with references and with a baseline's completions; see `result.py`.

Suffixes: N prompts, K sequences of a prompt, the reference last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from grao_fast.config import RewardType
from grao_fast.data.examples import Example
from grao_fast.data.fields import answer_text
from grao_fast.evaluation.bootstrap import bootstrap_intervals
from grao_fast.evaluation.pass_at_k import pass_at_k
from grao_fast.evaluation.result import METRICS, EvaluationResult
from grao_fast.reporting.tables import PASS_AT
from grao_fast.rewards import Reward, resolve_reward
from grao_fast.rewards.finding import RewardFunction
from grao_fast.rewards.measured import join_metrics
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

RewardSpec = str | RewardFunction | Reward | Sequence[str | RewardFunction]

logger = get_logger(__name__)


def evaluate_completions(
    reward: RewardSpec,
    examples: Sequence[Example],
    completions: Sequence[str],
    *,
    baseline: Sequence[str] | None = None,
    reward_type: RewardType,
    metric: RewardSpec | None = None,
    samples: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> EvaluationResult:
    """Compare completions with the references, and with a baseline's completions.

    Args:
        reward: a reward as `grao_fast.train` takes it.
        examples, completions: one completion of every example.
        baseline: of the base model, for NAG; one for every example.
        reward_type: "pointwise" or "pairwise".
        metric: a held-out measure, called as a pointwise reward is.
        samples: sampled completions of every example, which the metric scores for pass@k.
        seed: of the bootstrap.

    Raises:
        RewardError: the reward or the metric failed.
        UserError: the number of completions is not that of the examples; samples without a metric.
    """
    sets = {"completions": completions, "baseline": baseline, "samples": samples}
    for name, texts in sets.items():
        if texts is not None and len(texts) != len(examples):
            raise UserError(f"{name} must hold {len(examples)} texts, got {len(texts)}")
    if not examples:
        raise UserError("there is nothing to evaluate: no examples")
    examples = [replace(each, reference=answer_text(each.reference)) for each in examples]
    reward = resolve_reward(reward)
    scores = _score(reward, examples, completions, baseline, reward_type)
    measured = dict(reward.take_metrics())
    sampled: list[list[float]] = []
    if metric is not None:
        metric = resolve_reward(metric)
        scores["metric"] = _tensor(metric.score(examples, completions))
        sampled = _score_samples(metric, examples, samples or ())
        measured |= {f"metric/{name}": value for name, value in metric.take_metrics().items()}
    elif samples is not None:
        raise UserError("samples are scored by the metric: pass one, or leave samples out")
    per_prompt = {
        "reward": scores["reward"],
        "ras": _where_present(scores["vs_reference"], lambda r: r > 0),
        "ras_win_or_tie": _where_present(scores["vs_reference"], lambda r: r >= 0),
        "nag": _where_present(scores["vs_baseline"], torch.sign),
        "nag_wins": _where_present(scores["vs_baseline"], lambda r: r > 0),
        "metric": scores["metric"],
        **pass_at_k(sampled),
    }
    absent = int(scores["vs_reference"].isnan().sum())
    if absent:
        logger.warning(
            "%d of %d prompts have no reference or no reward, and are left out of RAS",
            absent, len(examples),
        )  # fmt: skip
    present = {name: values for name, values in per_prompt.items() if not values.isnan().all()}
    means = {name: float(values.nanmean()) for name, values in present.items()}
    return EvaluationResult(
        prompts=len(examples),
        intervals=bootstrap_intervals(present, seed=seed),
        rows=_with_samples(_rows(examples, completions, baseline, scores), samples, sampled),
        pass_at_k={
            int(name.removeprefix(PASS_AT)): mean
            for name, mean in means.items()
            if name.startswith(PASS_AT)
        },
        measured=join_metrics([measured]),
        **{name: means.get(name) for name in METRICS},
    )


def _score(
    reward: Reward,
    examples: Sequence[Example],
    completions: Sequence[str],
    baseline: Sequence[str] | None,
    reward_type: RewardType,
) -> dict[str, Tensor]:
    """Rewards and comparisons for every prompt, float64, NaN where absent."""
    absent_N = torch.full((len(examples),), math.nan, dtype=torch.float64)
    scores: dict[str, Tensor] = {"vs_baseline": absent_N, "metric": absent_N}
    groups = [[text] for text in completions]
    if reward_type == "pointwise" and baseline is not None:
        # One call scores all texts once, since a reward may be noisy or slow.
        groups = [list(pair) for pair in zip(completions, baseline, strict=True)]
    rewards_NK = reward.score_groups(examples, groups, reward_type=reward_type).rewards_NK
    scores["reward"], scores["reference_reward"] = rewards_NK[:, 0], rewards_NK[:, -1]
    scores["vs_reference"] = rewards_NK[:, 0] - rewards_NK[:, -1]
    if baseline is not None and reward_type == "pointwise":
        scores["vs_baseline"] = rewards_NK[:, 0] - rewards_NK[:, 1]
    elif baseline is not None:
        scores["vs_baseline"] = _tensor(
            reward.compare(examples, completions, baseline, reward_type=reward_type)
        )
    return scores


def _score_samples(
    metric: Reward, examples: Sequence[Example], samples: Sequence[Sequence[str]]
) -> list[list[float]]:
    """The metric of every sample; one call for all."""
    pairs = zip(examples, samples, strict=False)
    repeated = [example for example, texts in pairs for _ in texts]
    scores = iter(metric.score(repeated, [text for texts in samples for text in texts]))
    return [list(islice(scores, len(texts))) for texts in samples]


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _where_present(values_N: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to every value but NaN, for which comparisons and sign() would give 0."""
    return torch.where(values_N.isnan(), values_N, function(values_N).double())


def _with_samples(
    rows: list[dict[str, Any]],
    samples: Sequence[Sequence[str]] | None,
    sampled: Sequence[Sequence[float]],
) -> list[dict[str, Any]]:
    for row, texts, scores in zip(rows, samples or (), sampled, strict=False):
        present = [None if math.isnan(score) else score for score in scores]
        row |= {"samples": list(texts), "sample_metrics": present}
    return rows


def _rows(
    examples: Sequence[Example],
    completions: Sequence[str],
    baseline: Sequence[str] | None,
    scores: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    rows = []
    for n, (example, completion) in enumerate(zip(examples, completions, strict=True)):
        row = {
            "prompt": example.prompt,
            "reference": example.reference,
            "completion": completion,
            "baseline": None if baseline is None else baseline[n],
        }
        values = {name: float(values_N[n]) for name, values_N in scores.items()}
        row |= {name: None if math.isnan(value) else value for name, value in values.items()}
        rows.append(row)
    return rows
