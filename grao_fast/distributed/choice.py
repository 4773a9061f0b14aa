"""Decides how a model is divided among processes, by arithmetic alone."""

from __future__ import annotations

from typing import Literal

Sharding = Literal["none", "full", "hybrid"]

# float32: the parameter, its gradient, and AdamW's two moments
STATE_BYTES = 4 + 4 + 8
# of a device's memory, for the state of training; the rest is for activations, logits and sampling
STATE_SHARE = 0.5
# of a device's memory, for gradients that are kept whole from micro-batch to micro-batch
WHOLE_GRADIENTS_SHARE = 0.1


def choose_sharding(
    trained: int,
    frozen_bytes: int,
    *,
    device_memory: int,
    processes: int,
    processes_per_node: int,
) -> Sharding:
    """Return the sharding of a run for which `sharding="auto"` stands.

    "none" where the state of training fits STATE_SHARE of a device's memory; else "hybrid", shards
    within a node and replicas across nodes, where a node's share of the state does; else "full".
    Communication within a node is the faster, so weights are gathered across nodes only where they
    have to be. A single process has nothing to share, and gets "none".

    Args:
        trained: the number of trained parameters, each with STATE_BYTES of state.
        frozen_bytes: of everything else that lasts, such as an adapter's base model or the
            policy that the KL term measures from.
        device_memory: bytes of one process's device.
        processes: in all nodes.
        processes_per_node: of each node; "hybrid" needs as many in all.
    """
    state = STATE_BYTES * trained + frozen_bytes
    room = STATE_SHARE * device_memory
    if processes == 1 or state <= room:
        return "none"
    nodes, uneven = divmod(processes, processes_per_node)
    if nodes > 1 and not uneven and state <= room * processes_per_node:
        return "hybrid"
    return "full"


def reduces_once(sharding: Sharding, trained: int, *, device_memory: int) -> bool:
    """Whether gradients are reduced once an update, not in each of its micro-batches.

    Until then each process keeps its sum of gradients whole, in float32. Without sharding it does
    so anyway; else WHOLE_GRADIENTS_SHARE of a device's memory has to hold them.
    """
    return sharding == "none" or 4 * trained <= WHOLE_GRADIENTS_SHARE * device_memory
