"""Counts the bytes of every collective that FSDP2 starts, in processes on a CPU."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from grao_fast.distributed.world import World
from grao_fast.models.sharding import gathered, mesh_of, reshard, shard, synchronise_gradients


class Collectives(TorchDispatchMode):
    """The whole tensors of collectives, in bytes by name; those of integers are not counted.

    Integers are what a `World` exchanges: counts, and objects as bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        if operator.namespace == "c10d":
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            sizes = [t.numel() * t.element_size() for t in tensors if t.is_floating_point()]
            if sizes:
                self.bytes[operator._opname] += max(sizes)
        return operator(*args, **(kwargs or {}))


def count_traffic(world: World, folder: Path, sharding: str, *, once: bool) -> None:
    """Count the collectives of two micro-batches, and of gathering to sample; rank 0 writes them.

    folder: of the model's config, and for counts.json.
    once: whether gradients are reduced in the second micro-batch only.
    """
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.gradient_checkpointing_enable()
    shard(model, mesh_of(world, "cpu", sharding), compute_dtype=torch.bfloat16)
    tokens_BL = torch.arange(8)[None]
    with Collectives() as update:
        for last in (False, True):
            synchronise_gradients(model, last or not once)
            model(input_ids=tokens_BL, use_cache=False).logits.float().sum().backward()
    reshard(model)
    with Collectives() as sampling, torch.no_grad(), gathered(model):
        model.eval()(input_ids=tokens_BL)
    if world.is_main:
        counts = {"update": update.bytes, "sampling": sampling.bytes}
        (folder / "counts.json").write_text(json.dumps(counts))
    dist.destroy_process_group()
