"""Runs a tiny model for half a second, for tests of what happens to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import test_trainer
from test_trainer import rarely_equal

from grao_fast.trainer import TrainResult

CONFIG = test_trainer.CONFIG.replace(num_generations=2, max_new_tokens=4, prompts_per_step=2)


def run(model: Any, output: Path, **options: Any) -> TrainResult:
    """Call `train` for six steps, with a checkpoint after every second one."""
    return test_trainer.run(model, output, **({"config": CONFIG, "reward": rarely_equal} | options))
