"""Findings on the memory and the time of a step, and of the run."""

from __future__ import annotations

from grao_fast.checkup.findings import Finding, judged
from grao_fast.checkup.step import StepFacts

_GIB = 2**30
_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def on_step(facts: StepFacts, *, steps: int) -> list[Finding]:
    """Return what a measured update says. steps: those that the run has left."""
    findings = [on_memory(facts)]
    if facts.times is None and facts.memory is not None:
        remedy = "look at the model's weights and the rewards' size: training would stop there"
        findings.append(Finding("step", "update", "failure", facts.problem or "", remedy))
    return [*findings, *on_times(facts, steps=steps)]


def on_memory(facts: StepFacts) -> Finding:
    """Judge the memory of an update against the device's."""
    memory = facts.memory
    if memory is None:
        return Finding("step", "memory", "failure", facts.problem or "")
    kept = f", KL's copy {_size(memory.kept)}" if memory.kept else ""
    value = (
        f"{_size(memory.total)} of {_size(memory.device)}: weights {_size(memory.weights)}, "
        f"gradients {_size(memory.gradients)}, AdamW {_size(memory.moments)}{kept}, "
        f"{_size(memory.pass_)} for a micro-batch of {memory.groups} of the largest groups"
    )
    remedy = "lower memory_budget_mib or the lengths, train an adapter, or use more processes"
    return judged("step", "memory", "memory", memory.total / memory.device, value, remedy)


def on_times(facts: StepFacts, *, steps: int) -> list[Finding]:
    """Show the time of a step and of the run, extrapolated, and judge the reward's part of it."""
    times = facts.times
    if times is None:
        return []
    measured = (
        f"an update of {times.timed} prompts takes {_seconds(times.timed_seconds)} "
        f"({times.tflops:.2g} TFLOP/s), measured"
    )
    sampling = f"sampling {_seconds(times.sample)}, " if times.sample else ""
    reward = "unknown" if times.reward is None else _seconds(times.reward)
    value = (
        f"extrapolated to {facts.prompts} prompts: {_seconds(times.step)} ({sampling}"
        f"reward {reward}, update {_seconds(times.update)})"
    )
    remedy = "make the reward faster (score in batches, async): it takes most of a step"
    of_reward = (times.reward or 0.0) / times.step
    run = (
        f"extrapolated to {steps:,} step{'s' * (steps != 1)}: {_seconds(steps * times.step)}, "
        "without evaluations and saving"
    )
    return [
        Finding("step", "update", "ok", measured),
        judged("step", "step", "reward's share of the time", of_reward, value, remedy),
        Finding("step", "run", "ok", run),
    ]


def _size(size: float) -> str:
    """A number of bytes, in GiB from a tenth of one on."""
    return f"{size / _GIB:,.1f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:,.1f} MiB"


def _seconds(time: float) -> str:
    """A time in the largest unit of which it has two."""
    for unit, name in _UNITS:
        if time >= 2 * unit:
            return f"{time / unit:,.1f} {name}"
    return f"{time:.2g} s" if time < 10 else f"{time:.0f} s"
