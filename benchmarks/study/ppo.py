"""PPO (arXiv 1707.06347) with a critic, by this package's kernel.

TRL no longer has PPO: `PPOTrainer` was removed in September 2026 (its pull request 7020), and 1.16
has neither it nor a model with a value head. The defaults of its last version are used here: 4
epochs of one mini-batch on a rollout, ratios and values clipped at 0.2, gamma 1, lambda 0.95,
whitened advantages. The KL penalty of every token, 0.05 in TRL and 0.02 in InstructGPT (arXiv
2203.02155), is an option, and 0 by default, as in all methods of the study.

A step samples G completions of each prompt, as other methods do. Then, in each of 4 epochs, actor
and critic are updated once:

    r_t     = -kl_coef log(pi_old / pi_0)_t, plus the reward at a completion's last token
    A_t     = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), whitened
    actor   = -mean_t min(rho_t A_t, clip(rho_t, 1 - 0.2, 1 + 0.2) A_t),   rho = pi / pi_old
    critic  = mean_t max((V_t - R_t)^2, (clip(V_t, V_old - 0.2, V_old + 0.2) - R_t)^2) / 2

with R_t = A_t + V_t before whitening, which is over a rollout, and pi_old the policy that sampled.
The critic is a copy of the base model with a linear head of zeros. It has an AdamW of its own, with
the actor's learning rate. TRL adds both losses, the critic's times vf_coef = 0.1; under AdamW that
factor changes little but how gradients are clipped.

References are not used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import Group, MicroBatch
from grao_fast.kernels import OffPolicy, linear_logprobs, linear_policy_loss
from grao_fast.models.objective import HeadInputs
from grao_fast.models.policy import Policy
from grao_fast.objectives.ppo import gae, ppo_terms, token_rewards, value_loss, whitened
from grao_fast.training.optim import adamw, lr_schedule
from study.arms import Meter, Problem
from study.samples import Samples, Sampling, config_of


@dataclass(frozen=True)
class PPO:
    """An arm; see the top of this module.

    epochs: passes over the samples of a step.
    mini_batches: updates of a pass; each takes whole groups.
    clip, value_clip: of ratios, and of values around those before the step.
    """

    epochs: int = 4
    mini_batches: int = 1
    clip: float = 0.2
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl_coef: float = 0.0

    def __call__(self, problem: Problem, *, learning_rate: float, meter: Meter) -> None:
        config = config_of(problem, learning_rate=learning_rate)
        sampling = Sampling(problem, config)
        learner = Learner(sampling.loaded.policy, self, config)
        meter.restart()
        for step in range(config.max_steps):
            samples = sampling.step(step)
            learner.step(samples)
            meter.step(sampled=samples.tokens)


class Critic(nn.Module):
    """V of every token, before it is chosen: a linear head on a copy of the policy's model."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.body = copy.deepcopy(policy.causal_lm)
        self.head = nn.Linear(self.body.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.policy = replace(policy, model=self.body, causal_lm=self.body)

    def forward(self, batch: MicroBatch) -> Tensor:
        """(T,) values."""
        with self.policy.updating():
            return self.head(self.policy.hidden(batch)).squeeze(-1)


@dataclass(frozen=True)
class Part:
    """A mini-batch of a rollout: what stays the same over its epochs.

    values_T, advantages_T, returns_T: by the critic before the step.
    """

    batch: MicroBatch
    values_T: Tensor
    advantages_T: Tensor
    returns_T: Tensor


class Learner:
    """Updates the actor, in place, and a critic."""

    def __init__(self, actor: Policy, options: PPO, config: GRAOConfig) -> None:
        self.actor, self.options, self.config = actor, options, config
        self.critic = Critic(actor)
        self.initial: Policy | None = None
        if options.kl_coef:
            frozen = copy.deepcopy(actor.causal_lm)
            self.initial = replace(actor, model=frozen, causal_lm=frozen)
        self.optimizers = [
            adamw(model, config.optimisation) for model in (actor.model, self.critic)
        ]
        self.schedulers = [
            lr_schedule(optimizer, config.optimisation, total_steps=config.max_steps)
            for optimizer in self.optimizers
        ]

    def step(self, samples: Samples) -> None:
        """All updates on the samples of a step."""
        parts = self.parts(samples)
        for _ in range(self.options.epochs):
            for part in parts:
                with self.actor.updating():
                    self.actor_loss(part).backward()
                self.critic_loss(part).backward()
                for optimizer in self.optimizers:
                    _update(optimizer, self.config.max_grad_norm)
        for scheduler in self.schedulers:
            scheduler.step()

    def parts(self, samples: Samples) -> list[Part]:
        """The mini-batches of a rollout; their advantages are whitened together."""
        scored = _scored(samples)
        if not scored:
            return []
        count = min(self.options.mini_batches, len(scored))
        parts = [self._part(scored[place::count]) for place in range(count)]
        advantages_T = torch.cat([part.advantages_T for part in parts])
        sequence_T = torch.cat([part.batch.sequence_T for part in parts])
        sizes = [part.advantages_T.numel() for part in parts]
        split = whitened(advantages_T, sequence_T).split(sizes)
        return [replace(p, advantages_T=own) for p, own in zip(parts, split, strict=True)]

    def _part(self, scored: Sequence[tuple[Group, Tensor]]) -> Part:
        batch = self.actor.lay_out([group for group, _ in scored])
        scores_S = torch.cat([rewards_G for _, rewards_G in scored])
        values_T, penalty_T = self.critic(batch).detach(), None
        if self.initial is not None:
            log_ratio_T = batch.sampler_logprob_T - self._logprobs(self.initial, batch)
            penalty_T = self.options.kl_coef * log_ratio_T
        rewards_T = token_rewards(scores_S, batch.sequence_T, penalty_T)
        gamma, lam = self.options.gamma, self.options.lam
        advantages = gae(rewards_T, values_T, batch.sequence_T, gamma=gamma, lam=lam)
        return Part(batch, values_T, *advantages)

    def _logprobs(self, policy: Policy, batch: MicroBatch) -> Tensor:
        def logprobs(head: HeadInputs) -> Tensor:
            return linear_logprobs(
                head.hidden_TD,
                head.head_VD,
                batch.target_T,
                temperature=self.config.temperature,
                workspace_mib=self.config.workspace_mib,
            ).logprob_T

        with policy.updating(), torch.no_grad():
            return policy.at_head(batch, logprobs)

    def actor_loss(self, part: Part) -> Tensor:
        """The clipped loss of a mini-batch; the head's gradient is in place when this returns."""
        batch, clip = part.batch, (self.options.clip, self.options.clip)

        def loss(head: HeadInputs) -> Tensor:
            return linear_policy_loss(
                head.hidden_TD,
                head.head_VD,
                batch.target_T,
                ppo_terms(part.advantages_T, batch.sequence_T),
                off_policy=OffPolicy(old_logprob_T=batch.sampler_logprob_T, clip=clip),
                temperature=self.config.temperature,
                workspace_mib=self.config.workspace_mib,
                head_grad_VD=self.actor.head_grad(),
            ).loss

        return self.actor.at_head(batch, loss)

    def critic_loss(self, part: Part) -> Tensor:
        """The clipped squared error of a mini-batch's values."""
        return value_loss(
            self.critic(part.batch),
            part.returns_T,
            part.batch.sequence_T,
            old_values_T=part.values_T,
            clip=self.options.value_clip,
        )


def _scored(samples: Samples) -> list[tuple[Group, Tensor]]:
    """Prompts with their samples and (G,) rewards; a completion without a reward is not live."""
    scored = []
    for n, completions in enumerate(samples.completions):
        rewards_G = samples.rewards_NK[n, :-1].float()
        group = Group(
            prompt_ids=samples.prompt_ids[n],
            sequence_ids=[completion.token_ids for completion in completions],
            terms_CK=(~rewards_G.isnan()).double()[None],
            sampler_logprobs=[completion.logprobs for completion in completions],
        )
        if group.live_sequences:
            scored.append((group, rewards_G))
    return scored


def _update(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    """Clip and apply the gradients of an optimiser's parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {float(norm)}: lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
