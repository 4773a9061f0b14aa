"""The metrics of a step: of its rollout, and of its updates.

Suffixes: N prompts, G samples, K = G + 1 sequences, T rows of the head (each predicts a token).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import MicroBatch
from grao_fast.kernels import PolicyLoss
from grao_fast.objectives import Objective
from grao_fast.rewards.measured import join_metrics
from grao_fast.sampling import Completion
from grao_fast.training.coefficients import groups_of
from grao_fast.training.rollout import Rollout


def group_metrics(
    rewards_NK: Tensor, advantages_NK: Tensor, weights_NK: Tensor
) -> dict[str, Tensor]:
    """The share of dead groups and the references' health; NaN without references.

    `reference/imitation_share` is sum max(w_y, 0) / sum |w_s| over the sequences of all groups,
    where w are the coefficients of L in the objective; NaN if all are 0.
    """
    reference_N = advantages_NK[:, -1]
    present_N = reference_N[~reference_N.isnan()]
    return {
        "frac_dead": (advantages_NK.nan_to_num(0.0) == 0).all(1).double().mean(),
        "reference/reward": rewards_NK[:, -1].nanmean(),
        "reference/advantage": reference_N.nanmean(),
        "reference/frac_negative": (present_N < 0).double().mean(),
        "reference/imitation_share": weights_NK[:, -1].clamp(min=0).sum() / weights_NK.abs().sum(),
    }


def rollout_metrics(rollout: Rollout, objective: ObjectiveOptions) -> dict[str, float]:
    """Rewards, lengths and the references' health; `reward` is of samples alone."""
    samples_NG = rollout.rewards_NK[:, :-1]
    completions = [completion for group in rollout.completions for completion in group]
    lengths = [len(p.reference_ids) for p in rollout.prompts if p.reference_ids]
    weights_NK = objective.formula.sequence_weights(groups_of(rollout, objective))
    metrics = {
        "reward": samples_NG.nanmean(),
        "reward_std": _nanstd(samples_NG),
        "frac_reward_zero_std": (_range(samples_NG) == 0).double().mean(),
        **group_metrics(rollout.rewards_NK, rollout.advantages_NK, weights_NK),
        "reference/mean_length": _mean_of(lengths),
        "completions/mean_length": _mean_of([len(c.token_ids) for c in completions]),
        "completions/clipped_ratio": _mean_of([not c.finished for c in completions]),
        "completions/diversity": diversity(rollout.completions),
        **{f"time/{phase}": seconds for phase, seconds in rollout.seconds.items()},
    }
    if rollout.staleness is not None:
        metrics["sampling/staleness"] = rollout.staleness
    metrics |= rollout.counts
    metrics |= {f"rewards/{name}/mean": mean for name, mean in rollout.per_function.items()}
    metrics |= join_metrics(rollout.measured)
    return defined({name: float(value) for name, value in metrics.items()}, objective.formula)


# Metrics, by their beginnings, that an objective without samples, or without references, lacks.
_OF_SAMPLES = (
    "reward", "frac_reward_zero_std", "completions/", "entropy", "sampling/", "reference/reward",
    "reference/advantage", "reference/frac_negative", "reference/imitation_share",
    "reference/logprob_gap", "clip_ratio/",
)  # fmt: skip
_OF_REFERENCES = (
    "reference/advantage", "reference/frac_negative", "reference/imitation_share",
    "reference/logprob",
)  # fmt: skip


def defined(metrics: dict[str, float], formula: Objective) -> dict[str, float]:
    """The metrics that an objective has."""
    absent: tuple[str, ...] = () if formula.needs_samples else _OF_SAMPLES
    if not formula.uses_references:
        absent += _OF_REFERENCES
    return {name: value for name, value in metrics.items() if not name.startswith(absent)}


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def diversity(groups: Sequence[Sequence[Completion]]) -> float:
    """Mean over groups of the share of pairs of samples that differ; NaN if all have one sample."""
    shares = []
    for group in groups:
        pairs = len(group) * (len(group) - 1)
        if pairs:
            counts = Counter(tuple(completion.token_ids) for completion in group)
            shares.append(1 - sum(n * (n - 1) for n in counts.values()) / pairs)
    return sum(shares) / len(shares) if shares else math.nan


def _range(samples_NG: Tensor) -> Tensor:
    """The range of rewards in each group, ignoring NaN; 0 if all are NaN."""
    if not samples_NG.shape[1]:
        return samples_NG.new_zeros(len(samples_NG))
    present_NG = ~samples_NG.isnan()
    high_N = samples_NG.where(present_NG, -torch.inf).amax(1)
    low_N = samples_NG.where(present_NG, torch.inf).amin(1)
    return (high_N - low_N).clamp(min=0)


