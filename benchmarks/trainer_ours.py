"""A run by `grao_fast.train`, which is clocked; and what it samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer_problem import Run, Samples, Settings, order_of, tokens_of

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.data.encoder import Encoder
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.state import step_seed


def samples_of(
    model_folder: Path, rows: Sequence[dict[str, Any]], settings: Settings
) -> list[Samples]:
    """What `grao_fast.train` samples in every step of a run whose learning rate is 0."""
    loaded = load_policy(model_folder, config=config_of(settings), trained=False)
    encoder, stream = Encoder(loaded.tokenizer), order_of(rows, settings)
    steps = []
    for step in range(settings.steps):
        own = [rows[i] for i in stream.batch(step)]
        encoded = encoder.encode(*([row[name] for row in own] for name in ("prompt", "reference")))
        prompts = [each.prompt for each in encoded]
        groups = sample(loaded.sampler, prompts, settings, step)
        steps.append(pairs_of(prompts, groups))
    return steps


def sample(sampler: Any, prompts: list[list[int]], settings: Settings, step: int) -> list:
    return sampler.sample(
        prompts,
        num_generations=settings.samples,
        max_new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        seeds=prompt_seeds(step_seed(settings.seed, step), len(prompts)),
    )


def pairs_of(prompts: list[list[int]], groups: list) -> Samples:
    pairs = zip(prompts, groups, strict=True)
    return [(prompt, each.token_ids) for prompt, group in pairs for each in group]


def config_of(settings: Settings) -> grao_fast.GRAOConfig:
    return grao_fast.GRAOConfig(
        prompts_per_step=settings.prompts,
        num_generations=settings.samples,
        max_new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        max_steps=settings.steps,
        max_tokens_per_microbatch=1,  # one group
        gradient_checkpointing=False,
        seed=settings.seed,
        device="cpu",
        bf16=False,
        save_steps=0,
        log_completions_steps=0,
        disable_tqdm=True,
    )


def train_ours(model, tokenizer, rows, settings: Settings, run: Run, folder: str) -> None:
    callback = _OurSteps(run, settings)
    grao_fast.train(
        model,
        rows,
        run.reward(),
        config=config_of(settings),
        tokenizer=tokenizer,
        callbacks=[callback],
        output_dir=folder,
    )


class _OurSteps(Callback):
    """Clocks whole steps, and the phases by the run's own metrics."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings = run, settings

    def _begin(self, step: int) -> None:
        self.run.begin(step)
        self.started = time.perf_counter()

    def on_train_begin(self, policy: Any, config: Any) -> None:
        sample = policy.sampler.sample

        def keeping(prompts: list[list[int]], **options: Any) -> Any:
            groups = sample(prompts, **options)
            self.run.sampled = pairs_of(prompts, groups)
            return groups

        policy.sampler.sample = keeping
        self._begin(0)

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        took = time.perf_counter() - self.started
        tokens = tokens_of(self.run.sampled)
        figures = {
            "step": took,
            "sample": metrics["time/sample"],
            "score": metrics["time/reward"],
            "update": took - metrics["time/sample"] - metrics["time/reward"],
            "own_tokens": tokens,
            "learned_tokens": tokens,
        }
        names = ("loss", "grad_norm", "reward", "reference/logprob")
        self.run.end(step - 1, figures | {name: metrics[name] for name in names})
        if step < self.settings.steps:
            self._begin(step)
