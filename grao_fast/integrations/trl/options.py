"""The options of TRL 1.16's GRPOConfig and GRPOTrainer: which work, and which are refused.

Every option that TRL adds to Transformers' TrainingArguments, and every parameter of GRPOTrainer,
is in one list; tests/test_trl_options.py holds TRL and docs/trl.md against them.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from torch import nn
from trl.trainer.grpo_config import GRPOConfig

from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

# Options that work as in GRPOTrainer; tests/test_trl*.py and tests/test_vllm_real_trl.py set each
# in runs on CPUs, where others stand in for the hub and for NCCL.
WORKS = frozenset({
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "num_generations",
    "ds3_gather_for_generation", "num_generations_eval", "max_completion_length",
    "shuffle_dataset", "pad_to_multiple_of", "generation_batch_size", "steps_per_generation",
    "temperature", "top_p", "top_k", "min_p", "generation_kwargs", "chat_template_kwargs",
    "repetition_penalty", "cache_implementation", "beta", "num_iterations", "epsilon",
    "epsilon_high", "reward_weights", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "log_completions", "num_completions_to_print", "log_unique_prompts",
    "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    "reward_processing_classes", "callbacks", "optimizers", "peft_config", "rollout_func",
    "tools", "environment_factory", "max_tool_calling_iterations", "mask_truncated_completions",
    "log_completions_hub_repo", "quantization_config", "use_transformers_continuous_batching",
    "use_transformers_paged", "transformers_continuous_batching_config", "use_vllm",
    "vllm_mode", "vllm_model_impl", "vllm_structured_outputs_regex", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap", "use_bias_correction_kl",
})  # fmt: skip

# An option that no test can run on a CPU.
NEEDS_GPU = {
    "vllm_enable_sleep_mode": "reaches vLLM's engine, which sleeps on GPUs alone",
}

# Options of Transformers and TRL with the only value that GRAO's objective, or this
# implementation, allows.
ONLY = {
    "scale_rewards": "group",
    "multi_objective_aggregation": "sum_then_normalize",
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "delta": None,
    "off_policy_mask_threshold": None,
    "cast_lm_head_to_fp32": False,  # logits are computed in float32 anyway
    "torch_compile": False,
    "remove_unused_columns": False,  # the reference is a column
}

# Options that are refused by a check of their own.
REFUSED = {
    "loss_type": 'other than "grpo", or TRL\'s default, "dapo", which is read as "grpo"',
    "router_aux_loss_coef": "other than 0 for a mixture of experts",
}

# Options that belong to what is refused, or to no loss at all; a value of one's own is named.
MEANINGLESS = {
    **dict.fromkeys(
        ("sapo_temperature_neg", "sapo_temperature_pos"), 'of loss_type="sapo", which is refused'
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        'of loss_type="vespo", which is refused',
    ),
    **dict.fromkeys(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "of use_adaptive_entropy, which is refused",
    ),
    "log_multimodal": "of images, and models are of text",
}


def check_options(args: GRPOConfig, options: dict[str, Any]) -> None:
    """Raise UserError for options of GRPOTrainer that GRAOTrainer does not support.

    options: GRPOTrainer's keyword arguments.
    """
    _check_loss_type(args.loss_type)
    for name, only in ONLY.items():
        value = getattr(args, name)
        if value != only:
            raise UserError(f"GRAOTrainer has no {name}={value!r}: set {name}={only!r}")
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args.deepspeed_plugin.deepspeed_config, options.get("optimizers"))
    if args.use_vllm and args.vllm_mode == "colocate" and args.vllm_model_impl == "transformers":
        raise UserError(
            'with vllm_model_impl="transformers" and vllm_mode="colocate", vLLM replaces how '
            "Transformers' class of the model is called, and the policy is of that class: leave "
            'vllm_model_impl out, or set vllm_mode="server"'
        )
    peft_config = options.get("peft_config")
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"{type(peft_config).__name__} prepends virtual tokens, for which GRAOTrainer's rows "
            "leave no room: use a LoRA-like adapter"
        )
    _name_meaningless(args)


def _check_deepspeed(settings: dict[str, Any], optimizers: Any) -> None:
    if any(each is not None for each in optimizers or ()):
        raise UserError(
            "under DeepSpeed, Transformers drops an optimiser that it is given and makes its own: "
            "leave optimizers out, and set optim and learning_rate"
        )
    size = settings.get("tensor_parallel", {}).get("autotp_size", 1)
    if size > 1:
        raise UserError(
            f"DeepSpeed's autotp_size={size} splits each layer over processes, the head too, which "
            "GRAOTrainer's loss needs whole: leave tensor_parallel out, and take ZeRO-3"
        )


def _check_loss_type(loss_type: str) -> None:
    if loss_type == "grpo":
        return
    default = _default("loss_type")
    if loss_type != default:
        raise UserError(
            f"GRAOTrainer has no loss_type={loss_type!r}: its loss is GRAO's; leave loss_type out, "
            "or set loss_type='grpo'"
        )
    logger.warning(
        "loss_type=%r, TRL's default, would give every token the same weight; GRAO's loss gives "
        "every sequence the same weight, by the mean of its log-probs, and is what is computed: "
        "loss_type='grpo' says so and needs no warning",
        default,
    )


def _name_meaningless(args: GRPOConfig) -> None:
    for name, why in MEANINGLESS.items():
        value = getattr(args, name)
        if value != _default(name):
            logger.warning("%s=%r has no effect: it is an option %s", name, value, why)


def _default(name: str) -> Any:
    """TRL's default of a field of GRPOConfig."""
    (found,) = (each for each in fields(GRPOConfig) if each.name == name)
    assert found.default is not MISSING, name
    return found.default


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
