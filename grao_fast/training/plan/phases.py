"""What bounds each phase of a step: matrix products, a device's memory, or the wire.

The seconds are those at the rates that are given, with nothing lost: lower bounds. Communication
may be hidden behind computation, so a phase takes at least the longest of its three times.
"""

from __future__ import annotations

from dataclasses import dataclass

from grao_fast.training.plan.memory import Memory, cache_reads
from grao_fast.training.plan.size import ModelSize
from grao_fast.training.plan.wire import Traffic, Wire
from grao_fast.training.plan.work import Layout, Workload

_ADAMW_BYTES = 28  # an element: parameter, gradient and two moments read; all but one written
_NO_TRAFFIC = Traffic()


@dataclass(frozen=True)
class Rates:
    """Rates of a device and its links.

    flops: operations a second in the dtype of computing.
    memory: bytes a second.
    link: bytes a second that a device sends to others of its node.
    network: bytes a second that it sends to other nodes.
    """

    flops: float
    memory: float
    link: float
    network: float


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase, by what they are spent on."""

    name: str
    products: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.products, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        times = {
            "matrix products": self.products,
            "device memory": self.memory,
            "node links": self.links,
            "network": self.network,
        }
        return max(times, key=times.__getitem__) if self.seconds else "nothing"


def phases(
    size: ModelSize, layout: Layout, work: Workload, memory: Memory, wire: Wire, rates: Rates
) -> list[Phase]:
    """Return the phases of a step in their order, on the process that has the most work."""

    def phase(
        name: str, flops: float = 0.0, reads: float = 0.0, traffic: Traffic = _NO_TRAFFIC
    ) -> Phase:
        across = traffic.node / (layout.per_node * rates.network)
        within = traffic.process / rates.link
        return Phase(name, flops / rates.flops, reads / rates.memory, within, across)

    groups = work.groups(layout.processes)
    cost, group = size.cost, work.group(size)
    found = []
    if work.decodes:
        found.append(
            phase(
                "sampling",
                flops=groups * cost.scores(work.sampled(size)),
                reads=_decoding(size, work, groups),
                traffic=wire.sampling,
            )
        )
    if work.samples:
        found.append(phase("exchange of samples", traffic=wire.rollout))
    if work.kl:
        found.append(phase("KL pass", flops=groups * cost.scores(group), traffic=wire.reference))
    update = wire.gather_forward + wire.gather_backward + wire.reduction
    found.append(
        phase(
            "forward and backward",
            flops=work.updates * groups * cost.updates(group, two_passes=work.two_passes),
            traffic=update,
        )
    )
    moved = work.updates * _ADAMW_BYTES * size.model.trained / layout.shards
    if not memory.on_cpu:
        found.append(phase("AdamW", reads=moved))
    if work.vllm and work.samples_drawn:
        found.append(phase("weights to vLLM", traffic=wire.sampling))
    return found


def _decoding(size: ModelSize, work: Workload, groups: int) -> float:
    """Bytes that decoding reads: all weights for each token of a batch, and keys and values."""
    batches = -(-groups * work.samples // work.decoded)
    weights = batches * work.completion * work.compute_bytes * size.model.all
    return weights + groups * cache_reads(size, work)
