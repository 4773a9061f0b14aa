"""One GRAO step: sample groups, score them, and move the policy along the gradient of J.

The mathematics is `grao_fast.kernels.reference`'s. Suffixes: N prompts, G samples, K = G + 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from grao_fast.batch import Group, MicroBatch, split_by_tokens
from grao_fast.config import GRAOConfig
from grao_fast.data import Encoded
from grao_fast.kernels import GRAOLoss, group_advantages, linear_grao_loss, sequence_weights
from grao_fast.policy import Policy
from grao_fast.rewards import Reward
from grao_fast.rollout import Completion


@dataclass(frozen=True)
class Rollout:
    """What one step sampled and what it earned.

    prompts: N encoded examples.
    completions, texts: N lists of G.
    rewards_NK, advantages_NK: float64 on the CPU, NaN where absent.
    per_function: mean reward over the samples of each reward function.
    """

    prompts: Sequence[Encoded]
    completions: list[list[Completion]]
    texts: list[list[str]]
    rewards_NK: Tensor
    advantages_NK: Tensor
    per_function: dict[str, float]
    seconds: dict[str, float]


def sample_and_score(
    policy: Policy, reward: Reward, prompts: Sequence[Encoded], config: GRAOConfig, *, seed: int
) -> Rollout:
    """Sample G completions of every prompt and score them beside the references."""
    started = time.perf_counter()
    completions = policy.sampler.sample(
        [prompt.prompt_ids for prompt in prompts],
        num_generations=config.num_generations,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=seed,
    )
    texts = [policy.decode(group) for group in completions]
    sampled = time.perf_counter()
    scores = reward.score_groups(
        [prompt.example for prompt in prompts], texts, reward_type=config.reward_type
    )
    advantages_NK = group_advantages(
        scores.rewards_NK,
        statistics=config.statistics,
        reference_advantage=config.reference_advantage,
    )
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=texts,
        rewards_NK=scores.rewards_NK,
        advantages_NK=advantages_NK,
        per_function=scores.per_function,
        seconds={"sample": sampled - started, "reward": time.perf_counter() - sampled},
    )


def to_groups(rollout: Rollout, *, beta: float, lam: float) -> list[Group]:
    """The groups of a rollout, with the sequences that weigh nothing marked."""
    live_NK = sequence_weights(rollout.advantages_NK, beta=beta, lam=lam) != 0
    return [
        Group(
            prompt_ids=prompt.prompt_ids,
            sequence_ids=[*(c.token_ids for c in completions), prompt.reference_ids],
            rewards_K=rollout.rewards_NK[n],
            live_K=live_NK[n],
        )
        for n, (prompt, completions) in enumerate(
            zip(rollout.prompts, rollout.completions, strict=True)
        )
    ]


def micro_batch_loss(
    policy: Policy, batch: MicroBatch, config: GRAOConfig, *, num_prompts: int
) -> GRAOLoss:
    """The loss of one micro-batch; the sum over a step's micro-batches is the step's loss.

    num_prompts: prompts of the whole step, dead groups included, so that the gradient does not
        depend on how the step was split.
    """
    hidden_TD = policy.hidden(batch)
    head_VD, bias_V = policy.head()
    with policy.autocast():
        return linear_grao_loss(
            hidden_TD,
            head_VD,
            batch.target_T,
            batch.sequence_T,
            batch.rewards_NK,
            beta=config.beta,
            lam=config.lam,
            statistics=config.statistics,
            reference_advantage=config.reference_advantage,
            bias_V=bias_V,
            temperature=config.temperature,
            logit_scale=policy.transform.logit_scale,
            softcap=policy.transform.softcap,
            num_prompts=num_prompts,
            workspace_mib=config.workspace_mib,
        )


def update(
    policy: Policy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    rollout: Rollout,
    config: GRAOConfig,
) -> dict[str, float]:
    """One optimiser step on a rollout; returns its metrics.

    Raises:
        FloatingPointError: the gradient is not finite; parameters are left as they were.
    """
    started = time.perf_counter()
    groups = to_groups(rollout, beta=config.beta, lam=config.lam)
    budget = config.max_tokens_per_microbatch
    terms, samples, references = torch.zeros(3), _Mean(), _Mean()
    tokens = 0
    with policy.updating():
        for part in split_by_tokens(groups, budget, share_prefix=policy.share_prefix):
            batch = policy.lay_out(part)
            loss = micro_batch_loss(policy, batch, config, num_prompts=len(groups))
            loss.loss.backward()
            terms += torch.stack([loss.exploration, loss.imitation, loss.alignment]).float().cpu()
            _add_logprobs(batch, loss.logprob_T, samples, references)
            tokens += batch.input_ids_BL.numel()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # max_grad_norm 0 turns clipping off; the norm is measured all the same
    limit = config.max_grad_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; lower learning_rate, or resume from a checkpoint "
            "with another seed"
        )
    learning_rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    exploration, imitation, alignment = terms.tolist()
    return {
        "loss": -(exploration + imitation + alignment),
        "objective/exploration": exploration,
        "objective/imitation": imitation,
        "objective/alignment": alignment,
        "reference/logprob": references.value,
        "reference/logprob_gap": references.value - samples.value,
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "tokens": tokens,
        "time/update": time.perf_counter() - started,
    }


class _Mean:
    """A running mean; NaN while empty."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


