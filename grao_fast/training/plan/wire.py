"""Bytes that processes send each other in a step.

In an all-gather or a reduce-scatter of X bytes among n processes, each sends (n - 1) / n X, and in
an all-reduce, which is both, twice that. They form a ring, in which a node sends to the next what a
process does.

With S shards, N replicas, and P trained of all A elements, for each pass over a micro-batch:

    gather          c A forward; c (A less the root, which stays gathered) backward; S processes
    reduction       reduce-scatter of 4 P among S, all-reduce of 4 P / S among N
    KL              c A, forward, once a step
    sampling        c A, once a step, for Transformers, or tensor by tensor for vLLM
    rollout         tokens, log-probs and texts of all samples, all-gathered; texts if stored

Gradients are reduced once an update where memory allows (`reduces_once`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from grao_fast.training.plan.memory import Memory
from grao_fast.training.plan.size import ModelSize
from grao_fast.training.plan.work import Layout, Workload

_TOKEN_BYTES = 18  # of a sampled token in a pickle: 5 of its id, 9 of its log-prob, 4 of its text
_TEXT_BYTES = 4  # of a stored token, of which all processes read the others


@dataclass(frozen=True)
class Traffic:
    """Bytes that a process sends, and that a node sends to others."""

    process: float = 0.0
    node: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.process + other.process, self.node + other.node)

    def times(self, count: int) -> Traffic:
        return Traffic(count * self.process, count * self.node)


@dataclass(frozen=True)
class Wire:
    """The traffic of a step, by what is sent."""

    gather_forward: Traffic
    gather_backward: Traffic
    reduction: Traffic
    reference: Traffic
    sampling: Traffic
    rollout: Traffic

    @property
    def total(self) -> Traffic:
        return sum((getattr(self, each.name) for each in fields(self)), start=Traffic())


def wire(size: ModelSize, layout: Layout, work: Workload, memory: Memory) -> Wire:
    """Return the traffic of a step of a layout."""
    c, passes = work.compute_bytes, memory.micro_batches
    whole = _gather(c * size.model.all, layout)
    backward = _gather(c * (size.model.all - size.root.all), layout)
    reductions = 1 if memory.reduced_once else passes
    tokens = work.prompts * work.samples * work.completion
    token_bytes = _TOKEN_BYTES if work.samples_drawn else _TEXT_BYTES
    return Wire(
        gather_forward=whole.times(passes * work.updates),
        gather_backward=backward.times(passes * work.updates),
        reduction=_reduction(4 * size.model.trained, layout).times(reductions * work.updates),
        reference=whole.times(passes) if work.kl else Traffic(),
        sampling=whole if work.samples_drawn else Traffic(),
        rollout=_ring(token_bytes * tokens, layout.processes, crossing=layout.nodes > 1),
    )


def _ring(whole: float, processes: int, *, crossing: bool) -> Traffic:
    """An all-gather or a reduce-scatter."""
    sent = whole * (processes - 1) / processes
    return Traffic(sent, sent if crossing else 0.0)


def _gather(whole: float, layout: Layout) -> Traffic:
    return _ring(whole, layout.shards, crossing=layout.shards > layout.per_node)


def _reduction(whole: float, layout: Layout) -> Traffic:
    """A reduce-scatter among shards, and an all-reduce of each shard among replicas."""
    crossing = layout.nodes > 1
    among_replicas = _ring(whole / layout.shards, layout.replicas, crossing=crossing).times(2)
    rings = min(layout.shards, layout.per_node)  # of a node, one for each of its shards
    all_reduce = Traffic(among_replicas.process, among_replicas.node * rings)
    return _gather(whole, layout) + all_reduce
