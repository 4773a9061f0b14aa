"""Measures the memory and the time of an update, and extrapolates them to a step and to a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grao_fast.checkup.groups import GroupFacts
from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.models.sharding import device_memory, local
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.errors import UserError, one_line
from grao_fast.training.coefficients import to_groups
from grao_fast.training.flops import ModelCost, group_work
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.memory import micro_batch
from grao_fast.training.rollout import Rollout, advantages_of
from grao_fast.training.step import update

_TIMED = 4  # prompts of the update that is timed, on each process


@dataclass(frozen=True)
class Memory:
    """Bytes of this process's device.

    weights: all parameters; kept: copies of trained ones for the KL term.
    pass_: peak of a micro-batch; its groups, as `MicroBatchMemory` has them.
    device: what there is; of a CPU, the machine's, divided by its processes.
    """

    weights: int
    gradients: int
    moments: int
    kept: int
    pass_: float
    groups: int
    device: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.moments + self.kept + self.pass_


@dataclass(frozen=True)
class Times:
    """Seconds of a step with all groups live.

    timed, timed_seconds: prompts of the update that was timed, and its seconds.
    sample, reward: of a step's prompts, in proportion to those sampled; reward None: it failed.
    update: of a step's prompts, in proportion to the FLOPs.
    tflops: 10^12 operations a second of the timed update.
    """

    timed: int
    timed_seconds: float
    sample: float
    reward: float | None
    update: float
    tflops: float

    @property
    def step(self) -> float:
        return self.sample + (self.reward or 0.0) + self.update


@dataclass(frozen=True)
class StepFacts:
    """The memory and the time of a step, where they could be measured.

    memory: None if not even one of the largest groups fits, as `problem` says.
    times: None if the update failed, or there was nothing to time.
    problem: why not; None: there was none.
    """

    prompts: int
    memory: Memory | None
    times: Times | None
    problem: str | None = None


class _Unapplied(Optimizer):
    """An optimiser whose steps change nothing."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:
        """Leave the weights as they are."""


def measure(
    loaded: LoadedPolicy,
    rows: Sequence[Encoded],
    groups: GroupFacts,
    *,
    config: GRAOConfig,
    batch_size: int,
) -> StepFacts:
    """Measure an update of some sampled groups, without applying it; every process must call it.

    Args:
        rows: that the largest group is made of.
        batch_size: prompts of a step.
    """
    policy = loaded.policy
    optimizer = _Unapplied([p for p in policy.model.parameters() if p.requires_grad])
    objective = config.objective_options
    shape = GroupShape.largest(rows, config.sampling, objective.formula)
    of_group = shape.group().size.tokens(share_prefix=policy.share_prefix)
    given = config.max_tokens_per_microbatch
    most = batch_size if given is None else max(1, min(batch_size, given // of_group))
    try:
        found = micro_batch(
            policy,
            optimizer,
            shape,
            objective,
            most=most,
            memory_budget_mib=config.memory_budget_mib,
            workspace_mib=config.workspace_mib,
        )
    except UserError as error:
        return StepFacts(batch_size, None, None, one_line(error))
    trained = [local(p) for group in optimizer.param_groups for p in group["params"]]
    elements = sum(p.numel() for p in trained)
    memory = Memory(
        weights=sum(local(p).nbytes for p in policy.model.parameters()),
        gradients=sum(p.nbytes for p in trained),
        moments=8 * elements,
        kept=0 if loaded.beginning is None else 4 * elements,
        pass_=found.peak,
        groups=found.groups,
        device=device_memory(policy.device, policy.world),
    )
    try:
        max_tokens = given or found.groups * of_group
        times = _time(loaded, optimizer, groups, config, batch_size, max_tokens)
    except FloatingPointError as error:
        return StepFacts(batch_size, memory, None, one_line(error))
    return StepFacts(batch_size, memory, times)


def _time(
    loaded: LoadedPolicy,
    optimizer: Optimizer,
    groups: GroupFacts,
    config: GRAOConfig,
    batch_size: int,
    max_tokens: int,
) -> Times:
    """Time an update of the first groups, and extrapolate it by the FLOPs of all groups."""
    policy, objective, rollout = loaded.policy, config.objective_options, groups.rollout
    timed = _live(rollout, _TIMED * policy.world.size, config)
    started = time.perf_counter()
    metrics = update(
        policy,
        optimizer,
        LambdaLR(optimizer, lambda step: 1.0),
        timed,
        objective=objective,
        optimisation=config.optimisation,
        max_tokens=max_tokens,
        beginning=loaded.beginning,
    )
    seconds = time.perf_counter() - started
    cost = ModelCost.of(policy.causal_lm, recompute=policy.recomputes)

    def flops(rollout: Rollout) -> float:
        return sum(
            cost.updates(
                group_work(
                    len(group.prompt_ids),
                    [len(ids) for ids in group.sequence_ids if ids],
                    cost.layers,
                    share_prefix=policy.share_prefix,
                )
            )
            for group in to_groups(rollout, objective)
        )

    scale = batch_size / len(rollout.prompts)
    return Times(
        timed=len(timed.prompts),
        timed_seconds=seconds,
        sample=scale * rollout.seconds.get("sample", 0.0),
        reward=None if groups.failed else scale * rollout.seconds.get("reward", 0.0),
        update=scale * seconds * flops(rollout) / flops(timed),
        tflops=metrics["flops/done"] / seconds / 1e12,
    )


def _live(rollout: Rollout, most: int, config: GRAOConfig) -> Rollout:
    """The first groups of a rollout, with rewards that make every sequence live."""
    prompts = rollout.prompts[:most]
    K = rollout.rewards_NK.shape[1]
    rewards_NK = torch.arange(K, dtype=torch.float64).repeat(len(prompts), 1)
    for n, prompt in enumerate(prompts):
        rewards_NK[n, len(rollout.completions[n]) : -1] = torch.nan  # where fewer are stored
        if not prompt.reference_ids:
            rewards_NK[n, -1] = torch.nan
    return replace(
        rollout,
        prompts=prompts,
        completions=rollout.completions[:most],
        texts=rollout.texts[:most],
        rewards_NK=rewards_NK,
        advantages_NK=advantages_of(prompts, rewards_NK, config.objective_options),
    )
