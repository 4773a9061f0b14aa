"""What `train` checks before it loads a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

from grao_fast.config import RewardType
from grao_fast.data.examples import Example
from grao_fast.system.errors import UserError, first_of


def check_one_process() -> None:
    """Refuse a launcher that starts several processes: each would train a model of its own."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(
            f"grao_fast.train runs in one process, and a launcher started {processes} "
            "(WORLD_SIZE); start it with plain python"
        )


def check_references(
    examples: Sequence[Example], eval_examples: Sequence[Example] | None, reward_type: RewardType
) -> None:
    """A pairwise reward compares with the reference: every row needs one."""
    if reward_type != "pairwise":
        return
    for name, rows in (("dataset", examples), ("eval_dataset", eval_examples or [])):
        absent = [i for i, example in enumerate(rows) if example.reference is None]
        if absent:
            raise UserError(
                f"{name}: no reference in row {first_of(absent)}, which a pairwise reward compares "
                'with; leave such rows out or set reward_type="pointwise"'
            )


def check_evaluation(*, has_eval_dataset: bool, has_metric: bool, eval_steps: int | None) -> None:
    """Refuse what would have no effect."""
    if has_eval_dataset:
        return
    if has_metric:
        raise UserError("metric is measured on eval_dataset: pass one, or leave metric out")
    if eval_steps is not None:
        raise UserError(f"eval_steps={eval_steps} needs an eval_dataset: pass one, or leave it out")