def _nanstd(samples_NG: Tensor) -> Tensor:
    """Mean over groups of the samples' population standard deviation, ignoring NaN."""
    mean_N = samples_NG.nanmean(1, keepdim=True)
    return (samples_NG - mean_N).square().nanmean(1).sqrt().nanmean()


class _Mean:
    """A running mean, minimum and maximum that ignore NaN; NaN while empty."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.min, self.max = math.nan, math.nan

    def add(self, values: Tensor) -> None:
        values = values[~values.isnan()]
        if values.numel():
            self.total += float(values.sum())
            self.count += values.numel()
            self.min = min(float(values.min()), self.min)
            self.max = max(float(values.max()), self.max)

    def join(self, other: _Mean) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count
        self.min = other.min if math.isnan(self.min) else min(self.min, other.min)
        self.max = other.max if math.isnan(self.max) else max(self.max, other.max)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


_MEANS = ("samples", "references", "entropy", "logp_diff", "importance", "clipped")


class LossMetrics:
    """Accumulates the losses of an update's micro-batches.

    names: of the objective's terms.
    sampler_cap: cap of the importance weights; None: there are none.
    """

    def __init__(self, names: Sequence[str], *, sampler_cap: float | None) -> None:
        self.names, self.sampler_cap = names, sampler_cap
        self.terms, self.kl = torch.zeros(len(names), dtype=torch.float32), 0.0
        self.router: float | None = None
        self.samples, self.references, self.entropy = _Mean(), _Mean(), _Mean()
        self.logp_diff, self.importance, self.clipped = _Mean(), _Mean(), _Mean()

    @classmethod
    def joined(cls, parts: Sequence[LossMetrics]) -> LossMetrics:
        """The metrics of an update whose micro-batches several processes have computed."""
        total = cls(parts[0].names, sampler_cap=parts[0].sampler_cap)
        for part in parts:
            total.terms += part.terms
            total.kl += part.kl
            if part.router is not None:
                total.router = (total.router or 0.0) + part.router
            for name in _MEANS:
                getattr(total, name).join(getattr(part, name))
        return total

    def add(
        self,
        batch: MicroBatch,
        loss: PolicyLoss,
        clipped: Tensor | None = None,
        router: Tensor | None = None,
    ) -> None:
        """Add a micro-batch.

        clipped: for each ratio, 1 where it is clipped, 0 where not; NaN is left out.
        router: the router's part of the loss.
        """
        self.terms += loss.terms_C.float().cpu()
        self.kl += float(loss.kl)
        if router is not None:
            self.router = (self.router or 0.0) + float(router)
        logprob_T = loss.logprob_T.float().cpu()
        gap_T = logprob_T - batch.sampler_logprob_T
        self.logp_diff.add(gap_T.abs())
        if self.sampler_cap is not None:
            self.importance.add(gap_T.exp().clamp(max=self.sampler_cap))
        if clipped is not None:
            self.clipped.add(clipped.cpu())
        self._add_sequences(batch, logprob_T)
        assert loss.entropy_T is not None, "policy_loss asks for it"
        self.entropy.add(loss.entropy_T.cpu()[batch.is_sample_T])

    def _add_sequences(self, batch: MicroBatch, logprob_T: Tensor) -> None:
        """Add L(s), the mean log-prob of each sequence of the batch, to its kind's mean."""
        K = batch.K
        sequences, place_T = batch.sequence_T.unique(return_inverse=True)
        sums = torch.zeros(len(sequences), dtype=torch.float32).index_add_(0, place_T, logprob_T)
        means = sums / torch.bincount(place_T)
        is_reference = sequences % K == K - 1
        self.samples.add(means[~is_reference])
        self.references.add(means[is_reference])

    def to_dict(self, *, kl_coef: float) -> dict[str, float]:
        """The metrics by name; `defined` says which an objective has."""
        terms = self.terms.tolist()
        metrics = {
            "loss": self.kl + (self.router or 0.0) - sum(terms),
            **{f"objective/{name}": value for name, value in zip(self.names, terms, strict=True)},
            "entropy": self.entropy.value,
            "reference/logprob": self.references.value,
            "reference/logprob_gap": self.references.value - self.samples.value,
            "sampling/logp_diff": self.logp_diff.value,
            "sampling/logp_diff_max": self.logp_diff.max,
        }
        if self.sampler_cap is not None:
            weight = self.importance
            values = {"mean": weight.value, "min": weight.min, "max": weight.max}
            metrics |= {f"sampling/importance_sampling_ratio/{k}": v for k, v in values.items()}
        if self.router is not None:
            metrics["router_loss"] = self.router
        return metrics | ({"kl": self.kl / kl_coef} if kl_coef else {})
