"""One of several processes that share a head; test_vocab_parallel.py runs it and reads its file."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from calls import backward
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf

from grao_fast.kernels import VocabParallel, linear_weighted_cross_entropy


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor."""
    width = -(-tensor.shape[0] // dist.get_world_size())
    return tensor[dist.get_rank() * width :][:width].clone()


def leaves(case: dict[str, Any], dtensor: bool) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.clone() for name, tensor in case["operands"].items()}
    if not dtensor:
        for name in tensors.keys() & {"head_VD", "bias_V"}:
            tensors[name] = shard(tensors[name])
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placed = {"hidden_TD": [Replicate()], "head_VD": [ShardOf(0)], "bias_V": [ShardOf(0)]}
    return {
        name: distribute_tensor(tensor, mesh, placed[name]).requires_grad_()
        for name, tensor in tensors.items()
    }


def run(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    dtensor, options = case.get("dtensor", False), {}
    operands = leaves(case, dtensor)
    if not dtensor:
        options["vocab_parallel"] = VocabParallel(dist.group.WORLD, case["vocab_size"])
    if case.get("accumulate"):
        options["head_grad_VD"] = torch.ones_like(operands["head_VD"]).detach()
    outputs = backward(case, operands, **options)
    if case.get("accumulate"):
        outputs["head_grad_VD"] = options["head_grad_VD"]
    return {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in outputs.items()
    }


def errors() -> dict[str, str]:
    """Messages of the errors that each process raises by itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    hidden_TD, head_VD = torch.ones(3, 4), torch.ones(10, 4)
    sharded = distribute_tensor(head_VD, mesh, [ShardOf(0)])
    replicated = distribute_tensor(head_VD, mesh, [Replicate()])
    hidden = DTensor.from_local(hidden_TD, mesh, [Replicate()])
    group = VocabParallel(dist.group.WORLD, 10)
    cases = {
        "rows": (hidden_TD, head_VD[: 3 + rank], group),
        "plain_hidden": (hidden_TD, sharded, None),
        "placement": (hidden, replicated, None),
        "both": (hidden, sharded, group),
        "hidden_alone": (hidden, head_VD, None),
    }
    said = {}
    for name, (one, two, parallel) in cases.items():
        try:
            weights = (torch.zeros(3).long(), torch.ones(3))
            linear_weighted_cross_entropy(one, two, *weights, vocab_parallel=parallel)
        except ValueError as error:
            said[name] = str(error)
    try:  # raised in all processes, not only in the one without rows
        empty = {"vocab_parallel": VocabParallel(dist.group.WORLD, 1)}
        linear_weighted_cross_entropy(
            hidden_TD, head_VD[: 1 - rank], torch.zeros(3).long(), torch.ones(3), **empty
        )
    except ValueError as error:
        said["empty"] = str(error)
    try:
        options = {"vocab_parallel": group}
        linear_weighted_cross_entropy(
            hidden_TD, shard(head_VD), torch.tensor([0, 10, 1]), torch.ones(3), **options
        )
    except ValueError as error:
        said["target"] = str(error)
    return said


def main() -> None:
    folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    cases = torch.load(f"{folder}/cases.pt")
    results = {name: run(case) for name, case in cases.items()}
    torch.save({"results": results, "errors": errors()}, f"{folder}/result-{rank}.pt")
    dist.destroy_process_group()


main()
