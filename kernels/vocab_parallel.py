"""A head whose vocabulary is spread over the processes of a group, as tensor parallelism does.

Each process has the rows of the head, and of the bias, that `Shard` says, and all have the same
hidden states, targets and weights. Per chunk of rows three things are reduced over the group: the
largest logit and the target's (together), the sums of exponentials, and the gradient of the hidden
states. Losses, log-probs and dhidden are then the same everywhere; dhead and dbias are each
process's own part.

Shapes: T rows, R of a chunk, D width, V a process's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import LogitTransform
from .rows.off_policy import Policy
from .rows.statistics import (
    Statistics,
    mark_dead,
    row_factors,
    row_outcome,
    store,
)


class VocabParallel(NamedTuple):
    """Which processes share a head, and how many rows it has in all of them.

    With n processes and W = ceil(vocab_size / n), process i has rows i W to (i + 1) W, the last
    ones fewer: `torch.chunk`'s and DTensor's `Shard(0)`, and Megatron's padded vocabulary.
    """

    group: dist.ProcessGroup
    vocab_size: int


class Shard(NamedTuple):
    """A process's part of a head, as operators know it: by the group's name."""

    group_name: str
    vocab_size: int

    @property
    def group(self) -> dist.ProcessGroup:
        # How PyTorch's own functional collectives find a group inside an operator. Imported where
        # it is needed, as not every build of PyTorch has it.
        from torch._C._distributed_c10d import _resolve_process_group

        return _resolve_process_group(self.group_name)

    @property
    def width(self) -> int:
        """Rows of the head in each process but the last ones."""
        return -(-self.vocab_size // self.group.size())

    @property
    def start(self) -> int:
        return self.group.rank() * self.width

    def local(self, target_R: Tensor, V: int) -> Tensor:
        """Targets among the V rows of this process; -1 for those of others."""
        local_R = target_R - self.start
        return local_R.where((local_R >= 0) & (local_R < V), -1)

    def max_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor


def shard_of(group_name: str | None, vocab_size: int) -> Shard | None:
    """None where the head is whole: operators know that by a group without a name."""
    return None if group_name is None else Shard(group_name, vocab_size)


class Parts(NamedTuple):
    """What this process has of each operand, as plain tensors."""

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    group_name: str | None
    vocab_size: int


def local_parts(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    vocab_parallel: VocabParallel | None,
) -> Parts:
    """Plain operands as they are; of DTensors the local parts, differentiably.

    Raises:
        ValueError: the head does not have the rows that the group expects of this process, or
            DTensors are not placed as a head that is shared this way has them.
    """
    if _is_dtensor(head_VD):
        if vocab_parallel is not None:
            raise ValueError("head_VD is a DTensor, which says itself how it is spread: leave out "
                             "vocab_parallel")  # fmt: skip
        return _parts_of_dtensors(hidden_TD, head_VD, bias_V)
    for name, tensor in (("hidden_TD", hidden_TD), ("bias_V", bias_V)):
        if _is_dtensor(tensor):
            raise ValueError(f"{name} is a DTensor and head_VD is not: pass {name}.to_local()")
    if vocab_parallel is None:
        return Parts(hidden_TD, head_VD, bias_V, None, head_VD.shape[0])
    group, vocab_size = vocab_parallel
    rank, processes = group.rank(), group.size()
    width = -(-vocab_size // processes)
    _check_none_is_empty(vocab_size, processes)
    expected = min(width, vocab_size - rank * width)
    if head_VD.ndim == 2 and head_VD.shape[0] != expected:
        raise ValueError(
            f"head_VD has {head_VD.shape[0]} rows in process {rank} of {processes}; of "
            f"vocab_size={vocab_size} it must have {expected}: ceil(vocab_size / processes), the "
            "last ones what is left. Pad the vocabulary to a multiple if yours is cut another way"
        )
    return Parts(hidden_TD, head_VD, bias_V, group.group_name, vocab_size)


def _check_none_is_empty(vocab_size: int, processes: int) -> None:
    """In every process alike: if one alone refused, the others would wait for it."""
    if (processes - 1) * -(-vocab_size // processes) >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} leaves the last of {processes} processes no row: use fewer "
            "processes, or pad the vocabulary"
        )


def _is_dtensor(tensor: Tensor | None) -> bool:
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _parts_of_dtensors(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Parts:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardOf

    mesh = head_VD.device_mesh
    if tuple(head_VD.placements) != (ShardOf(0),):
        raise ValueError(
            f"head_VD is a DTensor placed {tuple(head_VD.placements)}; needed: [Shard(0)] on a "
            "mesh of one dimension, the processes that share the vocabulary"
        )
    if bias_V is not None and not (_is_dtensor(bias_V) and bias_V.placements == (ShardOf(0),)):
        raise ValueError("bias_V must be a DTensor placed [Shard(0)], as head_VD is")
    replicated = _is_dtensor(hidden_TD) and hidden_TD.device_mesh == mesh
    if not replicated or tuple(hidden_TD.placements) != (Replicate(),):
        raise ValueError(
            "head_VD is a DTensor sharded over the vocabulary, so hidden_TD must be one that is "
            "the same in all of its processes: DTensor.from_local(hidden_TD, "
            "head_VD.device_mesh, [Replicate()]). Where processes have batches of their own, as "
            "under FSDP, gather the head first: head_VD.full_tensor()"
        )
    _check_none_is_empty(head_VD.shape[0], mesh.size())
    return Parts(
        hidden_TD.to_local(grad_placements=[Replicate()]),
        head_VD.to_local(grad_placements=[ShardOf(0)]),
        None if bias_V is None else bias_V.to_local(grad_placements=[ShardOf(0)]),
        mesh.get_group().group_name,
        head_VD.shape[0],
    )


def sharded_ce_rows(
    shard: Shard,
    row_statistics: Callable[..., Statistics],
    row_gradient: Callable[..., None],
) -> Callable[..., None]:
    """The row function of a sharded head, out of a backend's two halves of it."""

    def weighted_ce_rows(
        logits_RV: Tensor,
        dlogits_RV: Tensor | None,
        target_grad_R: Tensor | None,
        bias_V: Tensor | None,
        target_R: Tensor,
        weight_R: Tensor,
        logprob_R: Tensor,
        transform: LogitTransform,
        entropy_R: Tensor | None,
        entropy_weight_R: Tensor | None,
        top1_R: Tensor | None,
        policy: Policy | None,
    ) -> None:
        entropy, weights = entropy_R is not None, (weight_R, entropy_weight_R, policy)
        local_R = shard.local(target_R, logits_RV.shape[1])
        statistics = row_statistics(logits_RV, bias_V, local_R, transform, entropy)
        statistics = _reduced(statistics, entropy, shard)
        outcome = row_outcome(statistics, entropy, top1_R is not None)
        if dlogits_RV is not None and target_grad_R is not None:
            factors, target = row_factors(statistics, outcome.logprob_R, *weights, transform)
            target_grad_R.copy_(target.grad_R.where(local_R >= 0, 0))
            zero_R = local_R.where(target.whole_R, -1)
            row_gradient(logits_RV, dlogits_RV, bias_V, zero_R, factors, transform)
        mark_dead(outcome, *weights)
        store(outcome, logprob_R, entropy_R, top1_R)

    return weighted_ce_rows


def _reduced(statistics: Statistics, entropy: bool, shard: Shard) -> Statistics:
    """The sums over the whole vocabulary, which are relative to its largest logit."""
    own_peak_R, target_z_R, others_R, rest_R, ties_R, spread_R = statistics
    # A part whose logits are all -inf adds nothing: -inf - peak would make it NaN.
    own_peak_R = own_peak_R.clamp(min=torch.finfo(own_peak_R.dtype).min)
    peak_R, target_z_R = shard.max_(torch.stack([own_peak_R, target_z_R]))
    fall_R = own_peak_R - peak_R
    decay_R = fall_R.exp()
    if not entropy:
        others_R = shard.sum_(others_R * decay_R)
        return statistics._replace(peak_R=peak_R, target_z_R=target_z_R, others_R=others_R)
    highest_R = own_peak_R == peak_R
    total_R = rest_R + ties_R
    sums_4R = torch.stack(
        [
            others_R * decay_R,
            torch.where(highest_R, rest_R, total_R * decay_R),
            torch.where(highest_R, ties_R, 0),
            (spread_R + fall_R * total_R) * decay_R,
        ]
    )
    return Statistics(peak_R, target_z_R, *shard.sum_(sums_4R))
