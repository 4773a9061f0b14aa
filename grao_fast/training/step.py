"""One step: the updates of a policy on a rollout.

Suffixes: N prompts, G samples, K = G + 1 sequences of a prompt, T rows that predict a token.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from grao_fast.config import ObjectiveOptions, OptimisationOptions
from grao_fast.data.packing import Group, MicroBatch, idle, share_out
from grao_fast.kernels import PolicyLoss, linear_logprobs
from grao_fast.models.beginning import Beginning
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import reshard, synchronise_gradients, whole
from grao_fast.training.coefficients import to_groups
from grao_fast.training.flops import ModelCost, update_flops
from grao_fast.training.loss import policy_loss
from grao_fast.training.metrics import LossMetrics, defined
from grao_fast.training.rollout import Rollout


class StepLoss(NamedTuple):
    """`loss`, the root of the backward pass, is the objective's plus the router's, if any.

    clipped: as from `policy_loss`.
    """

    loss: Tensor
    policy: PolicyLoss
    clipped: Tensor | None
    router: Tensor | None = None


def micro_batch_loss(
    policy: Policy,
    batch: MicroBatch,
    objective: ObjectiveOptions,
    *,
    num_prompts: int,
    old_logprob_T: Tensor | None = None,
    ref_logprob_T: Tensor | None = None,
    workspace_mib: int | None = None,
) -> StepLoss:
    """The loss of one micro-batch, made inside the model's forward pass.

    The sum over a step's micro-batches is the step's loss. The head's gradient is in its weight's
    `grad` when this returns; `backward` does the others.

    num_prompts: prompts of the whole step, dead groups included: the router's loss is a mean over
        them, as the coefficients of the batch are.
    old_logprob_T: under the policy that the step began with; None: it is this one.
    ref_logprob_T: under the policy that training began with; None: not asked for.
    """

    def loss(head: HeadInputs) -> StepLoss:
        router_loss = policy.router_loss(head, batch)
        found, clipped = policy_loss(
            policy,
            head,
            batch,
            objective,
            old_logprob_T=old_logprob_T,
            ref_logprob_T=ref_logprob_T,
            workspace_mib=workspace_mib,
        )
        if router_loss is None or batch.is_idle:
            return StepLoss(found.loss, found, clipped)
        router_loss = router_loss / num_prompts
        return StepLoss(found.loss + router_loss, found, clipped, router_loss.detach())

    return policy.at_head(batch, loss)


@torch.no_grad()
def reference_logprobs(
    policy: Policy,
    beginning: Beginning,
    batch: MicroBatch,
    *,
    temperature: float,
    workspace_mib: int | None = None,
) -> Tensor:
    """(T,) log-probs of a micro-batch's targets under the policy that training began with.

    To be called inside `policy.updating()`.
    """

    def score(head: HeadInputs) -> Tensor:
        return linear_logprobs(
            head.hidden_TD,
            head.head_VD,
            batch.target_T,
            bias_V=head.bias_V,
            temperature=temperature,
            logit_scale=policy.transform.logit_scale,
            softcap=policy.transform.softcap,
            workspace_mib=workspace_mib,
        ).logprob_T

    policy.model.eval()
    with beginning.restored():
        logprob_T = policy.at_head(batch, score)
        reshard(policy.model)
    policy.model.train()
    return logprob_T


def update(
    policy: Policy,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    rollout: Rollout,
    *,
    objective: ObjectiveOptions,
    optimisation: OptimisationOptions,
    max_tokens: int,
    beginning: Beginning | None = None,
) -> dict[str, float]:
    """The updates of one step on its rollout; returns their metrics, the losses of the first.

    A sampler with weights of its own keeps the old ones until its `sync`. With several processes,
    each computes its share of the micro-batches, and all return the metrics of the whole.

    Args:
        max_tokens: token budget of a micro-batch; whole groups only.
        beginning: the policy that the KL term, and some objectives, measure from.

    Raises:
        FloatingPointError: a gradient is not finite; it has not been applied.
    """
    started = time.perf_counter()
    groups = to_groups(rollout, objective)
    workspace_mib = optimisation.workspace_mib
    passes: list[LossMetrics] = []
    norms: list[float] = []
    optimizer.zero_grad(set_to_none=True)  # left by an interrupted run, or a caller
    with policy.updating():
        parts = _parts(policy, groups, max_tokens)
        if objective.needs_beginning:
            assert beginning is not None, "kept where it is needed"
            options = {"temperature": objective.temperature, "workspace_mib": workspace_mib}
            for part in parts:
                part.ref_logprob_T = reference_logprobs(policy, beginning, part.batch, **options)
        for iteration in range(optimisation.num_iterations):
            own = _backward(
                policy, parts, objective, len(groups), workspace_mib, first=iteration == 0
            )
            passes.append(LossMetrics.joined(policy.world.gather(own)))
            norms.append(_optimizer_step(optimizer, max_norm=optimisation.max_grad_norm))
            if iteration == 0 and optimisation.num_iterations > 1:
                for part in parts:
                    part.keep_old_logprobs()
    learning_rate = scheduler.get_last_lr()[0]
    scheduler.step()
    updated = time.perf_counter()
    metrics = passes[0].to_dict(kl_coef=objective.kl_coef) | {
        "grad_norm": norms[0],
        "learning_rate": learning_rate,
        **_work(policy, groups, parts, objective, updates=len(passes)),
        "time/update": updated - started,
    }
    clipped = [each.clipped.value for each in passes[1:] if each.clipped.count]
    if clipped:
        metrics["clip_ratio/region_mean"] = sum(clipped) / len(clipped)
    return defined(metrics, objective.formula)


@dataclass
class _Part:
    """A micro-batch of a step, and the log-probs that all its updates share."""

    batch: MicroBatch
    logprob_T: Tensor | None = None  # of the last pass, on the CPU
    old_logprob_T: Tensor | None = None  # from the second update on
    ref_logprob_T: Tensor | None = None

    def keep_old_logprobs(self) -> None:
        """Make the log-probs of the last pass the denominators of the next updates' ratios.

        References were not sampled: L(y) needs no ratio, and its gradient is exact without one.
        """
        if self.batch.is_idle:
            return
        assert self.logprob_T is not None, "after a pass"
        self.old_logprob_T = torch.where(self.batch.is_sample_T, self.logprob_T, torch.nan)


def _parts(policy: Policy, groups: list[Group], max_tokens: int) -> list[_Part]:
    """This process's micro-batches of a step, as many as every other process has."""
    world = policy.world
    plan = share_out(groups, max_tokens, world.size, share_prefix=policy.share_prefix)
    parts = [_Part(policy.lay_out(part)) for part in plan[world.rank]]
    if len(parts) < len(plan[0]):  # at most one
        parts.append(_Part(idle(plan[0][0][0], policy.lay_out)))
    return parts


