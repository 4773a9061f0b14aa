"""Diagnosis of a run from the metrics that it logs: what goes wrong, in one line with a remedy.

A detector is a function of a run's `History`. It looks at the first logged steps and at the latest
ones only, so that a resumed run reaches the same findings from metrics.jsonl. docs/training.md
has the limits, and docs/troubleshooting.md every message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from grao_fast.config import ReferenceAdvantage
from grao_fast.training.history import History, Row


class Limits(NamedTuple):
    """What counts as a fault. Shares and means are those of the latest steps."""

    logprob_fall: float = 1.0  # nats a token that L(y) is below its best
    entropy_left: float = 0.1  # share of the first steps' entropy
    diversity_left: float = 0.3  # share of the first steps' diversity
    length_left: float = 0.3  # share of the first steps' length, and
    reference_length: float = 0.5  # share of the references' length
    truncated: float = 0.5  # share of completions that are cut, and
    truncation_rise: float = 0.25  # how much it has risen
    equal_groups: float = 0.9  # share of groups whose samples have equal rewards
    spread_left: float = 0.02  # share of the first steps' deviation of rewards within groups
    losing_references: float = 0.95  # share of references with A_y < 0
    gain: float = 0.5  # a rise of the reward that excuses a collapse, in first deviations
    # Nats a token between sampler and policy. Rounding causes 0.03 on SmolLM2-135M in bfloat16, and
    # 5e-6 in float32; the first step's difference tightens the bound.
    mismatch: float = 0.1
    mismatch_times: float = 10.0  # the first step's difference, but at least
    mismatch_least: float = 1e-3


LIMITS = Limits()


# Why references become less likely, and the remedy, by `reference_advantage`.
_FALLING = {
    "floor": "the samples, which are reinforced, draw the policy away from them. Lower "
    "learning_rate, or raise kl_coef",
    "clip": "the regulariser pushes down those that lose to the samples. Set "
    'reference_advantage="floor", or lower lam or learning_rate',
    "signed": "those that lose to the samples are pushed down without bound. Set "
    'reference_advantage="floor", or lower learning_rate',
    "tapered": "those that lose to the samples are pushed down. Set "
    'reference_advantage="floor", or lower learning_rate',
}


# Detectors. A comparison with NaN is false, so that nothing is said of what is not known.


def no_signal(history: History) -> str | None:
    """A step whose loss is 0."""
    if not history.now("frac_dead") >= 1 or not math.isnan(history.now("kl")):
        return None  # the KL term gives a loss of its own
    reward = history.now("reward")
    if not history.has("reward"):
        return "the loss is 0, since no prompt of the step has a reference: look at the dataset"
    if math.isnan(reward):
        return "the loss is 0, since the reward was None for every sample: look at the reward"
    if history.now("frac_reward_zero_std") < 1:
        return (
            "the loss is 0, since the objective gives no sequence a weight, though rewards differ "
            f"(mean {reward:.4g}): look at its options, such as a threshold of the reward"
        )
    return (
        "the loss is 0, since in every group all rewards are equal "
        f"(mean {reward:.4g}): there is nothing to learn from. "
        "Look at the reward, raise temperature or num_generations, or change the prompts"
    )


def falling_references(history: History) -> str | None:
    """A collapse of L(y), which a negative A_y lowers without bound, but under "floor"."""
    before, now = history.best_logprob, history.latest("reference/logprob")
    if not now < before - LIMITS.logprob_fall:
        return None
    fell = f"the references' mean log-prob fell from {before:.2f} at best to {now:.2f} nats a token"
    if history.objective != "grao":
        return f"{fell}: the policy moves away from what it imitates. Lower learning_rate"
    return f"{fell}: {_FALLING[history.reference_advantage]}"


def losing_references(history: History) -> str | None:
    """References that lose to their samples nearly always."""
    share = history.latest("reference/frac_negative")
    if history.objective != "grao" or not share >= LIMITS.losing_references:
        return None
    lowered = "" if history.reference_advantage == "floor" else ", and are made less likely"
    return (
        f"the references lose in {share:.0%} of groups: they are not imitated any more{lowered}. "
        "Give better references, or end the run here"
    )


def lost_entropy(history: History) -> str | None:
    """A collapse of the policy's entropy that the reward has not gained from."""
    before, now = _both(history, "entropy")
    if not now < LIMITS.entropy_left * before or _has_gained(history):
        return None
    return (
        f"the policy's entropy fell from {before:.2g} to {now:.2g} nats a token, and the reward "
        "has not risen: it hardly explores any more. Resume from an earlier checkpoint with a "
        "lower learning_rate, a higher kl_coef or a higher temperature"
    )


