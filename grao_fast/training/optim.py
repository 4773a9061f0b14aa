"""The optimiser and its checkpoints, and the length and learning rate of its schedule."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from grao_fast.config import OptimisationOptions
from grao_fast.distributed.tensors import load_tensors, saved_shapes
from grao_fast.distributed.world import World
from grao_fast.system.errors import UserError


def count_steps(optimisation: OptimisationOptions, *, prompts: float, prompts_per_step: int) -> int:
    """The steps of a run: `max_steps`, or those of `num_train_epochs`, at least one."""
    if optimisation.max_steps > 0:
        return optimisation.max_steps
    return max(1, math.ceil(optimisation.num_train_epochs * prompts / prompts_per_step))


def adamw(model: nn.Module, optimisation: OptimisationOptions) -> Optimizer:
    """AdamW over the trainable parameters, with weight decay on matrices only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("the model has no trainable parameter; unfreeze it or pass peft_config")
    dtype = next((p.dtype for p in trainable if p.dtype != torch.float32), None)
    if dtype is not None:
        raise UserError(
            f"trainable parameters are {dtype}, in which steps of {optimisation.learning_rate:g} "
            "are lost to rounding: load the model with dtype=torch.float32 (on CUDA, passes "
            "compute in bfloat16 all the same)"
        )
    weight_decay = optimisation.weight_decay
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=optimisation.learning_rate,
        betas=(optimisation.adam_beta1, optimisation.adam_beta2),
        eps=optimisation.adam_epsilon,
        # PyTorch's default on CUDA allocates another tensor of each parameter's size in a step.
        fused=True if trainable[0].is_cuda else None,
    )


def lr_schedule(
    optimizer: Optimizer, optimisation: OptimisationOptions, *, total_steps: int
) -> LambdaLR:
    """The learning-rate schedule of a run of `total_steps`."""
    return get_scheduler(
        optimisation.lr_scheduler_type,
        optimizer,
        num_warmup_steps=optimisation.warmup_steps,
        num_training_steps=total_steps,
    )


def moments_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """What the optimiser keeps of every parameter, by name."""
    return {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_moments(model: nn.Module, optimizer: Optimizer, folder: Path, world: World) -> None:
    """Load `moments_of` that were saved by any number of processes; options are the optimiser's.

    `torch.distributed.checkpoint.set_optimizer_state_dict` would take a step to learn what an
    optimiser keeps, and run its hooks.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    kinds: dict[str, dict[str, torch.Size]] = {}
    for saved, shape in saved_shapes(folder, world).items():
        name, _, kind = saved.rpartition(".")
        kinds.setdefault(name, {})[kind] = shape
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        place: {
            kind: torch.zeros_like(p.detach()) if shape == p.shape else torch.zeros(shape)
            for kind, shape in kinds.get(names[p], {}).items()
        }
        for place, p in enumerate(parameters)
    }
    tensors = {
        f"{names[parameters[place]]}.{kind}": tensor
        for place, of_parameter in state.items()
        for kind, tensor in of_parameter.items()
    }
    load_tensors(tensors, folder, world)
    state = {place: of_parameter for place, of_parameter in state.items() if of_parameter}
    # AdamW moves step counts to where its implementation, fused or not, needs them.
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
