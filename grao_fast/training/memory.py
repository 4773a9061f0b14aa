"""The token budget of a micro-batch, found before the first step.

On CUDA, passes over one, two, four... of the largest group of the run are made, and their peaks
measured; several processes, which must all make the same passes, make two. On a CPU, where that
would take minutes, passes over three small groups of the same proportions are made, and

    bytes(T) = a + b T + c T^2 + gradients        T tokens

is fitted to their peaks. c stands for what attention stores per pair. Gradients not yet added to
their parameters are counted apart, since they may peak at another time. Groups in one row add up.

Bytes are those of a forward and backward pass, besides parameters, their gradients and AdamW's
moments. Probing leaves no trace in the state of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from grao_fast.config import ObjectiveOptions
from grao_fast.data.packing import Group
from grao_fast.distributed.world import World
from grao_fast.kernels.devices import workspace_bytes
from grao_fast.models.policy import Policy
from grao_fast.models.sharding import local
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.held_bytes import HeldBytes
from grao_fast.training.step import micro_batch_loss

logger = get_logger(__name__)

_MIB = 2**20
_CPU_BUDGET_MIB = 8192  # fixed, so that a run resumed elsewhere is split alike, to the bit
_CUDA_SHARE = 0.9  # of free memory; the rest allows for fragmentation and for sampling
_SMALLEST = 128  # tokens of the smallest group tried on a CPU
_MULTIPLES = (1, 2, 4)


def token_budget(
    policy: Policy,
    optimizer: Optimizer,
    shape: GroupShape,
    objective: ObjectiveOptions,
    *,
    most: int,
    memory_budget_mib: int | None = None,
    workspace_mib: int | None = None,
) -> int:
    """Tokens of as many of the largest group as fit the memory in one micro-batch.

    Args:
        shape: of the largest group of the run.
        most: groups of a step.
        memory_budget_mib: for a pass; None: see `GRAOConfig.memory_budget_mib`.

    Raises:
        UserError: not even one group fits; names its need and the remedies.
    """
    logger.info("measuring how many groups fit in the memory of a micro-batch")
    found = micro_batch(
        policy,
        optimizer,
        shape,
        objective,
        most=most,
        memory_budget_mib=memory_budget_mib,
        workspace_mib=workspace_mib,
    )
    tokens = found.groups * shape.group().size.tokens(share_prefix=policy.share_prefix)
    logger.info(
        "micro-batches of up to %d tokens: %d of the largest group take %.0f of %.0f MiB",
        tokens,
        found.groups,
        found.peak / _MIB,
        found.budget / _MIB,
    )
    return tokens


@dataclass(frozen=True)
class MicroBatchMemory:
    """The most of the largest group that fit the memory of one micro-batch.

    groups: how many.
    peak: bytes of a pass over them; budget: bytes that such a pass may take.
    """

    groups: int
    peak: float
    budget: float


def micro_batch(
    policy: Policy,
    optimizer: Optimizer,
    shape: GroupShape,
    objective: ObjectiveOptions,
    *,
    most: int,
    memory_budget_mib: int | None = None,
    workspace_mib: int | None = None,
) -> MicroBatchMemory:
    """Find how many of the largest group fit in one micro-batch; see `token_budget`."""
    probe = Probe(policy, objective, workspace_mib)
    with _untouched(policy):
        if policy.device.type == "cuda":
            budget = _free_on_cuda(policy, optimizer)
            measured = _measured_peak(probe, shape)
            peak = measured if policy.world.size == 1 else _by_two(measured, budget, policy.world)
        else:
            budget = _CPU_BUDGET_MIB * _MIB
            peak = _estimated_peak(probe, shape)
        if memory_budget_mib is not None:
            budget = memory_budget_mib * _MIB
        fitting = int(policy.world.least(most_that_fit(peak, budget, most)))
        if fitting == 0:
            raise UserError(_too_large(shape, peak(1), budget))
        return MicroBatchMemory(fitting, peak(fitting), budget)


def most_that_fit(peak: Callable[[int], float], budget: float, most: int) -> int:
    """The largest n up to `most` with peak(n) <= budget, by doubling and bisection; 0: none."""
    fits, fails = 0, 1
    while fails <= most and peak(fails) <= budget:
        fits, fails = fails, 2 * fails
    fails = min(fails, most + 1)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if peak(middle) <= budget:
            fits = middle
        else:
            fails = middle
    return fits


def _too_large(shape: GroupShape, needed: float, budget: float) -> str:
    *samples, _ = shape.sequences
    if not samples:
        remedy = "Lower"
    elif shape.stored:
        remedy = "Store fewer or shorter completions, lower"
    else:
        remedy = "Lower max_new_tokens, num_generations,"
    sequences = f"{len(shape.sequences)} sequences" if samples else "1 sequence"
    needs = f"needs {needed / _MIB:.0f} MiB" if needed < float("inf") else "needs more than all"
    return (
        f"the largest group, {shape.prompt} tokens of prompt and {sequences} "
        f"of up to {max(shape.sequences)}, {needs} besides parameters, gradients and AdamW's "
        f"moments, and {budget / _MIB:.0f} MiB are there for it (memory_budget_mib). {remedy} "
        "max_prompt_length or max_reference_length, keep gradient_checkpointing and share_prefix "
        "on, or train an adapter"
    )


@dataclass(frozen=True)
class Probe:
    """Forward and backward passes as training runs them."""

    policy: Policy
    objective: ObjectiveOptions
    workspace_mib: int | None = None

    def run(self, group: Group, count: int) -> None:
        """A pass over `count` copies of a group, all its sequences live."""
        shape = len(self.objective.formula.terms), len(group.sequence_ids)
        group = replace(group, terms_CK=torch.ones(shape, dtype=torch.float64))
        batch = self.policy.lay_out([group] * count)
        initial_T = torch.zeros(len(batch.target_T), device=self.policy.device)
        micro_batch_loss(
            self.policy,
            batch,
            self.objective,
            num_prompts=count,
            ref_logprob_T=initial_T if self.objective.formula.needs_initial else None,
            workspace_mib=self.workspace_mib,
        ).loss.backward()


def _free_on_cuda(policy: Policy, optimizer: Optimizer) -> float:
    """Bytes for a pass: free memory less the moments that the first step will allocate.

    Gradients that are kept whole until the end of a step take memory beside it.
    """
    device = policy.device
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    moments = 0 if optimizer.state else sum(8 * local(p).numel() for p in trained if p.is_cuda)
    whole = 4 * sum(p.numel() for p in trained) if policy.defers_reduction else 0
    return _CUDA_SHARE * (free - moments - whole)


def _measured_peak(probe: Probe, shape: GroupShape) -> Callable[[int], float]:
    """n -> peak bytes of a pass over n groups, measured; infinite if CUDA runs out of memory."""
    peaks: dict[int, float] = {}
    device = probe.policy.device

    def peak(n: int) -> float:
        if n not in peaks:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            try:
                probe.run(shape.group(), n)
                peaks[n] = torch.cuda.max_memory_allocated(device) - before
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                peaks[n] = float("inf")
        return peaks[n]

    return peak


def _by_two(
    measured: Callable[[int], float], budget: float, world: World
) -> Callable[[int], float]:
    """n -> peak bytes of a pass over n groups, by a line through those over one and two.

    With several processes, all must run the same passes, and none may run out of memory.
    """
    one = measured(1)
    has_room = world.least(budget - 3 * one) >= 0
    more = measured(2) - one if has_room else one
    return lambda n: one + (n - 1) * more


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is PyTorch's, or a library's, for lack of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in ("out of memory", "_ALLOC_FAILED"))


def _estimated_peak(probe: Probe, shape: GroupShape) -> Callable[[int], float]:
    """n -> peak bytes of a pass over n groups, by a parabola through those of three small ones."""
    policy = probe.policy

    def tokens(shape: GroupShape) -> int:
        return shape.group().size.tokens(share_prefix=policy.share_prefix)

    def tried(shape: GroupShape) -> HeldBytes:
        with HeldBytes(policy) as held:
            probe.run(shape.group(), 1)
        return held

    whole = tokens(shape)
    # Multiples of one small shape, since the parabola holds for fixed proportions only.
    small = shape.scaled(min(1.0, _SMALLEST / whole))
    shapes = [small.scaled(multiple) for multiple in _MULTIPLES]
    held = [tried(each) for each in shapes]
    a, b, c = parabola([tokens(each) for each in shapes], [each.peak for each in held])
    fixed, of_group = max(a, 0.0), b * whole + c * whole**2
    fixed += max(each.gradients_peak for each in held)
    # The loss is one operator, whose logits the dispatch mode does not see.
    fixed += workspace_bytes(probe.workspace_mib, policy.device)
    return lambda n: fixed + n * of_group


def parabola(x: list[int], y: list[float]) -> tuple[float, float, float]:
    """(a, b, c) of a + b x + c x^2 through three points; if c < 0, of a line through two."""
    slopes = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in (0, 1)]
    c = (slopes[1] - slopes[0]) / (x[2] - x[0])
    if c <= 0:
        return y[2] - slopes[1] * x[2], slopes[1], 0.0
    b = slopes[0] - c * (x[0] + x[1])
    return y[0] - b * x[0] - c * x[0] ** 2, b, c


@contextmanager
def _untouched(policy: Policy) -> Iterator[None]:
    """Restore gradients, random state and mode after the passes in the block."""
    training = policy.model.training
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    kept = [p.grad for p in trained]
    devices = [policy.device] if policy.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), policy.updating():
            for parameter in trained:  # as after the first micro-batch of a step
                parameter.grad = torch.zeros_like(parameter)
            yield
    finally:
        for parameter, grad in zip(trained, kept, strict=True):
            parameter.grad = grad
        policy.model.train(training)
