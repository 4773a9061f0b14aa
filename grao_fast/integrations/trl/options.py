"""The options of GRPOTrainer that GRAOTrainer refuses, each with its remedy."""

from __future__ import annotations

from typing import Any

from torch import nn
from trl.trainer.grpo_config import GRPOConfig

from grao_fast.system.errors import UserError

# Fields of GRPOConfig with the only value that GRAO's objective, or this implementation, allows.
_ONLY = {
    "loss_type": "grpo",  # a sequence enters by its mean log-prob
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "mask_truncated_completions": False,  # y would be weighed against samples that are left out
    "cast_lm_head_to_fp32": False,  # logits are computed in float32 anyway
    "torch_compile": False,
    "remove_unused_columns": False,  # the reference is a column
}


def check_options(args: GRPOConfig | None, options: dict[str, Any]) -> None:
    """Raise UserError for options of GRPOTrainer that GRAOTrainer does not support.

    options: GRPOTrainer's keyword arguments.
    """
    if args is None:
        raise UserError('GRAOTrainer needs args=GRPOConfig(..., loss_type="grpo")')
    for name, only in _ONLY.items():
        value = getattr(args, name)
        if value != only:
            raise UserError(f"GRAOTrainer has no {name}={value!r}: set {name}={only!r}")
    if args.beta != 0.0 and args.use_bias_correction_kl:
        raise UserError(
            f"beta={args.beta} asks for a KL term, and use_bias_correction_kl=True (TRL's default) "
            "to multiply it by the ratio, which GRAOTrainer does not: set "
            "use_bias_correction_kl=False"
        )
    if args.deepspeed_plugin is not None:
        raise UserError("GRAOTrainer does not run under DeepSpeed: launch with DDP or FSDP")
    for name in ("tools", "environment_factory"):
        if options.get(name):
            raise UserError(f"GRAOTrainer has no {name}: leave it out")
    peft_config = options.get("peft_config")
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"{type(peft_config).__name__} prepends virtual tokens, for which GRAOTrainer's rows "
            "leave no room: use a LoRA-like adapter"
        )


def check_kl_policy(model: str | nn.Module, args: GRPOConfig, options: dict[str, Any]) -> None:
    """Raise UserError if TRL could not load the reference policy of its KL term."""
    if args.beta == 0.0 or isinstance(model, str) or options.get("peft_config") is not None:
        return
    if not hasattr(model, "peft_config") and not getattr(model.config, "_name_or_path", ""):
        raise UserError(
            f"beta={args.beta} holds the policy to the model that it began as, which TRL loads "
            "again by model.config._name_or_path, and that is empty: save the model and pass its "
            "folder, or set beta=0.0"
        )
