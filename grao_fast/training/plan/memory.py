"""Bytes of a process's device, by what they hold.

P elements are trained and F frozen, S processes share the model, c is the bytes of an element in
computing (2 in bfloat16), T the tokens and R the predicted ones of a micro-batch:

    parameters      (4 P + c F) / S
    moments         8 P / S, AdamW's two in float32
    KL              4 P / S, the policy that training began with (kl_coef > 0)
    gradients       4 P / S if each micro-batch's are reduced, 4 P if several's sum is
    in flight       (c + 4) of the trained elements of the root, or of a layer if that is larger:
                    a gradient as it is computed, and in float32 for the reduction
    gathered        c (root + two layers): one computing, the next one arriving
    activations     c T D layers + 2 c T (inputs and outputs of a layer's matrices) + 2 c R D
    logits          workspace_mib
    sampling        c (P + F): the whole model in each process; keys and values beside it

With cpu_offload, what is divided by S is in the CPU's memory. The second term of the activations is
one layer that is recomputed, kept by autograd and with gradients on their way. If nothing is
recomputed it holds for each layer, and the first, the layers' inputs, is part of it. The third is
the head's inputs and their gradient. One process computes under autocast: layers' inputs are then
float32, and all weights have been cast when the head is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from grao_fast.distributed.choice import reduces_once
from grao_fast.training.flops import causal_pairs
from grao_fast.training.plan.size import ModelSize
from grao_fast.training.plan.work import Layout, Workload

_PASS_SHARE = 0.9  # of the memory that is left, for a pass, as in the search for a token budget


@dataclass(frozen=True)
class Memory:
    """Bytes of one process's device, and of the CPU's memory for it where shards are there.

    groups: prompts, with their sequences, of a micro-batch; at least one.
    micro_batches: of an update, on each process.
    reduced_once: whether gradients are reduced once an update, not in each of its micro-batches.
    fits: whether an update fits.
    """

    parameters: float
    moments: float
    reference: float
    engine: float
    on_cpu: float
    gradients: float
    in_flight: float
    gathered: float
    activations: float
    workspace: float
    sampling: float
    cache: float
    groups: int
    micro_batches: int
    reduced_once: bool
    fits: bool

    @property
    def held(self) -> float:
        """What stays through the whole run."""
        return self.parameters + self.moments + self.reference + self.engine

    @property
    def update(self) -> float:
        passing = self.in_flight + self.gathered + self.activations + self.workspace
        return self.held + self.gradients + passing

    @property
    def rollout(self) -> float:
        return self.held + self.sampling + self.cache


def memory(size: ModelSize, layout: Layout, work: Workload, device_memory: float) -> Memory:
    """Return the memory of a layout, with as few micro-batches as fit, of about equal size."""
    P, F = size.model
    S, c = layout.shards, work.compute_bytes
    unit = max(size.root.trained, size.layer.trained)
    fixed = {
        "parameters": (4 * P + c * F) / S,
        "moments": 8 * P / S,
        "reference": 4 * P / S if work.kl else 0.0,
        "engine": work.engine_share * device_memory if work.vllm == "colocate" else 0.0,
        "in_flight": (c + 4) * unit,
        "gathered": _gathered(size, layout, c),
        "workspace": work.workspace,
        "sampling": c * size.model.all if work.decodes else 0.0,
        "cache": _cache(size, layout, work) if work.decodes else 0.0,
    }
    passing = fixed["in_flight"] + fixed["gathered"] + fixed["workspace"]
    gradients = 4 * P / S
    on_cpu = 0.0
    if work.offload and layout.processes > 1:
        state = ("parameters", "moments", "reference")
        on_cpu = gradients + sum(fixed[name] for name in state)
        fixed |= dict.fromkeys(state, 0.0)
        gradients = 0.0
    held = sum(fixed[name] for name in ("parameters", "moments", "reference", "engine"))
    most = work.groups(layout.processes)

    def fitting(gradients: float) -> int:
        """Groups of a micro-batch beside gradients; 0 if not even one fits."""
        room = _PASS_SHARE * (device_memory - held - gradients) - passing
        fits = int(max(0.0, room) // activations(size, work, 1, layout))
        if work.max_tokens is not None:
            fits = min(fits, max(1, work.max_tokens // work.group(size).tokens))
        return min(fits, most)

    fits = fitting(gradients)
    once = reduces_once("none" if S == 1 else "full", P, device_memory=int(device_memory))
    if once and fits < most:  # several micro-batches
        gradients = 4 * P
        fits = fitting(gradients)
    micro_batches = -(-most // max(1, fits))
    groups = -(-most // micro_batches)
    return Memory(
        **fixed,
        on_cpu=on_cpu,
        gradients=gradients,
        activations=activations(size, work, groups, layout),
        groups=groups,
        micro_batches=micro_batches,
        reduced_once=once or micro_batches == 1,
        fits=fits > 0,
    )


def activations(size: ModelSize, work: Workload, groups: int, layout: Layout) -> float:
    """Bytes of the activations of a micro-batch of some groups."""
    c, group = work.compute_bytes, work.group(size)
    T, R = groups * group.tokens, groups * group.rows
    layer = 2 * c * T * size.matrix_io
    head = 2 * c * R * size.width
    if not work.recompute:
        return layer * size.layers + head
    boundary = 4 if layout.processes == 1 else c
    return boundary * T * size.width * size.layers + layer + head


def _gathered(size: ModelSize, layout: Layout, c: int) -> float:
    if layout.processes == 1:
        return c * size.model.all if c < 4 else 0.0
    return c * (size.root.all + min(2, size.layers) * size.layer.all)


def _cache(size: ModelSize, layout: Layout, work: Workload) -> float:
    """Bytes of keys and values of the sequences that are decoded at once, at their longest."""
    sequences = min(work.decoded, work.groups(layout.processes) * work.samples)
    length = work.prompt + work.completion
    kept = sum(
        n * (length if window is None else min(window, length))
        for window, n in size.windows.items()
    )
    return work.compute_bytes * sequences * size.cache * kept


def cache_reads(size: ModelSize, work: Workload) -> float:
    """Bytes of keys and values that decoding all samples of one prompt reads."""
    length = work.prompt + work.completion
    pairs = sum(
        n * (causal_pairs(length, window) - causal_pairs(work.prompt, window))
        for window, n in size.windows.items()
    )
    return work.compute_bytes * work.samples * size.cache * pairs
