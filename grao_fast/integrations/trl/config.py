"""GRAO's own options in TRL, in its arguments or as keywords of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from grao_fast.kernels.advantage import REFERENCE_ADVANTAGES, STATISTICS
from grao_fast.kernels.checks import check_choice, check_number
from grao_fast.system.errors import UserError


@dataclass
class GRAOTrainerConfig(GRPOConfig):
    """TRL's `GRPOConfig` with the options of GRAO's objective; `loss_type` is "grpo".

    `trl.TrlParser` and `transformers.HfArgumentParser` make a command line of it.

    Args:
        grao_beta, grao_lam: weights of imitation and of the alignment regulariser.
        statistics, reference_advantage: as in `grao_fast.kernels.linear_grao_loss`.
        share_prefix: compute each prompt once for its sequences in a micro-batch, in one row
            without padding; False: once for each of them. None: once where the model allows it and
            its attention is "sdpa" or "eager".
    """

    loss_type: str = field(
        default="grpo",
        metadata={"help": "GRAO's loss enters a sequence by its mean log-prob, as TRL's 'grpo'."},
    )
    grao_beta: float = field(default=0.5, metadata={"help": "Weight of imitation."})
    grao_lam: float = field(default=0.6, metadata={"help": "Weight of the alignment regulariser."})
    statistics: str = field(
        default="group",
        metadata={"help": f"Rewards that advantages compare with: {', '.join(STATISTICS)}."},
    )
    reference_advantage: str = field(
        default="floor",
        metadata={"help": f"Sign of references' weights: {', '.join(REFERENCE_ADVANTAGES)}."},
    )
    share_prefix: bool | None = field(
        default=None,
        metadata={"help": "Compute a prompt once for its samples; unset: where the model can."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check({name: getattr(self, name) for name in _OWN})


_OWN = ("grao_beta", "grao_lam", "statistics", "reference_advantage", "share_prefix")
_DEFAULTS = {each.name: each.default for each in fields(GRAOTrainerConfig) if each.name in _OWN}


def own_options(args: GRPOConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The options of `GRAOTrainerConfig`, from `args` or else from the trainer's keywords.

    given: GRAO's options among the keywords, None where left out. They are for a plain
        `GRPOConfig`; UserError if there is one beside a `GRAOTrainerConfig`.
    """
    stated = {name: value for name, value in given.items() if value is not None}
    if isinstance(args, GRAOTrainerConfig):
        if stated:
            name, value = next(iter(stated.items()))
            raise UserError(
                f"{name}={value!r} is a keyword of GRAOTrainer, and args is a GRAOTrainerConfig, "
                f"which has {name}={getattr(args, name)!r}: set it there alone"
            )
        stated = {name: getattr(args, name) for name in _OWN}
    options = _DEFAULTS | stated
    _check(options)
    return options


def objective_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `grao_fast.kernels.advantage.advantages_and_terms`."""
    return {
        "statistics": options["statistics"],
        "reference_advantage": options["reference_advantage"],
        "beta": options["grao_beta"],
        "lam": options["grao_lam"],
    }


def _check(options: dict[str, Any]) -> None:
    check_number("grao_beta", options["grao_beta"])
    check_number("grao_lam", options["grao_lam"])
    check_choice("statistics", options["statistics"], STATISTICS)
    check_choice("reference_advantage", options["reference_advantage"], REFERENCE_ADVANTAGES)
    check_choice("share_prefix", options["share_prefix"], (True, False, None))
