"""Heads whose vocabulary is sharded over the processes of a group, as under tensor parallelism.

Each process holds the rows of the head, and of the bias, that `Shard` says; hidden states, targets
and weights are the same in all processes. Three things are reduced over the group for each chunk of
rows: the largest logit together with the target's, the sums of exponentials, and the gradient of
the hidden states. So losses, log-probs and dhidden agree everywhere, while dhead and dbias are each
process's own shard. `rows/sharded.py` does the reductions of a row.

Shapes: T rows, R of a chunk, D width, V a process's shard of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabParallel(NamedTuple):
    """The processes that share a head, and the number of its rows over all of them.

    With n processes and W = ceil(vocab_size / n), process i holds rows i W to (i + 1) W, the last
    processes fewer, as in `torch.chunk`, DTensor's `Shard(0)` and Megatron's padded vocabulary.
    """

    group: dist.ProcessGroup
    vocab_size: int


class Shard(NamedTuple):
    """A process's shard of a head. It holds the group's name, which operators can take."""

    group_name: str
    vocab_size: int

    @property
    def group(self) -> dist.ProcessGroup:
        # PyTorch's functional collectives resolve a group inside an operator the same way.
        # Imported here because not every build of PyTorch has it.
        from torch._C._distributed_c10d import _resolve_process_group

        return _resolve_process_group(self.group_name)

    @property
    def width(self) -> int:
        """Rows of the head in each process, except that the last may have fewer."""
        return -(-self.vocab_size // self.group.size())

    @property
    def start(self) -> int:
        return self.group.rank() * self.width

    def local(self, target_R: Tensor, V: int) -> Tensor:
        """Targets as indices into the V rows of this process; -1 for those of others."""
        local_R = target_R - self.start
        return local_R.where((local_R >= 0) & (local_R < V), -1)

    def max_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)
        return tensor


class LocalOperands(NamedTuple):
    """The operands of this process as plain tensors; `shard` is None where the head is whole."""

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    shard: Shard | None


def local_operands(
    hidden_TD: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    vocab_parallel: VocabParallel | None,
) -> LocalOperands:
    """Plain operands as they are, and the local tensors of DTensors, differentiably.

    Raises:
        ValueError: the head does not have the rows that the group expects of this process, or
            DTensors are not placed as a sharded head needs them.
    """
    if _is_dtensor(head_VD):
        if vocab_parallel is not None:
            raise ValueError(
                "head_VD is a DTensor, whose placement says how it is sharded: leave out "
                "vocab_parallel"
            )
        return _local_dtensors(hidden_TD, head_VD, bias_V)
    for name, tensor in (("hidden_TD", hidden_TD), ("bias_V", bias_V)):
        if _is_dtensor(tensor):
            raise ValueError(f"{name} is a DTensor and head_VD is not: pass {name}.to_local()")
    if vocab_parallel is None:
        return LocalOperands(hidden_TD, head_VD, bias_V, None)
    group, vocab_size = vocab_parallel
    rank, processes = group.rank(), group.size()
    width = -(-vocab_size // processes)
    _check_none_is_empty(vocab_size, processes)
    expected = min(width, vocab_size - rank * width)
    if head_VD.ndim == 2 and head_VD.shape[0] != expected:
        raise ValueError(
            f"head_VD has {head_VD.shape[0]} rows in process {rank} of {processes}; of "
            f"vocab_size={vocab_size} it must have {expected}: ceil(vocab_size / processes), or "
            "what is left for the last. Pad the vocabulary to a multiple if yours is cut otherwise"
        )
    return LocalOperands(hidden_TD, head_VD, bias_V, Shard(group.group_name, vocab_size))


def _check_none_is_empty(vocab_size: int, processes: int) -> None:
    """ValueError in all processes alike: if one raised alone, the others would wait for it."""
    if (processes - 1) * -(-vocab_size // processes) >= vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} leaves the last of {processes} processes without rows: use "
            "fewer processes, or pad the vocabulary"
        )


def _is_dtensor(tensor: Tensor | None) -> bool:
    if tensor is None or type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _local_dtensors(hidden_TD: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> LocalOperands:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as ShardOf

    mesh = head_VD.device_mesh
    if tuple(head_VD.placements) != (ShardOf(0),):
        raise ValueError(
            f"head_VD is a DTensor placed {tuple(head_VD.placements)}; it must be [Shard(0)] on a "
            "mesh of one dimension, the processes that share the vocabulary"
        )
    if bias_V is not None and not (_is_dtensor(bias_V) and bias_V.placements == (ShardOf(0),)):
        raise ValueError("bias_V must be a DTensor placed [Shard(0)], as head_VD is")
    replicated = _is_dtensor(hidden_TD) and hidden_TD.device_mesh == mesh
    if not replicated or tuple(hidden_TD.placements) != (Replicate(),):
        raise ValueError(
            "head_VD is a DTensor sharded over the vocabulary, so hidden_TD must be a DTensor "
            "replicated over the same mesh: DTensor.from_local(hidden_TD, head_VD.device_mesh, "
            "[Replicate()]). Where each process has its own batch, as under FSDP, gather the head "
            "first: head_VD.full_tensor()"
        )
    _check_none_is_empty(head_VD.shape[0], mesh.size())
    return LocalOperands(
        hidden_TD.to_local(grad_placements=[Replicate()]),
        head_VD.to_local(grad_placements=[ShardOf(0)]),
        None if bias_V is None else bias_V.to_local(grad_placements=[ShardOf(0)]),
        Shard(mesh.get_group().group_name, head_VD.shape[0]),
    )
