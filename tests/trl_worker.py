"""One of two processes that train together; run by test_trl.py, saves what it sampled and learnt."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from trl_runs import config, prompts, run, token_ids


def main() -> None:
    model_folder, folder = map(Path, sys.argv[1:])
    args = config(folder, steps_per_generation=1, ddp_backend="gloo")
    trainer = run(model_folder, args, prompts(["live", "dead", "dead", "dead"] * 2))
    rollouts = [(rows, token_ids(batch)) for rows, batch in trainer.rollouts]
    saved = {
        "rollouts": rollouts,
        "gradients": trainer.gradients[0],
        "learnt": [bool(batch["terms_B23"].any()) for _, batch in trainer.rollouts],
        "loss": trainer.state.log_history[0].get("loss"),
    }
    torch.save(saved, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


main()
