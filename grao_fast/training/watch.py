"""Warnings derived from a run's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# A fall of the references' average log-prob, in nats a token, that counts as a collapse.
_COLLAPSE_NATS = 1.0
_SMOOTHING = 0.8
# Upper bound on the rounding difference between sampler and policy, in nats a token: it is 0.03 on
# SmolLM2-135M in bfloat16, and 5e-6 in float32. The first step's difference tightens the bound.
_MISMATCH_NATS = 0.1
_MISMATCH_TIMES = 10.0
_LEAST_MISMATCH_NATS = 1e-3
_REPEAT_EVERY = 10


class Watch:
    """Turns metrics into warnings, each kind once or at most every tenth time."""

    def __init__(self) -> None:
        self._dead_steps = 0
        self._first_logprob: float | None = None
        self._mean_logprob = 0.0
        self._collapsed = False
        self._mismatched = False
        self._mismatch_nats: float | None = None  # unknown before the first step

    def recall(self, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Replay the steps in metrics.jsonl; returns the metrics of the last."""
        metrics: dict[str, float] = {}
        for row in rows:
            if "loss" in row:
                metrics = {k: math.nan if v is None else v for k, v in row.items() if k != "step"}
                self.messages(row["step"], metrics)
        return metrics

    def messages(self, step: int, metrics: dict[str, float]) -> list[str]:
        """The warnings for a step."""
        checks = (self._no_signal, self._collapse, self._mismatch)
        found = (check(step, metrics) for check in checks)
        return [message for message in found if message is not None]

    def _no_signal(self, step: int, metrics: dict[str, float]) -> str | None:
        if metrics["frac_dead"] < 1 or "kl" in metrics:  # the KL term gives a loss of its own
            return None
        self._dead_steps += 1
        if self._dead_steps % _REPEAT_EVERY != 1:
            return None
        if math.isnan(metrics["reward"]):
            return f"step {step}: the loss is 0, since the reward was None for every sample"
        return (
            f"step {step}: the loss is 0, since in every group all rewards are equal "
            f"(mean {metrics['reward']:.4g}): there is nothing to learn from. "
            "Look at the reward, raise temperature or num_generations, or change the prompts"
        )

    def _collapse(self, step: int, metrics: dict[str, float]) -> str | None:
        logprob = metrics["reference/logprob"]
        if math.isnan(logprob) or self._collapsed:
            return None
        if self._first_logprob is None:
            self._first_logprob = self._mean_logprob = logprob
        self._mean_logprob = _SMOOTHING * self._mean_logprob + (1 - _SMOOTHING) * logprob
        if self._mean_logprob >= self._first_logprob - _COLLAPSE_NATS:
            return None
        self._collapsed = True
        return (
            f"step {step}: the references' mean log-prob fell from {self._first_logprob:.2f} "
            f"to {self._mean_logprob:.2f} nats a token: samples beat them, and what loses is "
            'pushed down. reference_advantage="clip" and a smaller lam push less'
        )

    def _mismatch(self, step: int, metrics: dict[str, float]) -> str | None:
        gap = metrics.get("sampling/logp_diff", math.nan)
        if self._mismatched or math.isnan(gap) or metrics.get("sampling/staleness"):
            return None  # of stale samples, it is the effect of the updates since
        if self._mismatch_nats is None:
            of_first = max(_MISMATCH_TIMES * gap, _LEAST_MISMATCH_NATS)
            self._mismatch_nats = min(of_first, _MISMATCH_NATS)
        if gap <= self._mismatch_nats:
            return None
        self._mismatched = True
        return (
            f"step {step}: the sampler's log-probs differ from the policy's by {gap:.2g} nats a "
            f"token on average, more than the {self._mismatch_nats:.2g} that rounding explains: it "
            "samples from other weights, from another model, or at another temperature"
        )