def lost_diversity(history: History) -> str | None:
    """A collapse of the samples onto few completions that the reward has not gained from."""
    before, now = _both(history, "completions/diversity")
    if not now < LIMITS.diversity_left * before or _has_gained(history):
        return None
    return (
        f"{1 - now:.0%} of the pairs of a prompt's samples are the same text, {1 - before:.0%} at "
        "the start, and the reward has not risen: the policy repeats itself. Raise temperature or "
        "kl_coef, or lower learning_rate"
    )


def lost_length(history: History) -> str | None:
    """A collapse of the completions' length, to less than half of the references'."""
    before, now = _both(history, "completions/mean_length")
    references = history.latest("reference/mean_length")
    if not (now < LIMITS.length_left * before and now < LIMITS.reference_length * references):
        return None
    return (
        f"completions shrank from {before:.0f} to {now:.0f} tokens, and references have "
        f"{references:.0f}: read some in completions.jsonl. If they say too little, the reward "
        "pays for brevity: change it, or add a reward for length"
    )


def rising_truncation(history: History) -> str | None:
    """Completions that come to be cut at max_new_tokens."""
    before, now = _both(history, "completions/clipped_ratio")
    if not (now >= LIMITS.truncated and now >= before + LIMITS.truncation_rise):
        return None
    return (
        f"{now:.0%} of the completions are cut at max_new_tokens, {before:.0%} at the start: their "
        "reward is that of an unfinished text, and they teach no end. Raise max_new_tokens, or let "
        "the reward take off for length"
    )


def blunt_reward(history: History) -> str | None:
    """A reward that no longer tells the samples of a prompt apart."""
    equal = history.latest("frac_reward_zero_std")
    before, now = _both(history, "reward_std")
    if equal >= LIMITS.equal_groups and no_signal(history) is None:
        found = f"in {equal:.0%} of groups all samples have the same reward"
    elif now < LIMITS.spread_left * before:
        found = (
            f"rewards within a group deviate by {now:.2g}, by {before:.2g} at the start, and "
            "advantages scale up what is left"
        )
    else:
        return None
    return (
        f"{found} (mean {history.latest('reward'):.4g}): the reward no longer tells samples apart. "
        "If the task is solved, end the run or take harder prompts; else make the reward finer, or "
        "raise temperature or num_generations"
    )


def other_sampler(history: History) -> str | None:
    """A sampler whose log-probs are not the policy's."""
    name = "sampling/logp_diff"
    if history.steps < 2 or history.now("sampling/staleness") > 0:
        return None  # of stale samples, the difference is the effect of the updates since
    first = history.earliest(name, lambda row: not row.get("sampling/staleness", 0) > 0)
    bound = LIMITS.mismatch
    if not math.isnan(first):
        bound = min(max(LIMITS.mismatch_times * first, LIMITS.mismatch_least), bound)
    gap = history.now(name)
    if not gap > bound:
        return None
    return (
        f"the sampler's log-probs differ from the policy's by {gap:.2g} nats a token on average, "
        f"more than the {bound:.2g} that rounding explains: it samples from other weights, from "
        "another model, or at another temperature"
    )


DETECTORS = (
    no_signal,
    falling_references,
    losing_references,
    lost_entropy,
    lost_diversity,
    lost_length,
    rising_truncation,
    blunt_reward,
    other_sampler,
)
# Those that judge how what the policy samples has changed.
_OF_ITS_SAMPLES = (lost_diversity, lost_length, rising_truncation, blunt_reward, other_sampler)


def _both(history: History, name: str) -> tuple[float, float]:
    return history.first(name), history.latest(name)


def _has_gained(history: History) -> bool:
    """Whether the reward has risen by half of what it first deviated in groups, or is unknown."""
    before, now = _both(history, "reward")
    return not now - before <= LIMITS.gain * history.first("reward_std")


class Diagnosis:
    """Turns the metrics of logged steps into messages, each detector's once in a run.

    objective, reference_advantage: as `GRAOConfig` has them, the objective without its options.
    samples: whether the policy samples what it learns from.
    """

    def __init__(
        self,
        objective: str = "grao",
        *,
        reference_advantage: ReferenceAdvantage = "floor",
        samples: bool = True,
    ) -> None:
        self._history = History(objective, reference_advantage)
        self._silent = [each for each in DETECTORS if samples or each not in _OF_ITS_SAMPLES]

    def recall(self, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Replay the steps of metrics.jsonl in silence; returns the metrics of the last."""
        metrics: dict[str, float] = {}
        for row in rows:
            if "loss" in row:
                metrics = {k: math.nan if v is None else v for k, v in row.items() if k != "step"}
                self.messages(row["step"], metrics)
        return metrics

    def messages(self, step: int, metrics: Row) -> list[str]:
        """What a logged step shows for the first time."""
        self._history.add(metrics)
        found = [(detector, detector(self._history)) for detector in self._silent]
        self._silent = [detector for detector, text in found if text is None]
        return [f"step {step}: {text}" for _, text in found if text is not None]
