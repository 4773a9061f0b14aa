"""One run by three trainers: TRL's GRPOTrainer, GRAOTrainer inside TRL, and `grao_fast.train`.

All get the same model, prompts in the same order, references, reward and settings. Through its
`rollout_func`, TRL may be handed the samples of `grao_fast.train`, or its sampler and seeds: with
equal weights, it then samples the same tokens.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from trainer_ours import sample, train_ours
from trainer_problem import (
    GRPO,
    OURS,
    Run,
    Samples,
    Sampling,
    Settings,
    order_of,
    tokens_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import grao_fast
from grao_fast.sampling.cache import kept_by
from grao_fast.sampling.choose import choose_sampler
from grao_fast.sampling.model_sampler import Decoding


def train(
    side: str,
    model_folder: Path,
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    run: Run,
    *,
    sampling: Sampling = "own",
    known: Sequence[Samples] = (),
) -> None:
    """Train by one side.

    sampling: of TRL: as it samples by itself ("own"); by the sampler and seeds of ours ("shared");
        it takes those known, without sampling ("replayed"); or it samples by itself, and takes
        those known in their place ("replaced").
    known: `Run.sampled` of every step of ours, or what `samples_of` returns.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with tempfile.TemporaryDirectory() as folder:
        if side == OURS:
            train_ours(model, tokenizer, rows, settings, run, folder)
        else:
            rollout_func: Any = None
            if sampling == "shared":
                rollout_func = functools.partial(_sample_as_ours, settings)
            elif sampling != "own":
                rollout_func = Replay(settings, known, sampling)
            _train_trl(side, model, tokenizer, rows, settings, run, folder, rollout_func)


def _train_trl(
    side: str,
    model,
    tokenizer,
    rows,
    settings: Settings,
    run: Run,
    folder: str,
    rollout_func: Any,
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
            clock.sample = time.perf_counter() - started
            run.sampled = list(zip(*generated[:2], strict=True))
            replaced = isinstance(rollout_func, Replay) and rollout_func.own
            clock.own_tokens = tokens_of(replaced or run.sampled)
            return generated

        def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
            started = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            clock.score = time.perf_counter() - started - clock.sample
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
    own_tokens: of its own samples.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sample = self.score = self.took = 0.0
        self.own_tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.run.begin(state.global_step)
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        self.took = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        figures = {
            "step": self.took,
            "sample": self.sample,
            "score": self.score,
            "update": self.took - self.sample - self.score,
            "own_tokens": self.own_tokens,
            "learned_tokens": tokens_of(self.run.sampled),
        }
        names = ("loss", "grad_norm", "reward", "reference/logprob")
        figures |= {name: float(logs[name]) for name in names if name in logs}
        self.run.end(state.global_step - 1, figures)


class Replay:
    """A `rollout_func` that returns samples of another run, of the same prompts.

    own: what TRL has sampled itself in the step, if sampling is "replaced".
    """

    def __init__(self, settings: Settings, known: Sequence[Samples], sampling: Sampling) -> None:
        self.settings, self.known, self.sampling = settings, known, sampling
        self.own: Samples = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        prompt_ids, completion_ids = zip(*self.known[trainer.state.global_step], strict=True)
        ids = trainer._tokenize_prompts(prompts)[0]
        assert list(prompt_ids) == ids
        if self.sampling == "replaced":
            own_ids, _ = trainer._generate_single_turn(ids, None, {}, self.settings.samples)
            self.own = list(zip(ids, own_ids, strict=True))
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def _sample_as_ours(settings: Settings, prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A `rollout_func` that samples what `grao_fast.train` does."""
    ids = trainer._tokenize_prompts(prompts)[0]
    model = trainer.accelerator.unwrap_model(trainer.model)
    decoding = Decoding(
        eos_token_ids=frozenset(trainer.eos_token_ids),
        pad_token_id=trainer._tokenizer.pad_token_id,
        batch_size=grao_fast.GRAOConfig().generation_batch_size,
    )
    sampler = choose_sampler(model, kept_by(model, None), decoding, static_cache=False)
    model.eval()
    groups = sample(sampler, ids[:: settings.samples], settings, trainer.state.global_step)
    model.train()
    completions = [each.token_ids for group in groups for each in group]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}
