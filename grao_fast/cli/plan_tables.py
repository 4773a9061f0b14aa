"""Prints the plan of a run as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from grao_fast.config import GRAOConfig
from grao_fast.system.errors import UserError
from grao_fast.system.visible import visible
from grao_fast.training.plan import Cluster, Plan, Rates, plan, skeleton

_GIB = 2**30


def print_plan(
    *,
    model: str,
    config: GRAOConfig,
    peft_config: Any,
    processes: int,
    processes_per_node: int,
    device_memory_gib: float,
    device_tflops: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    network_gb_per_s: float,
) -> None:
    """Print the plan of a run.

    Raises:
        UserError: an option is out of range, or there is no such model.
    """
    for name, value in (
        ("device_memory_gib", device_memory_gib),
        ("device_tflops", device_tflops),
        ("memory_gb_per_s", memory_gb_per_s),
        ("link_gb_per_s", link_gb_per_s),
        ("network_gb_per_s", network_gb_per_s),
    ):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} must be above 0, got {value}")
    rates = Rates(
        flops=1e12 * device_tflops,
        memory=1e9 * memory_gb_per_s,
        link=1e9 * link_gb_per_s,
        network=1e9 * network_gb_per_s,
    )
    cluster = Cluster(processes, processes_per_node, _GIB * device_memory_gib, rates)
    result = plan(skeleton(model, peft_config), config, cluster)
    console = Console(highlight=False, markup=False)
    console.print(_heading(model, result), soft_wrap=True)
    console.print(_memory(result, device_memory_gib))
    if processes > 1:
        console.print(_wire(result))
    console.print(_phases(result))
    for note in result.notes:
        console.print(f"- {note}", soft_wrap=True)


def _heading(model: str, plan: Plan) -> str:
    size, layout = plan.size, plan.layouts[plan.chosen]
    parameters = f"{size.model.all:,} parameters"
    if size.model.frozen:
        parameters += f", {size.model.trained:,} of them trained"
    nodes = f"{layout.nodes} node" + ("s" if layout.nodes > 1 else "")
    return (
        f"{visible(model)}: {parameters}, in {size.layers} layers of {size.layer.all:,} and a root "
        f"of {size.root.all:,}\n"
        f"{layout.processes} processes in {nodes}; sharding='auto' is {plan.auto!r}"
    )


def _table(plan: Plan, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("")
    for sharding, layout in plan.layouts.items():
        shape = f" {layout.replicas} x {layout.shards}" if sharding == "hybrid" else ""
        table.add_column(sharding + shape, justify="right")
    return table


def _add_row(table: Table, name: str, values: Iterable[Any], form: Callable[[Any], str]) -> None:
    texts = [form(value) for value in values]
    if any(text != _gib(0) for text in texts):
        table.add_row(name, *texts)


def _gib(size: float) -> str:
    return f"{size / _GIB:,.2f}" if size else "-"


def _memory(plan: Plan, device_memory_gib: float) -> Table:
    table = _table(plan, "Memory of a device, GiB")
    memories = list(plan.memory.values())
    for attribute, name in (
        ("parameters", "parameters"),
        ("moments", "AdamW's moments"),
        ("reference", "policy at the beginning (kl_coef)"),
        ("engine", "colocated vLLM"),
        ("held", "held all the time"),
        ("gradients", "gradients"),
        ("in_flight", "gradients being reduced"),
        ("gathered", "gathered weights"),
        ("activations", "activations of a micro-batch"),
        ("workspace", "logits (workspace_mib)"),
        ("update", "update: all of these"),
        ("sampling", "whole model, to sample"),
        ("cache", "keys and values"),
        ("rollout", "sampling: these two and what is held"),
        ("on_cpu", "in the CPU's memory (cpu_offload)"),
    ):
        if attribute == "rollout" and not plan.work.decodes:
            continue
        if attribute in ("gradients", "sampling", "on_cpu"):
            table.add_section()
        _add_row(table, name, (getattr(each, attribute) for each in memories), _gib)
    table.add_section()
    _add_row(table, "prompts in a micro-batch", (each.groups for each in memories), str)
    _add_row(table, "micro-batches of an update", (each.micro_batches for each in memories), str)
    once = ("once" if each.reduced_once else "each micro-batch" for each in memories)
    _add_row(table, "gradients are reduced", once, str)
    fits = ("yes" if each.fits else "no" for each in memories)
    _add_row(table, f"an update fits {device_memory_gib:g} GiB", fits, str)
    if plan.work.decodes:
        fits = ("yes" if each.rollout <= device_memory_gib * _GIB else "no" for each in memories)
        _add_row(table, f"sampling fits {device_memory_gib:g} GiB", fits, str)
    return table


def _wire(plan: Plan) -> Table:
    table = _table(plan, "Sent by a process in a step, GiB")
    wires = list(plan.wire.values())
    for attribute, name in (
        ("gather_forward", "weights, forward"),
        ("gather_backward", "weights, backward"),
        ("reduction", "gradients"),
        ("reference", "weights of the KL pass"),
        ("sampling", "weights for vLLM" if plan.work.vllm else "weights to sample"),
        ("rollout", "samples"),
        ("total", "all"),
    ):
        _add_row(table, name, (getattr(each, attribute).process for each in wires), _gib)
    _add_row(table, "by a node to others", (each.total.node for each in wires), _gib)
    return table


def _phases(plan: Plan) -> Table:
    title = f"Seconds of a step with sharding={plan.chosen!r}, at least"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("products", "memory", "links", "network"):
        table.add_column(name, justify="right")
    table.add_column("bound by", no_wrap=True)
    for phase in plan.phases:
        times = (phase.products, phase.memory, phase.links, phase.network)
        table.add_row(phase.name, *map(_seconds, times), phase.bound)
    return table


def _seconds(time: float) -> str:
    if not time:
        return "-"
    return f"{time:,.2f}" if time >= 0.005 else "<0.01"
