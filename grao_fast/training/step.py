"""One GRAO step: sample groups, score them, and move the policy along the gradient of J.

The mathematics is `grao_fast.kernels.reference`'s. Suffixes: N prompts, G samples, K = G + 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.data.packing import Group, MicroBatch, split_by_tokens
from grao_fast.kernels import (
    GRAOLoss,
    group_advantages,
    linear_grao_loss,
    linear_logprobs,
    sequence_weights,
)
from grao_fast.models.policy import Policy
from grao_fast.rewards import Reward
from grao_fast.sampling import Completion
from grao_fast.training.flops import ModelCost, update_flops
from grao_fast.training.metrics import LossMetrics, held_ratios


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
    texts = [
        policy.decode([prompt.prompt_ids] * len(group), group)
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    sampled = time.perf_counter()
    scores = reward.score_groups(
        [prompt.scored for prompt in prompts], texts, reward_type=config.reward_type
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


def to_groups(rollout: Rollout, *, beta: float, lam: float, kl_coef: float = 0.0) -> list[Group]:
    """The groups of a rollout; what neither the objective nor the KL term asks for is not live."""
    live_NK = sequence_weights(rollout.advantages_NK, beta=beta, lam=lam) != 0
    if kl_coef:
        live_NK[:, :-1] |= ~rollout.rewards_NK[:, :-1].isnan()
    return [
        Group(
            prompt_ids=prompt.prompt_ids,
            sequence_ids=[*(c.token_ids for c in completions), prompt.reference_ids],
            rewards_K=rollout.rewards_NK[n],
            live_K=live_NK[n],
            sampler_logprobs=[c.logprobs for c in completions],
        )
        for n, (prompt, completions) in enumerate(
            zip(rollout.prompts, rollout.completions, strict=True)
        )
    ]


class StepLoss(NamedTuple):
    """`loss` is what the backward pass begins at: GRAO's, and the router's where there is one."""

    loss: Tensor
    grao: GRAOLoss
    router: Tensor | None = None


def micro_batch_loss(
    policy: Policy,
    batch: MicroBatch,
    config: GRAOConfig,
    *,
    num_prompts: int,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
) -> StepLoss:
    """The loss of one micro-batch; the sum over a step's micro-batches is the step's loss.

    The head's gradient is in its weight's `grad` when this returns; `backward` does the others.

    num_prompts: prompts of the whole step, dead groups included, so that the gradient does not
        depend on how the step was split.
    old_logprob_T: under the policy that the step began with; None: it is this one.
    ref_logprob_T: under the policy that training began with; None: no KL term.
    """
    hidden_TD, router_loss = policy.hidden_and_router_loss(batch)
    head_VD, bias_V = policy.head()
    with policy.autocast():
        grao = linear_grao_loss(
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
            old_logprob_T=old_logprob_T,
            clip=None if old_logprob_T is None else config.clip,
            sampler_logprob_T=None if config.sampler_cap is None else batch.sampler_logprob_T,
            sampler_cap=config.sampler_cap,
            ref_logprob_T=ref_logprob_T,
            kl_coef=None if ref_logprob_T is None else config.kl_coef,
            workspace_mib=config.workspace_mib,
            head_grad_VD=policy.head_grad(),
        )
    if router_loss is None:
        return StepLoss(grao.loss, grao)
    router_loss = router_loss / num_prompts
    return StepLoss(grao.loss + router_loss, grao, router_loss.detach())


@torch.no_grad()
def reference_logprobs(policy: Policy, batch: MicroBatch, config: GRAOConfig) -> Tensor:
    """(T,) log-probs of a micro-batch's targets under the policy that training began with."""
    with policy.as_it_began() as reference, reference.autocast():
        head_VD, bias_V = reference.head()
        return linear_logprobs(
            reference.hidden(batch),
            head_VD,
            batch.target_T,
            bias_V=bias_V,
            temperature=config.temperature,
            logit_scale=reference.transform.logit_scale,
            softcap=reference.transform.softcap,
            workspace_mib=config.workspace_mib,
        ).logprob_T


