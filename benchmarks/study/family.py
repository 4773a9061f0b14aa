"""The methods that `grao_fast.train` has: SFT, GRPO, GRAO and its variants."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from typing import Any

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.config import GRAOConfig
from grao_fast.objectives import make_objective
from grao_fast.sampling.loaded import LoadedPolicy
from study.arms import Meter, Problem


@dataclass(frozen=True)
class Trained:
    """An arm: `grao_fast.train` with some options of `GRAOConfig`."""

    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, problem: Problem, *, learning_rate: float, meter: Meter) -> None:
        budget = problem.budget
        samples = make_objective(self.options.get("objective", "grao")).needs_samples
        options: dict[str, Any] = {
            "prompts_per_step": budget.prompts_per_step,
            "max_steps": budget.steps,
            "temperature": budget.temperature,
            "max_new_tokens": budget.max_new_tokens,
            "learning_rate": learning_rate,
        }
        if samples:
            options |= SAMPLING | {"num_generations": budget.num_generations}
        config = GRAOConfig(**FIXED | options | self.options, seed=problem.seed)
        with tempfile.TemporaryDirectory() as folder:
            grao_fast.train(
                problem.model,
                problem.rows,
                problem.reward if samples else None,
                config=config,
                tokenizer=problem.tokenizer,
                callbacks=[_Steps(meter)],
                output_dir=folder,
            )


class _Steps(Callback):
    """Tells a meter of every step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, policy: LoadedPolicy, config: GRAOConfig) -> None:
        self._meter.restart()
        self._samples = config.prompts_per_step * config.num_generations

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        length = metrics.get("completions/mean_length", 0.0)
        self._meter.step(sampled=round(self._samples * length))


FIXED: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "save_steps": 0,
    "log_completions_steps": 0,
    "gradient_checkpointing": False,
    "max_tokens_per_microbatch": 8000,
    "workspace_mib": 64,
    "disable_tqdm": True,
    "device": "cpu",
}
SAMPLING: dict[str, Any] = {"generation_batch_size": 1024}
