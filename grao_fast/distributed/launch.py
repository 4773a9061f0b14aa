"""Joining the processes that torchrun, srun or accelerate has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from grao_fast.distributed.links import Links
from grao_fast.distributed.watch import end_together
from grao_fast.distributed.world import World
from grao_fast.system import interruption
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger, quiet

logger = get_logger(__name__)

# Set by torchrun and accelerate; SLURM's names, which srun sets, are understood as well.
_NAMES = {
    "WORLD_SIZE": "SLURM_NTASKS",
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
}
_stores: list[dist.Store] = []  # of the launch, by which its processes find each other
_joins = count(1)


def processes() -> int:
    """The number of processes that the launcher has started; 1 without one."""
    if dist.is_initialized():
        return dist.get_world_size()
    return _launched("WORLD_SIZE", 1)


@contextmanager
def launched(device_type: str, *, timeout: float, heartbeat_timeout: float) -> Iterator[World]:
    """The `World` of this process, in which an error or the death of one process ends all.

    Args:
        device_type: "cpu", whose processes exchange by gloo, or "cuda", by NCCL.
        timeout: seconds that a process waits for another in one exchange.
        heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.

    Raises:
        UserError: the launcher's variables are incomplete.
    """
    if processes() == 1:
        yield World()
        return
    waits = timedelta(seconds=timeout)
    started = not dist.is_initialized()
    if started:
        _join(device_type, waits)
    local_rank = _launched("LOCAL_RANK", 0)
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    group = dist.new_group(backend="gloo", timeout=waits)
    world = World(
        dist.get_rank(),
        dist.get_world_size(),
        local_rank=local_rank,
        local_size=_local_size(),
        group=group,
    )
    with ExitStack() as stack:
        links = stack.enter_context(Links(world, heartbeat_timeout=heartbeat_timeout))
        # inside of the links, as it may hang after a failure
        stack.callback(dist.destroy_process_group, None if started else group)
        stack.enter_context(quiet(unless=world.is_main))
        interruption.show(world.is_main)
        stack.enter_context(end_together(world, links))
        yield world


def _join(device_type: str, timeout: timedelta) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ and _NAMES.get(name, name) not in os.environ:
            raise UserError(
                f"WORLD_SIZE is {processes()} and {name} is not set: start the processes with "
                "torchrun, or with srun and MASTER_ADDR and MASTER_PORT of the first node"
            )
    rank, size = _launched("RANK", 0), processes()
    if not _stores:
        # kept, as one store cannot be opened twice: a launch may train several times
        _stores.append(next(dist.rendezvous("env://", rank, size, timeout=timeout))[0])
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"grao-fast/{next(_joins)}", _stores[0]),
        timeout=timeout,
        rank=rank,
        world_size=size,
    )


def _launched(name: str, default: int) -> int:
    """A launcher's variable. SLURM's count only where a job step asks for several tasks."""
    for variable in (name, _NAMES[name]):
        value = os.environ.get(variable)
        if value is not None and ("SLURM" not in variable or "SLURM_STEP_ID" in os.environ):
            return int(value)
    return default


def _local_size() -> int:
    value = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    return int(value) if value else dist.get_world_size()