def _add_logprobs(batch: MicroBatch, logprob_T: Tensor, samples: _Mean, references: _Mean) -> None:
    """Add L(s), the mean log-prob of each sequence of the batch, to its kind's mean."""
    K = batch.rewards_NK.shape[1]
    sequences, place_T = batch.sequence_T.unique(return_inverse=True)
    sums = torch.zeros(len(sequences)).index_add_(0, place_T, logprob_T.float().cpu())
    means = sums / torch.bincount(place_T)
    is_reference = sequences % K == K - 1
    samples.add(means[~is_reference])
    references.add(means[is_reference])


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Rewards, lengths and the reference's health; the reference stays out of `reward`."""
    samples_NG, reference_N = rollout.rewards_NK[:, :-1], rollout.rewards_NK[:, -1]
    reference_advantage_N = rollout.advantages_NK[:, -1]
    present = ~reference_advantage_N.isnan()
    completions = [completion for group in rollout.completions for completion in group]
    metrics = {
        "reward": samples_NG.nanmean(),
        "reward_std": _nanstd(samples_NG),
        "frac_reward_zero_std": (_range(samples_NG) == 0).double().mean(),
        "frac_dead": (rollout.advantages_NK.nan_to_num(0.0) == 0).all(1).double().mean(),
        "reference/reward": reference_N.nanmean(),
        "reference/advantage": reference_advantage_N.nanmean(),
        "reference/frac_negative": (reference_advantage_N[present] < 0).double().mean(),
        "completions/mean_length": sum(len(c.token_ids) for c in completions) / len(completions),
        "completions/clipped_ratio": sum(not c.finished for c in completions) / len(completions),
        "time/sample": rollout.seconds["sample"],
        "time/reward": rollout.seconds["reward"],
    }
    metrics |= {f"rewards/{name}/mean": mean for name, mean in rollout.per_function.items()}
    return {name: float(value) for name, value in metrics.items()}


def _range(samples_NG: Tensor) -> Tensor:
    """Largest less smallest reward of each group, NaN left out; 0 where there is none."""
    present_NG = ~samples_NG.isnan()
    high_N = samples_NG.where(present_NG, -torch.inf).amax(1)
    low_N = samples_NG.where(present_NG, torch.inf).amin(1)
    return (high_N - low_N).clamp(min=0)


def _nanstd(samples_NG: Tensor) -> Tensor:
    """Mean over groups of the samples' population deviation, NaN left out."""
    mean_N = samples_NG.nanmean(1, keepdim=True)
    return (samples_NG - mean_N).square().nanmean(1).sqrt().nanmean()
