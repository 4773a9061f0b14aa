"""The values that options may have, alone and beside each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from grao_fast.config.views import (
    AttentionBackend,
    CacheImplementation,
    ReferenceAdvantage,
    RewardType,
    SamplerChoice,
    Scheduler,
    ShardingOption,
    Statistics,
    VLLMMode,
)
from grao_fast.system.errors import UserError

if TYPE_CHECKING:
    from grao_fast.objectives import Objective

CHOICES = {
    "statistics": get_args(Statistics),
    "reference_advantage": get_args(ReferenceAdvantage),
    "reward_type": get_args(RewardType),
    "sampler": get_args(SamplerChoice),
    "lr_scheduler_type": get_args(Scheduler),
    "cache_implementation": get_args(CacheImplementation),
    "attention_backend": get_args(AttentionBackend),
    "vllm_mode": get_args(VLLMMode),
    "sharding": get_args(ShardingOption),
}

AT_LEAST: dict[str, float] = {
    "temperature": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "seed": 0,
    "num_generations": 1,
    "beta": 0,
    "lam": 0,
    "kl_coef": 0,
    "reward_timeout": 0,
    "num_iterations": 1,
    "epsilon": 0,
    "epsilon_high": 0,
    "vllm_gpu_memory_utilization": 0,
    "vllm_tensor_parallel_size": 1,
    "vllm_max_model_length": 1,
    "vllm_importance_sampling_clip_max": 0,
    "async_rollouts": 0,
    "max_new_tokens": 1,
    "max_prompt_length": 1,
    "max_reference_length": 1,
    "generation_batch_size": 1,
    "prompts_per_step": 1,
    "dynamic_sampling": 0,
    "max_tokens_per_microbatch": 1,
    "memory_budget_mib": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0,
    "workspace_mib": 1,
    "replicas": 1,
    "ddp_timeout": 0,
    "heartbeat_timeout": 0,
    "eval_steps": 1,
    "num_generations_eval": 1,
    "logging_steps": 1,
    "log_completions_steps": 0,
    "save_steps": 0,
    "save_total_limit": 1,
}


_WITH_VLLM = {"use_vllm": True}
_WITH_SERVER = {"use_vllm": True, "vllm_mode": "server"}
_WITH_ENGINE = {"use_vllm": True, "vllm_mode": "colocate"}

# Options that have an effect only if other options have these values.
_NEEDS: dict[str, dict[str, Any]] = {
    "cache_implementation": {"use_vllm": False},
    "replicas": {"sharding": "hybrid"},
    "memory_budget_mib": {"max_tokens_per_microbatch": None},
    "vllm_mode": _WITH_VLLM,
    "vllm_sync_dir": _WITH_VLLM,
    "vllm_importance_sampling_clip_max": _WITH_VLLM,
    "vllm_server_base_url": _WITH_SERVER,
    "vllm_server_model": _WITH_SERVER,
    "vllm_server_api_key_env": _WITH_SERVER,
    "async_rollouts": _WITH_SERVER,
    "vllm_gpu_memory_utilization": _WITH_ENGINE,
    "vllm_tensor_parallel_size": _WITH_ENGINE,
    "vllm_max_model_length": _WITH_ENGINE,
}

# Options of samples in training.
_OF_SAMPLES = (
    "num_generations",
    "kl_coef",
    "dynamic_sampling",
    "curriculum",
    "async_rollouts",
    "sampler",
    "log_completions",
    "log_completions_steps",
)

# Options that replace groups from which nothing is learned, or let their prompts rest.
_OF_DEAD_GROUPS = ("dynamic_sampling", "curriculum")

# Options of samples that training draws itself; those of evaluations' samples are checked with the
# eval_dataset.
_OF_DRAWN_SAMPLES = ("async_rollouts", "dynamic_sampling", "curriculum")


def check_effect(config: Any) -> None:
    """Raise UserError for options that would have no effect."""
    default = type(config)
    if config.sampler == "dataset":
        _check_stored(config)
    for name, needed in _NEEDS.items():
        value = getattr(config, name)
        if name == "vllm_importance_sampling_clip_max" and config.sampler == "dataset":
            continue  # it caps the weights of stored log-probs
        for other, wanted in needed.items():
            if value != getattr(default, name) and getattr(config, other) != wanted:
                raise UserError(f"{name}={value!r} has no effect without {other}={wanted!r}")
    if config.log_completions and not config.log_completions_steps:
        raise UserError("log_completions=True has no effect without log_completions_steps")
    if config.async_rollouts and config.vllm_importance_sampling_clip_max is None:
        raise UserError(
            f"async_rollouts={config.async_rollouts} learns from samples of earlier weights, which "
            "importance weights correct: set vllm_importance_sampling_clip_max, 3.0 by default"
        )
    for name in ("dynamic_sampling", "curriculum"):
        if getattr(config, name) and config.async_rollouts:
            raise UserError(
                f"{name}={getattr(config, name)!r} chooses prompts by the rewards of the step "
                f"before, which async_rollouts={config.async_rollouts} does not wait for: set one "
                "of the two"
            )


def _check_stored(config: Any) -> None:
    """Raise UserError for options that have no effect on stored completions."""
    for option in _OF_DRAWN_SAMPLES:
        value = getattr(config, option)
        if value != getattr(type(config), option):
            raise UserError(
                f'{option}={value!r} has no effect with sampler="dataset", whose completions and '
                "rewards are stored: leave it out"
            )


def check_objective(config: Any) -> None:
    """Raise UserError for options that the objective does not have, or that it makes useless."""
    from grao_fast.objectives import split_objective

    name, own = split_objective(config.objective)
    _check_own(config, name, own)
    _check_samples(config, name)
    _check_bounds(config, own)
    _check_two_passes(config, name)


def _check_own(config: Any, name: str, own: Mapping[str, Any]) -> None:
    """GRAO's options are fields of the configuration, and other objectives' are not."""
    from grao_fast.objectives.grao import GRAO

    formula = config.objective_options.formula
    if isinstance(formula, GRAO):
        for option, value in own.items():
            raise UserError(
                f"objective={config.objective!r}: GRAO's options are those of the configuration: "
                f'set objective="grao" and {option}={value!r}'
            )
        return
    for field in dataclasses.fields(GRAO):
        value = getattr(config, field.name)
        if value != getattr(type(config), field.name):
            raise UserError(
                f"{field.name}={value!r} has no effect without objective='grao'"
                + _own_option(name, formula, field.name, value)
            )


def _check_samples(config: Any, name: str) -> None:
    """Options of samples, and of dead groups, need an objective that has these."""
    formula = config.objective_options.formula
    for option in _OF_SAMPLES if not formula.needs_samples else ():
        value, default = getattr(config, option), getattr(type(config), option)
        if value and value != default:  # 0 asks for nothing
            raise UserError(
                f"{option}={value!r} has no effect with objective={name!r}, which samples "
                f"nothing in training: leave it out, or set it to the default, {default!r}"
            )
    for option in _OF_DEAD_GROUPS if not formula.has_dead_groups else ():
        if getattr(config, option):
            raise UserError(
                f"{option}={getattr(config, option)!r} has no effect with objective="
                f"{config.objective!r}, which learns from all groups of equal rewards too: leave "
                "it out, or take an objective that does not, such as grpo"
            )


def _check_bounds(config: Any, own: Mapping[str, Any]) -> None:
    """Bounds of a ratio need an objective that clips it, and updates in which it is not 1.

    An objective's own bounds may be given where they have no effect.
    """
    formula = config.objective_options.formula
    given = {name: getattr(config, name) for name in ("epsilon", "epsilon_high")}
    given = {name: value for name, value in given.items() if value is not None}
    if given and (formula.clip is None or formula.two_passes):
        raise UserError(
            f"epsilon and epsilon_high have no effect with objective={config.objective!r}, which "
            "clips no ratio of tokens: leave them out"
        )
    if config.objective_options.clip == formula.clip:
        given = {}
    for name in formula.clip_options:
        if name in own and own[name] != getattr(type(formula), name):
            given[name] = own[name]
    if given and config.num_iterations == 1:
        named = " and ".join(f"{name}={value!r}" for name, value in given.items())
        have, them = ("has", "it") if len(given) == 1 else ("have", "them")
        raise UserError(
            f"{named} {have} no effect with num_iterations=1, where every ratio is 1: set "
            f"num_iterations above 1, or leave {them} out"
        )


def _check_two_passes(config: Any, name: str) -> None:
    """Importance weights need an objective of one pass."""
    option = "vllm_importance_sampling_clip_max"
    cap = getattr(config, option)
    if not config.objective_options.formula.two_passes:
        return
    if config.async_rollouts:
        raise UserError(
            f"objective={name!r} has no importance weights, which async_rollouts="
            f"{config.async_rollouts} needs for samples of earlier weights: set async_rollouts=0"
        )
    if cap != getattr(type(config), option):
        raise UserError(
            f"{option}={cap} has no effect with objective={name!r}, whose tokens have no "
            "importance weight: leave it out"
        )


def _own_option(name: str, formula: Objective, option: str, value: Any) -> str:
    """Where the objective has an option of the same name, how to set it."""
    if not any(field.name == option for field in dataclasses.fields(formula)):
        return ": leave it out"
    return f'; the option of {name} is set by objective="{name}({option}={value!r})"'


def check_at_least(name: str, value: Any, minimum: float) -> None:
    for each in every(value):
        if each is not None and (not math.isfinite(each) or each < minimum):
            raise UserError(f"{name} must be at least {minimum}, got {each}")


def every(value: Any) -> tuple[Any, ...]:
    """The values of an option that takes one or several."""
    return value if isinstance(value, tuple) else (value,)
