"""Sharding a model over the processes of a run by FSDP2, layer by layer.

With `sharding="none"` every process holds the whole model and gradients are all-reduced: FSDP2 over
a mesh of (processes, 1), in which nothing is gathered. "full" shards over all processes; "hybrid"
shards within a group of processes and replicates over the groups.

Layers are the model's own `_no_split_modules`; embeddings, final norm and head belong to the root,
so that the loss, which runs in the root's forward pass, has the head's weight whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from grao_fast.distributed.choice import Sharding
from grao_fast.distributed.world import World
from grao_fast.system.errors import UserError


def mesh_of(
    world: World, device_type: str, sharding: str, *, replicas: int | None = None
) -> DeviceMesh | None:
    """The mesh of "none", "full" or "hybrid" sharding; None for a single process.

    replicas: of the model under "hybrid"; None: one for each machine.

    Raises:
        UserError: the replicas do not divide the processes.
    """
    if world.size == 1:
        return None
    if sharding == "full":
        return init_device_mesh(device_type, (world.size,), mesh_dim_names=("shard",))
    count = world.size
    if sharding == "hybrid":
        count = replicas or max(1, world.size // world.local_size)
        if world.size % count:
            raise UserError(
                f"{count} replicas do not divide {world.size} processes: set replicas to a "
                "divisor, or start another number of processes"
            )
    shape = (count, world.size // count)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    causal_lm: PreTrainedModel,
    mesh: DeviceMesh | None,
    *,
    compute_dtype: torch.dtype | None,
    cpu_offload: bool = False,
) -> None:
    """Shard a model in place; its parameters become DTensors. Without a mesh, do nothing.

    Gradients are summed over the processes in float32, not averaged: each process's loss is its
    part of the step's.

    Args:
        compute_dtype: parameters are gathered in this dtype; None: in their own.
        cpu_offload: keep shards, gradients and the optimiser's moments in the CPU's memory.
    """
    if mesh is None:
        return
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype is not None else None,
        cast_forward_inputs=False,  # autocast decides on activations, as in one process
    )
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in (*layers(causal_lm), causal_lm):
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for module in sharded_modules(causal_lm):
        module.set_gradient_divide_factor(1.0)
        if hasattr(module, "set_force_sum_reduction_for_comms"):  # torch 2.9; gloo needs it
            module.set_force_sum_reduction_for_comms(True)


def layers(causal_lm: PreTrainedModel) -> list[nn.Module]:
    """The modules that the model says not to split, in order; none lies within another."""
    names = set(causal_lm._no_split_modules or ())
    found: list[nn.Module] = []
    inside = {id(causal_lm)}
    for module in causal_lm.modules():
        if own_class(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside.update(map(id, module.modules()))
    return found


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was defined; `fully_shard` puts a derived one in its place."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that `shard` has sharded, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def sharding_of(model: nn.Module) -> tuple[Sharding, int | None]:
    """How `shard` has divided a model, and the replicas of "hybrid"."""
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return "none", None
    if mesh.ndim == 1:
        return "full", None
    replicas, shards = mesh.shape
    return ("none", None) if shards == 1 else ("hybrid", replicas)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """A context in which all weights are whole in every process.

    They are gathered once, so each process may run as many forward passes as it likes, alone.
    """
    modules = sharded_modules(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not modules[0], recurse=False)
            module.reshard()


def reshard(model: nn.Module) -> None:
    """Make all parameters shards again: a forward pass alone leaves the root's whole."""
    for module in sharded_modules(model):
        module.reshard()


def synchronise_gradients(model: nn.Module, enabled: bool) -> None:
    """Let backward passes sum gradients over the processes, or keep them until one does."""
    for module in sharded_modules(model)[:1]:
        module.set_requires_gradient_sync(enabled)


def device_memory(device: torch.device, world: World) -> int:
    """Bytes of memory of this process's device; of a CPU, its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; other tensors unchanged. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole of a sharded tensor, by FSDP2 or by DeepSpeed's ZeRO-3."""
    return getattr(tensor, "ds_shape", tensor.shape)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor; into a sharded one this process's part of them."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(values)
        return
    mesh = tensor.device_mesh
    part = distribute_tensor(  # without an exchange: every process has the values
        values.to(mesh.device_type), mesh, tensor.placements, src_data_rank=None
    )
    tensor.to_local().copy_(part.to_local())


def slices_of(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole this process's part of a sharded tensor lies; of other tensors, all."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    return tuple(
        slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
    )
