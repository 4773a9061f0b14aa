"""Processes that hold ours or TRL's side of a step, and take steps when they are told to.

They exchange tensors by gloo, compute with one thread each, and are forked: a process that has
imported everything and computed nothing has to start them. Between steps they sleep.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from measure import _resident_mib, peak_extra_mib, seconds
from processes import free_port
from step_problem import Case, make_model, make_rollout
from step_race import give_back
from step_sides import TRL, Ours
from torch import Tensor
from traffic import Collectives

from grao_fast.config.views import ShardingOption
from grao_fast.distributed.world import World
from grao_fast.models.sharding import local, whole
from grao_fast.training.rollout import Rollout

CPU = torch.device("cpu")
_MIB = 2**20


@dataclass(frozen=True)
class Contender:
    """A side in some processes. TRL's is sharded by accelerate's FSDP2, which is "full".

    A process of ours has one micro-batch. One of TRL's has one for each group: so it is faster in
    bench_step.py, and takes less memory, than with one in all.
    """

    side: str
    sharding: ShardingOption
    processes: int

    @property
    def name(self) -> str:
        return f"{self.side}_{self.sharding}_{self.processes}"

    @property
    def label(self) -> str:
        return "grao-fast" if self.side == "ours" else "TRL GRPOTrainer"

    def micro_batches(self, case: Case) -> int:
        """Those of one process."""
        return 1 if self.side == "ours" else case.prompts // self.processes


class Proof(NamedTuple):
    """What one process tells of its first step, which is not timed.

    gradient: of `small_rollout`, whole; only of rank 0.
    loss: the whole step's of ours; of TRL, that of the process's own sequences.
    collectives: bytes of the whole tensors that are gathered or reduced, by the collective's name.
    held_mib: this process's parts of parameters and moments.
    """

    gradient: list[np.ndarray]
    loss: float
    grad_norm: float
    collectives: Counter[str]
    held_mib: float


class Took(NamedTuple):
    """Seconds of a step in one process, and its peak memory since the process began."""

    seconds: float
    peak_mib: float | None


class Crew:
    """The processes of a contender."""

    def __init__(self, contender: Contender, size: str, case: Case) -> None:
        context = multiprocessing.get_context("fork")
        self.links: list[Connection] = []
        self._processes = []
        port = free_port()
        for rank in range(contender.processes):
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(there, _environment(rank, contender.processes, port)),
                kwargs={"contender": contender, "rank": rank, "size": size, "case": case},
                daemon=True,
            )
            process.start()
            there.close()  # or the death of the process would not be seen
            self.links.append(here)
            self._processes.append(process)

    def do(self, task: Callable[[_Member], Any]) -> list[Any]:
        """Call a function of this module in all processes; returns their results, by rank."""
        for link in self.links:
            link.send(task)
        return [link.recv() for link in self.links]

    def end(self) -> None:
        for link in self.links:
            link.send(None)
        for process in self._processes:
            process.join(10)


@dataclass
class _Member:
    """One process of a crew.

    step: takes a step, with whatever it needs prepared.
    gradient: of `small_rollout`, of which each process has its share.
    start_mib: anonymous resident memory when the process began.
    """

    side: Ours | TRL
    step: Callable[[], int]
    gradient: Callable[[], list[Tensor]]
    rank: int
    start_mib: float | None


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun sets; nothing for a single process, which is started without it."""
    if processes == 1:
        return {}
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_PORT": port,
    }
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in numbers.items()}


def small_rollout(case: Case, vocab: int) -> Rollout:
    return make_rollout(case.replace(prompts=4, prompt_tokens=8, response_tokens=8), vocab)


def prove(member: _Member) -> Proof:
    gradient = [whole(part).numpy() for part in member.gradient()]
    with Collectives() as counted:
        member.step()
    give_back()
    side = member.side
    model, optimizer = (
        (side.policy.model, side.optimizer)
        if isinstance(side, Ours)
        else (side.trainer.model, side.trainer.optimizer)
    )
    held = [*model.parameters()]
    for state in optimizer.state.values():
        held += [value for value in state.values() if value.dim()]
    sizes = [local(tensor.detach()).nbytes for tensor in held]
    gradient = gradient if member.rank == 0 else []
    return Proof(gradient, side.loss, side.grad_norm, counted.bytes, sum(sizes) / _MIB)


def take_step(member: _Member) -> Took:
    took: list[float] = []
    before = _resident()
    extra = peak_extra_mib(lambda: took.append(seconds(member.step, CPU)), CPU)
    give_back()
    if before is None or extra is None or member.start_mib is None:
        return Took(took[0], None)
    return Took(took[0], before + extra - member.start_mib)


def _resident() -> float | None:
    return _resident_mib("RssAnon") if os.path.exists("/proc/self/status") else None


def _work(
    link: Connection,
    environment: dict[str, str],
    *,
    contender: Contender,
    rank: int,
    size: str,
    case: Case,
) -> None:
    """Be a process of a crew, until it is told None."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    random.seed(0)
    start_mib = _resident()
    member = _member(contender, rank, size, case, start_mib)
    give_back()
    while (task := link.recv()) is not None:
        link.send(task(member))
    if dist.is_initialized():
        dist.destroy_process_group()


def _member(
    contender: Contender, rank: int, size: str, case: Case, start_mib: float | None
) -> _Member:
    n = contender.processes
    model, tokenizer = make_model(size, "cpu")
    rollout = make_rollout(case, model.config.vocab_size)
    small = _share(small_rollout(case, model.config.vocab_size), rank, n)
    if contender.side == "ours":
        world = World()
        if n > 1:
            dist.init_process_group("gloo")
            world = World(rank, n, local_rank=rank, local_size=n, group=dist.group.WORLD)
        ours = Ours(model, tokenizer, sharding=contender.sharding, world=world)

        def gradient() -> list[Tensor]:
            # each process's loss is the mean over its own prompts, and gradients are summed
            return [part / n for part in ours.gradient(small)[1]]

        return _Member(ours, lambda: ours.step(rollout), gradient, rank, start_mib)
    trl = TRL(model, tokenizer, K=case.samples + 1, longest=case.longest_response, fsdp2=n > 1)
    parts = trl.load(_share(rollout, rank, n), contender.micro_batches(case))
    return _Member(trl, lambda: trl.step(parts), lambda: trl.gradient(small)[1], rank, start_mib)


def _share(rollout: Rollout, rank: int, processes: int) -> Rollout:
    """Every `processes`-th group, as many as each of the others gets."""
    own = slice(rank, None, processes)
    names = ("prompts", "completions", "texts", "rewards_NK", "advantages_NK")
    return dataclasses.replace(rollout, **{name: getattr(rollout, name)[own] for name in names})
