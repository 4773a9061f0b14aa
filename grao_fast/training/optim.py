"""The optimiser and the length of its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from grao_fast.config import GRAOConfig
from grao_fast.system.errors import UserError


def count_steps(config: GRAOConfig, *, prompts: int, prompts_per_step: int) -> int:
    """Steps of a run: `max_steps`, or those of `num_train_epochs`, at least one."""
    if config.max_steps > 0:
        return config.max_steps
    return max(1, math.ceil(config.num_train_epochs * prompts / prompts_per_step))


def adamw(model: nn.Module, config: GRAOConfig) -> Optimizer:
    """AdamW over what is trainable; matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("the model has no trainable parameter; unfreeze it or pass peft_config")
    dtype = next((p.dtype for p in trainable if p.dtype != torch.float32), None)
    if dtype is not None:
        raise UserError(
            f"trainable parameters are {dtype}, in which steps of {config.learning_rate:g} are "
            "lost to rounding: load the model with dtype=torch.float32 (on CUDA, passes compute in "
            "bfloat16 all the same)"
        )
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        # PyTorch's default on CUDA holds one more tensor of each parameter's size while it steps
        fused=True if trainable[0].is_cuda else None,
    )