def _work(
    policy: Policy,
    groups: list[Group],
    parts: list[_Part],
    objective: ObjectiveOptions,
    *,
    updates: int,
) -> dict[str, float]:
    """The tokens and FLOPs of a step's updates, of all processes together."""
    own = {
        "tokens": updates * sum(part.batch.input_ids_BL.numel() for part in parts),
        **update_flops(
            ModelCost.of(policy.causal_lm, recompute=policy.recomputes),
            groups,
            [part.batch for part in parts],
            share_prefix=policy.share_prefix,
            updates=updates,
            scored=objective.needs_beginning,
            two_passes=objective.formula.two_passes,
        ),
    }
    of_each = policy.world.gather(own)
    return own | {name: sum(each[name] for each in of_each) for name in ("tokens", "flops/done")}


def _backward(
    policy: Policy,
    parts: list[_Part],
    objective: ObjectiveOptions,
    num_prompts: int,
    workspace_mib: int | None,
    *,
    first: bool,
) -> LossMetrics:
    """Accumulate the gradients of all micro-batches of a step in the parameters.

    first: whether weights are still those that the step began with, so that a signal may end it.
    """
    metrics = LossMetrics(objective.formula.terms, sampler_cap=objective.sampler_cap)
    for part in parts:
        if first:
            policy.world.check()
        last = part is parts[-1]
        synchronise_gradients(policy.model, last or not policy.defers_reduction)
        loss = micro_batch_loss(
            policy,
            part.batch,
            objective,
            num_prompts=num_prompts,
            old_logprob_T=part.old_logprob_T,
            ref_logprob_T=part.ref_logprob_T,
            workspace_mib=workspace_mib,
        )
        loss.loss.backward()
        if part.batch.is_idle:
            continue
        part.logprob_T = loss.policy.logprob_T.cpu()
        metrics.add(part.batch, loss.policy, loss.clipped, loss.router)
    return metrics


def _optimizer_step(optimizer: Optimizer, *, max_norm: float) -> float:
    """Clip, check and apply the gradient; returns its norm before clipping."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # max_grad_norm 0 turns clipping off, but the norm is still measured.
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient's norm is {norm}; lower learning_rate, or resume from a checkpoint "
            "with another seed"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
