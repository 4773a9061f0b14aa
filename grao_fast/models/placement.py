"""Where a model computes, in which dtype, and how it is divided among processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from grao_fast.config import GRAOConfig
from grao_fast.config.views import ShardingOption
from grao_fast.distributed.choice import choose_sharding, reduces_once
from grao_fast.distributed.launch import launched
from grao_fast.distributed.world import World
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import device_memory, local, mesh_of, shard, sharding_of
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


def world_of(config: GRAOConfig) -> AbstractContextManager[World]:
    """A context with the processes of a run; see `grao_fast.distributed.launch.launched`."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return launched(
        "cuda" if on_gpu else "cpu",
        timeout=config.ddp_timeout,
        heartbeat_timeout=config.heartbeat_timeout,
    )


@dataclass(frozen=True)
class Placement:
    """The devices of a run and the division of its model.

    device: of this process.
    compute_dtype: bfloat16, or None for the parameters' own.
    sharding, replicas, cpu_offload: see `GRAOConfig`.
    keeps_copy: whether the trained parameters are kept as they began, for the KL term.
    trains: whether parameters that require gradients have gradients and moments.
    """

    world: World
    device: torch.device
    compute_dtype: torch.dtype | None
    sharding: ShardingOption
    replicas: int | None
    cpu_offload: bool
    keeps_copy: bool
    trains: bool = True

    @classmethod
    def of(cls, config: GRAOConfig, world: World, *, trains: bool = True) -> Placement:
        """The placement that a configuration asks for.

        Raises:
            UserError: there is no such device, or it cannot be that of several processes.
        """
        device = _device(config.device, world)
        bf16 = config.bf16
        if bf16 is None:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if config.cpu_offload and device.type == "cpu":
            raise UserError("cpu_offload=True moves shards off a GPU, and this run is on a CPU")
        if config.cpu_offload and world.size == 1:
            raise UserError("cpu_offload=True needs several processes: start them with torchrun")
        return cls(
            world=world,
            device=device,
            compute_dtype=torch.bfloat16 if bf16 else None,
            sharding=config.sharding,
            replicas=config.replicas,
            cpu_offload=config.cpu_offload,
            keeps_copy=config.objective_options.needs_beginning,
            trains=trains,
        )

    @classmethod
    def beside(cls, policy: Policy) -> Placement:
        """The placement of a frozen model that is divided as a policy is."""
        sharding, replicas = sharding_of(policy.causal_lm)
        return cls(
            world=policy.world,
            device=policy.device,
            compute_dtype=None,
            sharding=sharding,
            replicas=replicas,
            cpu_offload=False,
            keeps_copy=False,
            trains=False,
        )

    def shard(self, model: nn.Module, causal_lm: PreTrainedModel) -> bool:
        """Divide the model among the processes; returns whether gradients are summed once a step.

        model: as it is trained, an adapter included; causal_lm: the Transformers model inside.
        """
        if self.world.size == 1:
            return False
        parameters = list(model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad and self.trains)
        total = sum(p.numel() * p.element_size() for p in parameters)
        frozen = total - 4 * trained
        memory = device_memory(self.device, self.world)
        sharding = self.sharding
        if sharding == "auto":
            sharding = choose_sharding(
                trained,
                frozen + (4 * trained if self.keeps_copy else 0),
                device_memory=memory,
                processes=self.world.size,
                processes_per_node=self.world.local_size,
            )
        mesh = mesh_of(self.world, self.device.type, sharding, replicas=self.replicas)
        shard(causal_lm, mesh, compute_dtype=self.compute_dtype, cpu_offload=self.cpu_offload)
        defers = reduces_once(sharding, trained, device_memory=memory)
        logger.info(
            "%d processes, sharding %s over a mesh of %s: %.1f GiB of parameters in each; "
            "gradients are summed %s",
            self.world.size,
            sharding,
            " x ".join(map(str, mesh.shape)) if mesh else 1,
            sum(local(p).numel() * p.element_size() for p in model.parameters()) / 2**30,
            "once a step" if defers else "after every micro-batch",
        )
        return defers


def _device(name: str | None, world: World) -> torch.device:
    if world.size > 1 and name is not None and ":" in name:
        raise UserError(
            f"device={name!r} would put all {world.size} processes on one GPU: leave it out, or "
            'set "cuda" or "cpu"'
        )
    if world.size > 1 and name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", world.local_rank)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name!r} but no CUDA device is available")
    return device