def update(
    policy: Policy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    rollout: Rollout,
    config: GRAOConfig,
) -> dict[str, float]:
    """The updates of one step on its rollout; returns their metrics, the losses of the first.

    A sampler with weights of its own still has those from before.

    Raises:
        FloatingPointError: a gradient is not finite; it has not been applied.
    """
    started = time.perf_counter()
    groups = to_groups(rollout, beta=config.beta, lam=config.lam, kl_coef=config.kl_coef)
    budget = config.max_tokens_per_microbatch
    assert budget is not None, "see grao_fast.training.memory.token_budget"
    passes: list[LossMetrics] = []
    norms: list[float] = []
    optimizer.zero_grad(set_to_none=True)  # what an interrupted run or a caller has left
    with policy.updating():
        parts = [
            _Part(policy.lay_out(part))
            for part in split_by_tokens(groups, budget, share_prefix=policy.share_prefix)
        ]
        if config.kl_coef:
            for part in parts:
                part.ref_logprob_T = reference_logprobs(policy, part.batch, config)
        for _ in range(config.num_iterations):
            passes.append(_backward(policy, parts, config, num_prompts=len(groups)))
            norms.append(_optimizer_step(optimizer, max_norm=config.max_grad_norm))
    learning_rate = scheduler.get_last_lr()[0]
    scheduler.step()
    updated = time.perf_counter()
    metrics = passes[0].to_dict(kl_coef=config.kl_coef) | {
        "grad_norm": norms[0],
        "learning_rate": learning_rate,
        "tokens": config.num_iterations * sum(p.batch.input_ids_BL.numel() for p in parts),
        **update_flops(
            ModelCost.of(policy.causal_lm, recompute=policy.recomputes),
            groups,
            [part.batch for part in parts],
            share_prefix=policy.share_prefix,
            updates=config.num_iterations,
            scored=config.kl_coef > 0,
        ),
        "time/update": updated - started,
    }
    if config.num_iterations > 1:
        held = [each.held.value for each in passes[1:]]
        metrics["clip_ratio/region_mean"] = sum(held) / len(held)
    return metrics


@dataclass
class _Part:
    """A micro-batch of a step, and what its updates have in common."""

    batch: MicroBatch
    old_logprob_T: Tensor | None = None  # known from the first update on
    ref_logprob_T: Tensor | None = None


def _backward(
    policy: Policy, parts: list[_Part], config: GRAOConfig, *, num_prompts: int
) -> LossMetrics:
    """Gradients of all micro-batches of a step, added up in the parameters."""
    metrics = LossMetrics()
    for part in parts:
        loss = micro_batch_loss(
            policy,
            part.batch,
            config,
            num_prompts=num_prompts,
            old_logprob_T=part.old_logprob_T,
            ref_logprob_T=part.ref_logprob_T,
        )
        loss.loss.backward()
        metrics.add(part.batch, loss.grao, _held(part, loss.grao, config), loss.router)
        if config.num_iterations > 1 and part.old_logprob_T is None:
            # References were not sampled: L(y) needs no ratio, and its gradient is exact as it is.
            K = part.batch.rewards_NK.shape[1]
            is_sample_T = part.batch.sequence_T % K != K - 1
            part.old_logprob_T = torch.where(is_sample_T, loss.grao.logprob_T.cpu(), torch.nan)
    return metrics


def _held(part: _Part, loss: GRAOLoss, config: GRAOConfig) -> Tensor | None:
    """`held_ratios` of a pass behind the first; None where there are none."""
    if part.old_logprob_T is None:
        return None
    weight_NK = sequence_weights(loss.advantages_NK, beta=config.beta, lam=config.lam)
    weight_T = weight_NK.flatten()[part.batch.sequence_T]
    return held_ratios(weight_T, loss.logprob_T.cpu(), part.old_logprob_T, config.clip)


def _optimizer_step(optimizer: Optimizer, *, max_norm: float) -> float:
    """Clip, check and apply the gradient; returns its norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # max_grad_norm 0 turns clipping off; the norm is measured all the same
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; lower learning_rate, or resume from a checkpoint "
            "with another seed"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
