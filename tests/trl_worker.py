"""One of two processes that train together, run by test_trl.py: saves what it did."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl_runs import Keeper, config, prompts, run, token_ids

from grao_fast.distributed.world import PeerFailed


def sharded_and_whole(trainer: Keeper) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the rollouts with a model sharded over both processes, and with a whole one.

    TRL's launcher shards on GPUs only; here the model is sharded by hand, as FSDP2 does it.
    """

    def backward() -> None:
        for _, batch in trainer.rollouts:
            trainer._compute_loss(whole, batch).backward()

    whole = trainer.accelerator.unwrap_model(trainer.model)
    whole.zero_grad()
    backward()
    gradients = [parameter.grad.clone() for parameter in whole.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    whole.zero_grad()
    mesh = init_device_mesh("cpu", (2,))
    for layer in whole.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    backward()
    sharded = [parameter.grad.full_tensor() for parameter in whole.parameters()]
    return [(mine, both / 2) for mine, both in zip(sharded, gradients, strict=True)]


def failure(trainer: Keeper) -> tuple[str, str]:
    """The kind and message of the error of a rollout whose second process has a wrong reference."""
    rows = [dict(row) for row in trainer.rollouts[0][0]]
    if dist.get_rank() == 1:
        for row in rows:
            row["reference"] = [{"role": "user", "content": "count"}]
    try:
        trainer._generate_and_score_completions(rows)
    except (PeerFailed, ValueError) as error:
        return type(error).__name__, str(error)
    return "", "no error"


def main() -> None:
    model_folder, folder = map(Path, sys.argv[1:])
    args = config(folder, steps_per_generation=1, ddp_backend="gloo")
    rows = prompts(["live", "dead", "dead", "dead"] * 2).to_list()
    for row in rows[1::2]:  # so that now and then one process has no reference, and the other does
        row["reference"][0]["content"] = " "
    trainer = run(model_folder, args, Dataset.from_list(rows))
    rollouts = [(rows, token_ids(batch)) for rows, batch in trainer.rollouts]
    saved = {
        "rollouts": rollouts,
        "gradients": trainer.gradients[0],
        "learnt": [bool(batch["terms_B23"].any()) for _, batch in trainer.rollouts],
        "loss": trainer.state.log_history[0].get("loss"),
        "failure": failure(trainer),
        "sharded": sharded_and_whole(trainer),
    }
    torch.save(saved, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


main()
