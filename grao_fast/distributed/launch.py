"""Joining the processes that torchrun, srun or accelerate has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from grao_fast.distributed import launcher
from grao_fast.distributed.links import Links
from grao_fast.distributed.watch import ProcessDied, end_together
from grao_fast.distributed.world import World
from grao_fast.system import interruption
from grao_fast.system.errors import UserError, one_line
from grao_fast.system.visible import get_logger, quiet

logger = get_logger(__name__)

_stores: list[Store] = []  # of the launch, by which its processes find each other
_joins = count(1)
_TO_REFUSE = 60.0  # seconds


def processes() -> int:
    """The number of processes that the launcher has started; 1 without one."""
    if dist.is_initialized():
        return dist.get_world_size()
    return launcher.size()


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
    if device_type == "cuda":
        torch.cuda.set_device(launcher.local_rank())
    with ExitStack() as stack:
        with _told_of_the_start():
            if started:
                _join(device_type, waits)
            world = _world(waits)
            links = stack.enter_context(Links(world, heartbeat_timeout=heartbeat_timeout))
        # inside of the links, as it may hang after a failure
        stack.callback(_leave, None if started else world.group)
        if started:
            stack.enter_context(world.closing)
        stack.enter_context(quiet(unless=world.is_main))
        interruption.show(world.is_main)
        stack.enter_context(end_together(world, links))
        yield world


@contextmanager
def _told_of_the_start() -> Iterator[None]:
    """Raise errors of exchanges as ones that say that the run has not begun."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessDied(
            f"rank {launcher.rank()} of {processes()} has not found the others, or has lost one, "
            f"before the run began (ddp_timeout): {one_line(error)}"
        ) from None


def _world(timeout: timedelta) -> World:
    """The `World` of a process group, with a group of its own for objects and small numbers."""
    return World(
        dist.get_rank(),
        dist.get_world_size(),
        local_rank=launcher.local_rank(),
        local_size=launcher.local_size() or dist.get_world_size(),
        group=dist.new_group(backend="gloo", timeout=timeout),
    )


def refuse_together(message: str) -> NoReturn:
    """Raise UserError in one of the processes, which all refuse to begin; PeerFailed in others."""

    def refuse() -> NoReturn:
        raise UserError(message)

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    with launched(device_type, timeout=_TO_REFUSE, heartbeat_timeout=_TO_REFUSE) as world:
        world.each(refuse)
    raise AssertionError("unreachable: `refuse` raises")


def _leave(group: dist.ProcessGroup | None) -> None:
    if dist.is_initialized():  # a library may have left the default group itself
        dist.destroy_process_group(group)


def _join(device_type: str, timeout: timedelta) -> None:
    if name := launcher.missing():
        raise UserError(
            f"WORLD_SIZE is {processes()} and {name} is not set: start the processes with "
            "torchrun, or with srun and MASTER_ADDR and MASTER_PORT of the first node"
        )
    rank, size = launcher.rank(), processes()
    if not _stores:
        # kept, as one store cannot be opened twice: a launch may train several times
        _stores.append(next(rendezvous("env://", rank, size, timeout=timeout))[0])
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
        store=PrefixStore(f"grao-fast/{next(_joins)}", _stores[0]),
        timeout=timeout,
        rank=rank,
        world_size=size,
    )
