"""Objectives of a token's own log-prob, and of whole sequences, each with its specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from grao_fast.kernels.reference_objectives import own_logprob, sequence_level
from grao_fast.objectives.base import Objective
from grao_fast.objectives.cispo import CISPO
from grao_fast.objectives.dapo import DAPO
from grao_fast.objectives.dft import DFT
from grao_fast.objectives.dpo import DPO
from grao_fast.objectives.gspo import GSPO
from grao_fast.objectives.luffy import LUFFY
from grao_fast.objectives.srft import SRFT


class Case(NamedTuple):
    """An objective, its formula, and steps to old log-probs that reach its clips on both sides.

    inputs: what the formula takes before `sequence_T` and `rewards_NK`, by name.
    """

    objective: Objective
    formula: Callable[..., Tensor]
    inputs: tuple[str, ...]
    options: dict[str, Any]
    steps: list[float]

    def loss(self, given: dict[str, Tensor]) -> Tensor:
        inputs = (given[name] for name in (*self.inputs, "sequence_T", "rewards_NK"))
        return self.formula(*inputs, **self.options)


STEPS = [0.1, -0.5, 0.0, 0.5, -0.1]  # ratios of tokens beyond 0.8 and 1.28
FAR_STEPS = [0.1, -3.0, 0.0, 2.0, -0.1, 1.2]  # beyond 5
SEQUENCE_STEPS = [0.02, -0.4, 0.4, -0.3, 0.35]
OWN, OLD, REF = ("logprob_T",), ("logprob_T", "old_logprob_T"), ("logprob_T", "ref_logprob_T")
WITH_ENTROPY = ("logprob_T", "entropy_T")

CASES = {
    "dapo": Case(DAPO(), own_logprob.dapo, OLD, {"low": 0.2, "high": 0.28}, STEPS),
    "cispo": Case(CISPO(), own_logprob.cispo, OLD, {"low": 1.0, "high": 4.0}, FAR_STEPS),
    "luffy": Case(LUFFY(), own_logprob.luffy, OLD, {"low": 0.2, "high": 0.2}, STEPS),
    "dft": Case(DFT(), own_logprob.dft, OWN, {}, STEPS),
    "gspo": Case(
        GSPO(low=0.2, high=0.28),
        sequence_level.gspo,
        OLD,
        {"low": 0.2, "high": 0.28},
        SEQUENCE_STEPS,
    ),
    "gspo_default": Case(
        GSPO(), sequence_level.gspo, OLD, {"low": 3e-4, "high": 4e-4}, SEQUENCE_STEPS
    ),
    "dpo": Case(DPO(), sequence_level.dpo, REF, {"beta": 0.1}, STEPS),
    "dpo_smoothed": Case(
        DPO(beta=2.0, label_smoothing=0.2),
        sequence_level.dpo,
        REF,
        {"beta": 2.0, "label_smoothing": 0.2},
        STEPS,
    ),
    "srft": Case(SRFT(), sequence_level.srft, WITH_ENTROPY, {}, STEPS),
    "srft_threshold": Case(
        SRFT(threshold=0.8), sequence_level.srft, WITH_ENTROPY, {"threshold": 0.8}, STEPS
    ),
}
