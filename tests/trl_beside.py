"""Runs of GRPOTrainer and GRAOTrainer that begin from the same seed, model and data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.grpo_trainer as trls
from datasets import Dataset
from torch import nn
from trl_runs import config, token_ids

from grao_fast.integrations.trl import GRAOTrainer

WORDS = ["better than", "explicit is", "simple", "complex or not", "flat", "sparse is better"]
OF_TRAINER = (
    "eval_dataset", "reward_processing_classes", "peft_config", "tools", "environment_factory",
    "rollout_func", "processing_class",
)  # fmt: skip


def texts(**columns: Any) -> Dataset:
    rows = [{"prompt": word, "reference": f" {word}!", "value": n} for n, word in enumerate(WORDS)]
    return Dataset.from_list([row | columns for row in rows])


def messages(**columns: Any) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": word}], "reference": word} for word in WORDS]
    return Dataset.from_list([row | columns for row in rows])


def stream() -> Any:
    return texts().to_iterable_dataset()


def said(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def letters(completions: list, **_: Any) -> list[float]:
    return [float(sum(map(ord, said(each))) % 11) for each in completions]


class Recording:
    """Keeps rollouts as they are before a shuffle, and what steps are given."""

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.rollouts = [*getattr(self, "rollouts", []), (inputs, output)]
        return output

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.given = [*getattr(self, "given", []), inputs]
        return super().training_step(model, inputs, num_items_in_batch)


class OfTRL(Recording, trls.GRPOTrainer):
    pass


class OfGRAO(Recording, GRAOTrainer):
    pass


def make(kind: type, model: Any, folder: Path, rewards: Any, data: Any, **options: Any) -> Any:
    """A trainer; options that are none of its parameters are of its arguments."""
    named = {name: options.pop(name) for name in OF_TRAINER if name in options}
    defaults = {"num_generations": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
    args = config(folder, **(defaults | options))
    rewards = list(rewards) if isinstance(rewards, list) else rewards  # to which TRL writes
    return kind(str(model) if isinstance(model, Path) else model, rewards, args, data, **named)


def both(
    *arguments: Any, speak: Callable[[list[str]], list[str]] | None = None, **options: Any
) -> tuple[Any, Any]:
    """Trained by TRL, and by GRAOTrainer; each loads the model again.

    speak: the model's turns for these prompts, in place of sampling.
    """
    trainers = [make(kind, *arguments, **options) for kind in (OfTRL, OfGRAO)]
    for trainer in trainers:
        trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
        if speak is not None:
            trainer.model.generate = partial(_generate, trainer._tokenizer, speak)
        torch.manual_seed(0)
        trainer.train()
    return trainers[0], trainers[1]


def _generate(tokenizer: Any, speak: Callable, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    turns = [f"{text}<|im_end|>" for text in speak(tokenizer.batch_decode(input_ids))]
    ids = [torch.tensor(tokenizer(turn)["input_ids"]) for turn in turns]
    return torch.cat([input_ids, nn.utils.rnn.pad_sequence(ids, batch_first=True)], dim=1)


def weights(trainer: Any) -> list[tuple[str, torch.Tensor]]:
    return list(trainer.model.named_parameters())


def moved(trainer: Any) -> set[str]:
    return {name for name, each in weights(trainer) if not torch.equal(each, trainer.began[name])}


def assert_sampled_alike(theirs: Any, ours: Any) -> None:
    """The same rows and completions in the first rollout, and the same metrics of them."""
    (their_rows, their_batch), (rows, batch) = theirs.rollouts[0], ours.rollouts[0]
    assert rows == their_rows
    for name in {"prompt_ids", "completion_ids", "completion_mask", "tool_mask"} & set(their_batch):
        assert torch.equal(batch[name], their_batch[name]), name
    expected, logged = theirs.state.log_history[0], ours.state.log_history[0]
    shared = ("reward", "reward_std", "num_tokens", "completions/", "rewards/", "tools/", "samp")
    names = [name for name in expected if name.startswith(shared)]
    assert len(names) >= 12
    for name in names:
        value = expected[name]  # None for a reward that gives none
        assert logged[name] == (value and pytest.approx(value, rel=1e-5)), name


def stepping(model: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A trainer after its run, and the gradients of its first step."""
    trainer = make(OfGRAO, model, folder, letters, texts(), **options)
    gradients: dict[str, torch.Tensor] = {}
    trainer.create_optimizer()

    def keep(*_: Any) -> None:
        if not gradients:
            trained = ((name, each) for name, each in weights(trainer) if each.requires_grad)
            gradients.update((name, each.grad.clone()) for name, each in trained)

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return trainer, gradients


def group_of(trainer: Any) -> tuple[list, torch.Tensor]:
    """The one group of the first rollout with its reference, and its rewards by `letters`."""
    rows, batch = trainer.rollouts[0]
    tokenizer = trainer._tokenizer
    answer = [*tokenizer(rows[0]["reference"])["input_ids"], tokenizer.eos_token_id]
    pairs = token_ids(batch)
    sequences = [*[ids for _, ids in pairs], answer]
    spoken = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    rewards_NK = torch.tensor([letters(spoken)], dtype=torch.float64)
    return [(pairs[0][0], sequences)], rewards_NK
