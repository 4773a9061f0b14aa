"""The arithmetic of a run on some processes, from a model's config: memory, wire, bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from grao_fast.config import GRAOConfig
from grao_fast.distributed.choice import Sharding, choose_sharding
from grao_fast.system.errors import UserError
from grao_fast.training.plan.memory import Memory, memory
from grao_fast.training.plan.phases import Phase, Rates, phases
from grao_fast.training.plan.size import ModelSize, skeleton
from grao_fast.training.plan.wire import Wire, wire
from grao_fast.training.plan.work import Layout, Workload, layouts

__all__ = ["Cluster", "Plan", "Rates", "plan", "skeleton"]

_GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """The processes of a run, each with a device of its own.

    device_memory: bytes.
    """

    processes: int
    per_node: int
    device_memory: float
    rates: Rates


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run.

    auto: the sharding for which "auto" stands; chosen: the one that phases and notes are of.
    notes: what does not fit, or has no work, in sentences.
    """

    size: ModelSize
    work: Workload
    layouts: Mapping[Sharding, Layout]
    memory: Mapping[Sharding, Memory]
    wire: Mapping[Sharding, Wire]
    auto: Sharding
    chosen: Sharding
    phases: list[Phase]
    notes: list[str]


def plan(model: nn.Module, config: GRAOConfig, cluster: Cluster) -> Plan:
    """Plan a run of a model, which may be on the meta device.

    Raises:
        UserError: the processes cannot be arranged so.
    """
    if config.cpu_offload and cluster.processes == 1:
        raise UserError("cpu_offload=True needs several processes: raise processes")
    work = Workload.of(config)
    arranged = layouts(cluster.processes, cluster.per_node, config.replicas)
    size = ModelSize.of(model, recompute=work.recompute)
    kept = 4 * size.model.trained if work.kl else 0
    auto = choose_sharding(
        size.model.trained,
        work.compute_bytes * size.model.frozen + kept,
        device_memory=int(cluster.device_memory),
        processes=cluster.processes,
        processes_per_node=min(cluster.per_node, cluster.processes),
    )
    chosen = auto if config.sharding == "auto" else config.sharding
    if chosen not in arranged:
        raise UserError(
            f"sharding={chosen!r} is impossible with processes={cluster.processes} in nodes of "
            f"{cluster.per_node} and replicas={config.replicas}: 'full' needs several processes, "
            "and 'hybrid' several replicas, by default one a node, of several processes each"
        )
    sizes: dict[Sharding, Memory] = {
        each: memory(size, layout, work, cluster.device_memory) for each, layout in arranged.items()
    }
    sent: dict[Sharding, Wire] = {
        each: wire(size, layout, work, sizes[each]) for each, layout in arranged.items()
    }
    layout = arranged[chosen]
    return Plan(
        size=size,
        work=work,
        layouts=arranged,
        memory=sizes,
        wire=sent,
        auto=auto,
        chosen=chosen,
        phases=phases(size, layout, work, sizes[chosen], sent[chosen], cluster.rates),
        notes=_notes(size, work, cluster, sizes[chosen]),
    )


def _notes(size: ModelSize, work: Workload, cluster: Cluster, memory: Memory) -> list[str]:
    notes = []
    whole = work.compute_bytes * size.model.all
    if not memory.fits:
        notes.append(
            "An update of one prompt does not fit: use more processes, shorter sequences, fewer "
            "samples, or train an adapter."
        )
    if work.decodes and memory.rollout > cluster.device_memory:
        notes.append(
            f"Sampling with Transformers does not fit, since each process gathers the whole model, "
            f"{whole / _GIB:.1f} GiB: sample with vLLM (use_vllm)."
        )
    if work.vllm == "colocate" and whole > memory.engine:
        notes.append(
            f"The model takes {whole / _GIB:.1f} GiB of a colocated engine, which has "
            f"{memory.engine / _GIB:.1f}: raise vllm_gpu_memory_utilization, or use a server."
        )
    if memory.on_cpu:
        notes.append(
            "AdamW runs on the CPU (cpu_offload): its seconds, and those of copies between the "
            "CPU's memory and the device's, are not counted."
        )
    if idle := max(0, cluster.processes - work.prompts):
        notes.append(
            f"{idle} processes have no prompt to learn from: raise prompts_per_step to "
            f"{cluster.processes} or more."
        )
    return notes
