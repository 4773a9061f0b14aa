"""Objectives whose weights are known before the head, each with its specification, and groups of
every kind to try them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grao_fast.kernels.reference_objectives import mixtures, policy_gradient, supervised
from grao_fast.objectives.awr import AWR
from grao_fast.objectives.base import Groups, Objective
from grao_fast.objectives.grpo import GRPO, DrGRPO
from grao_fast.objectives.mixtures import CHORD, HPT, UFT
from grao_fast.objectives.policy_gradient import REINFORCE, RLOO
from grao_fast.objectives.rft import RFT
from grao_fast.objectives.sft import SFT

NAN = math.nan
K, M = 5, 8
# Groups: any, dead, of one scored sample, without a reference, with absent sequences and a
# reference without a reward, without a scored sample, dead but for the reference, ties.
REWARDS_NK = torch.tensor(
    [
        [0.3, -1.0, 0.7, 0.1, 0.4],
        [0.1, 0.1, 0.1, 0.1, 0.1],
        [0.9, NAN, NAN, NAN, 0.2],
        [0.0, 1.0, 0.0, 1.0, NAN],
        [NAN, 2.0, -0.5, 0.25, NAN],
        [NAN, NAN, NAN, NAN, 1.0],
        [-0.2, -0.2, -0.2, -0.2, 1.0],
        [1.0, 1.0, 0.0, 1.0, 0.5],
    ],
    dtype=torch.float64,
)
LENGTH_NK = torch.tensor(
    [
        [3, 1, 8, 2, 5],
        [2, 2, 1, 3, 4],
        [4, 0, 0, 0, 1],
        [1, 1, 2, 5, 0],
        [0, 2, 0, 7, 3],
        [0, 0, 0, 0, 2],
        [1, 2, 1, 1, 6],
        [2, 3, 1, 4, 1],
    ]
)
N = len(REWARDS_NK)


@dataclass(frozen=True)
class Case:
    """An objective, its specification, and the progress of the run."""

    objective: Objective
    formula: Callable[..., Tensor]
    options: dict[str, Any]
    progress: float = 0.0


def chord(progress: float, **options: Any) -> Case:
    objective = CHORD(**options)
    mu = mixtures.chord_mu(
        progress,
        start=objective.mu_start,
        end=objective.mu_end,
        decay=objective.decay,
        schedule=objective.schedule,
    )
    return Case(objective, mixtures.chord_loss, {"mu": mu, "phi": objective.phi}, progress)


def uft(progress: float, **options: Any) -> Case:
    objective = UFT(**options)
    share = mixtures.uft_hint_share(
        progress, start=objective.hint_start, end=objective.hint_end, decay=objective.decay
    )
    options = {"hint_coef": objective.hint_coef, "hint_share": share}
    return Case(objective, mixtures.uft_loss, options, progress)


def hpt(gate: float, sft_coef: float) -> Case:
    options = {"gate": gate, "sft_coef": sft_coef}
    return Case(HPT(**options), mixtures.hpt_loss, {**options, "max_new_tokens": M})


def rft(best: int | None = 1, threshold: float | None = None) -> Case:
    options = {"best": best, "threshold": threshold}
    return Case(RFT(**options), supervised.rft_loss, options)


CASES = {
    "sft": Case(SFT(), supervised.sft_loss, {}),
    "rft": rft(),
    "rft_best_2": rft(best=2),
    "rft_threshold": rft(best=None, threshold=0.25),
    "rft_best_2_above": rft(best=2, threshold=0.5),
    "awr": Case(AWR(), supervised.awr_loss, {"temperature": 1.0, "cap": 20.0}),
    "awr_capped": Case(
        AWR(temperature=0.3, cap=2.0), supervised.awr_loss, {"temperature": 0.3, "cap": 2.0}
    ),
    "reinforce": Case(REINFORCE(), policy_gradient.reinforce_loss, {}),
    "rloo": Case(RLOO(), policy_gradient.rloo_loss, {}),
    "grpo": Case(GRPO(), policy_gradient.grpo_loss, {}),
    "grpo_sample": Case(GRPO(sigma="sample"), policy_gradient.grpo_loss, {"sigma": "sample"}),
    "dr_grpo": Case(DrGRPO(), policy_gradient.dr_grpo_loss, {"max_new_tokens": M}),
    "chord": chord(0.2),
    "chord_late": chord(0.9, schedule="cosine"),
    "chord_cosine": chord(0.1, schedule="cosine", decay=0.3),
    "chord_phi": chord(0.2, phi=True),
    "uft": uft(0.25),
    "uft_strong": uft(0.0, hint_coef=0.1),
    "uft_late": uft(0.7),
    "hpt": hpt(0.0, 1.0),
    "hpt_gate": hpt(0.3, 0.3),
}
RATIOS = [name for name, case in CASES.items() if "old_logprob_T" in case.formula.__annotations__]


def groups_of(case: Case, rewards_NK: Tensor = REWARDS_NK, length_NK: Tensor = LENGTH_NK) -> Groups:
    return Groups(rewards_NK, length_NK, max_new_tokens=M, progress=case.progress)


def coefficients(case: Case, *tensors: Tensor) -> Tensor:
    return case.objective.coefficients(groups_of(case, *tensors))
