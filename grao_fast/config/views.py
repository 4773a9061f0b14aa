"""Views of a configuration, one for each part of the program, and the values of its choices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from grao_fast.objectives import Objective  # imports torch, which errors of options need not

Statistics = Literal["group", "samples"]
ReferenceAdvantage = Literal["signed", "clip", "floor", "tapered"]
RewardType = Literal["pointwise", "pairwise"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
CacheImplementation = Literal["dynamic", "static"]
AttentionBackend = Literal["auto", "sdpa", "flex", "varlen", "flash_attention_2"]
SamplerChoice = Literal["policy", "dataset"]
VLLMMode = Literal["server", "colocate"]
ShardingOption = Literal["auto", "none", "full", "hybrid"]


@dataclass(frozen=True)
class ObjectiveOptions:
    """`GRAOConfig.objective_options`: options of the loss; see `GRAOConfig`, which explains them.

    formula: the objective that `GRAOConfig.objective` names.
    clip: (low, high), ratios are clipped to [1 - low, 1 + high]; None: the formula has no ratio.
    sampler_cap: cap of the importance weights; None where samples count as the policy's own.
    """

    formula: Objective
    reward_type: RewardType
    temperature: float
    max_new_tokens: int
    kl_coef: float
    clip: tuple[float, float] | None
    sampler_cap: float | None

    @property
    def needs_beginning(self) -> bool:
        """Whether the policy that training began with is kept, and scores every step."""
        return self.kl_coef > 0 or self.formula.needs_initial


@dataclass(frozen=True)
class SamplingOptions:
    """`GRAOConfig.sampling`: samples of a prompt, and lengths; see `GRAOConfig`.

    samples_drawn: whether training samples; False with stored completions, or references alone.
    """

    num_generations: int
    num_generations_eval: int | None
    temperature: float
    max_new_tokens: int
    max_prompt_length: int | None
    max_reference_length: int | None
    samples_drawn: bool


@dataclass(frozen=True)
class OptimisationOptions:
    """`GRAOConfig.optimisation`: AdamW, its schedule, the updates of a step; see `GRAOConfig`."""

    num_iterations: int
    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    lr_scheduler_type: Scheduler
    warmup_steps: int
    max_grad_norm: float
    num_train_epochs: float
    max_steps: int
    workspace_mib: int | None


def same_named(config: object, view: type) -> dict[str, Any]:
    """The fields of a view that the config has under the same name."""
    names = (field.name for field in dataclasses.fields(view))
    return {name: getattr(config, name) for name in names if hasattr(config, name)}
