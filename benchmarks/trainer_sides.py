"""One run by three trainers: TRL's GRPOTrainer, GRAOTrainer inside TRL, and `grao_fast.train`.

All get the same model, prompts in the same order, references, reward and settings. TRL's two may
also be handed the sampler of `grao_fast.train`, with its seeds, through their `rollout_func`: with
equal weights, all three then sample the same tokens.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trainer_problem import (
    GRPO,
    OURS,
    Run,
    Samples,
    Sampling,
    Settings,
    order_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.sampling.cache import kept_by
from grao_fast.sampling.choose import choose_sampler
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.state import step_seed


def train(
    side: str,
    model_folder: Path,
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    run: Run,
    *,
    sampling: Sampling = "own",
    replayed: Sequence[Samples] | None = None,
) -> None:
    """Train by one side.

    sampling: of TRL: as it samples by itself; by the sampler and seeds of ours ("shared"); or both,
        where its own samples are dropped, and the time of ours does not count.
    replayed: `Run.sampled` of every step of ours, which TRL takes in place of samples.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with tempfile.TemporaryDirectory() as folder:
        if side == OURS:
            _train_ours(model, tokenizer, rows, settings, run, folder)
        else:
            _train_trl(side, model, tokenizer, rows, settings, run, folder, sampling, replayed)


# grao_fast.train


def _train_ours(model, tokenizer, rows, settings: Settings, run: Run, folder: str) -> None:
    config = grao_fast.GRAOConfig(
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
    callback = _OurSteps(run, settings)
    grao_fast.train(
        model,
        rows,
        run.reward(),
        config=config,
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
            self.run.sampled = [
                (prompt, each.token_ids)
                for prompt, group in zip(prompts, groups, strict=True)
                for each in group
            ]
            return groups

        policy.sampler.sample = keeping
        self._begin(0)

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        took = time.perf_counter() - self.started
        completions = self.settings.prompts * self.settings.samples
        figures = {
            "step": took,
            "sample": metrics["time/sample"],
            "score": metrics["time/reward"],
            "update": took - metrics["time/sample"] - metrics["time/reward"],
            "sampled_tokens": round(metrics["completions/mean_length"] * completions),
        }
        names = ("loss", "grad_norm", "reward", "reference/logprob")
        self.run.end(step - 1, figures | {name: metrics[name] for name in names})
        if step < self.settings.steps:
            self._begin(step)


# TRL


def _train_trl(
    side: str,
    model,
    tokenizer,
    rows,
    settings: Settings,
    run: Run,
    folder: str,
    sampling: Sampling,
    replayed: Sequence[Samples] | None,
) -> None:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from grao_fast.integrations.trl import GRAOTrainer

    base: Any = GRPOTrainer if side == GRPO else GRAOTrainer

    class Clocked(base):
        """Tells the clock what a rollout takes."""

        def _generate(self, prompts: list) -> tuple:
            started = time.perf_counter()
            generated = super()._generate(prompts)
            clock.uncounted = shared.uncounted
            clock.sample = time.perf_counter() - started - clock.uncounted
            run.sampled = list(zip(*generated[:2], strict=True))
            return generated

        def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
            started = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            took = time.perf_counter() - started
            clock.score = took - clock.sample - clock.uncounted
            return batch

    arguments = GRPOConfig(
        folder,
        num_generations=settings.samples,
        per_device_train_batch_size=settings.samples,
        gradient_accumulation_steps=settings.prompts,
        max_completion_length=settings.new_tokens,
        temperature=settings.temperature,
        beta=0.0,
        loss_type="grpo",
        learning_rate=settings.learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_steps=settings.steps,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    clock = _TRLSteps(run)
    shared = SharedSampling(settings, also_own=sampling == "both")
    rollout_func: Any = None if sampling == "own" else shared
    if replayed is not None:
        rollout_func = functools.partial(_replay, replayed)
    stream = order_of(rows, settings)
    trainer = Clocked(
        model,
        reward_funcs=run.reward(),
        args=arguments,
        train_dataset=Dataset.from_list(
            [rows[i] for step in range(settings.steps) for i in stream.batch(step)]
        ),
        processing_class=tokenizer,
        callbacks=[clock],
        rollout_func=rollout_func,
    )
    trainer.train()


class _TRLSteps(TrainerCallback):
    """Clocks whole steps; what is logged after a step completes its figures.

    sample, score: seconds of the rollout.
    uncounted: seconds of the step that are not its own.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sample = self.score = self.uncounted = self.took = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.run.begin(state.global_step)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.took = time.perf_counter() - self.started - self.uncounted

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        figures = {
            "step": self.took,
            "sample": self.sample,
            "score": self.score,
            "update": self.took - self.sample - self.score,
            "sampled_tokens": sum(len(completion) for _, completion in self.run.sampled),
        }
        names = ("loss", "grad_norm", "reward", "reference/logprob")
        figures |= {name: float(logs[name]) for name in names if name in logs}
        self.run.end(state.global_step - 1, figures)


def _replay(steps: Sequence[Samples], prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A `rollout_func` that returns samples of another run, of the same prompts."""
    prompt_ids, completion_ids = zip(*steps[trainer.state.global_step], strict=True)
    assert list(prompt_ids) == trainer._tokenize_prompts(prompts)[0]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


class SharedSampling:
    """A `rollout_func` that samples what `grao_fast.train` does.

    also_own: sample as TRL does without it before that, and drop these samples.
    uncounted: seconds of the shared sampling where it comes second.
    """

    def __init__(self, settings: Settings, *, also_own: bool) -> None:
        self.settings, self.also_own = settings, also_own
        self.uncounted = 0.0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        G = self.settings.samples
        ids = trainer._tokenize_prompts(prompts)[0]
        if self.also_own:
            trainer._generate_single_turn(ids, None, {}, G)
        started = time.perf_counter()
        completions = self._sample(ids[::G], trainer, trainer.state.global_step)
        if self.also_own:
            self.uncounted = time.perf_counter() - started
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def _sample(self, ids: list[list[int]], trainer: Any, step: int) -> list[list[int]]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        decoding = Decoding(
            eos_token_ids=frozenset(trainer.eos_token_ids),
            pad_token_id=trainer._tokenizer.pad_token_id,
            batch_size=grao_fast.GRAOConfig().generation_batch_size,
        )
        sampler = choose_sampler(model, kept_by(model, None), decoding, static_cache=False)
        model.eval()
        groups = sampler.sample(
            ids,
            num_generations=self.settings.samples,
            max_new_tokens=self.settings.new_tokens,
            temperature=self.settings.temperature,
            seeds=prompt_seeds(step_seed(self.settings.seed, step), len(ids)),
        )
        model.train()
        return [each.token_ids for group in groups for each in group]
