"""Sharded weights and a real vLLM in each process: `trl_vllm_clusters_worker.py MODEL FOLDER KIND`.

Run as trl_vllm_worker.py is, in two processes; samples call tools as in trl_vllm_tools_worker.py.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import trl_clusters
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_runs import Keeper, double_of
from trl_tools import add, rows, said, turns
from trl_vllm_tools_worker import (
    ADD,
    WORDS,
    Watched,
    calls,
    gradient_gap,
    rewards_of,
    specify,
    weight_gaps,
    weights,
)
from trl_vllm_worker import COLOCATED, arrived_of, main

LR = 4.0  # so large that rounding of the weights does not hide the gradient
FORM = f"({ADD}|{WORDS})"


def sharded(kind: str, model: Path, folder: Path, port: int | None) -> dict[str, Any]:
    """A step of plain SGD, read off the weights that it saved."""
    folder.mkdir(exist_ok=True)
    double = double_of(model)  # from now on, ZeRO-3 splits what is loaded
    stage = kind.removeprefix("zero")
    os.environ |= trl_clusters.FSDP2 if kind == "fsdp2" else trl_clusters.zero(int(stage), folder)
    args = trl_clusters.arguments(
        folder,
        optim="sgd",
        learning_rate=LR,
        use_vllm=True,
        max_completion_length=400,
        max_tool_calling_iterations=2,
        vllm_max_model_length=2048,
        vllm_structured_outputs_regex=FORM,
        **COLOCATED,
        **weights("token_truncate", 0.015, 0.9),
    )
    watched = Watched()
    trainer = Keeper(
        AutoModelForCausalLM.from_pretrained(model),
        watched,
        args,
        rows(turns(a=3, b=4), number=6),
        processing_class=AutoTokenizer.from_pretrained(model),
        tools=[add],
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    trainer.accelerator.wait_for_everyone()
    after = copy.deepcopy(double)
    after.load_state_dict(load_file(folder / "saved" / "model.safetensors"))
    samples, references = watched.scored
    (_, batch), rewards_NK = trainer.rollouts[0], rewards_of(samples, said(references), [0.0] * 6)
    specify(double, batch, rewards_NK)
    pairs = zip(double.parameters(), after.parameters(), strict=True)
    facts = {
        "weights": weight_gaps(trainer, [double], FORM),
        "gradient": gradient_gap([(a - b).detach() / LR for a, b in pairs], double),
    }
    facts |= trl_clusters.division(trainer) | arrived_of(trainer, after, double)
    return facts | calls([samples], trainer)


if __name__ == "__main__":
    main({kind: partial(sharded, kind) for kind in ("fsdp2", "zero2", "zero3")})
