"""What `train` reads and checks before it loads a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import check_templates
from grao_fast.data.examples import (
    Example,
    Examples,
    check_references,
    load_examples,
)
from grao_fast.data.streaming import StreamedExamples, open_dataset
from grao_fast.evaluation.compare import RewardSpec
from grao_fast.evaluation.pass_at_k import check_samples
from grao_fast.models.loading import load_tokenizer
from grao_fast.models.placement import Placement
from grao_fast.models.policy import Policy
from grao_fast.objectives import Objective
from grao_fast.rewards import Reward, resolve_reward
from grao_fast.rewards.limits import longest
from grao_fast.system.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class Inputs:
    """The examples of a run, and what scores them.

    examples: read as they are drawn.
    eval_examples: held out; None without an eval_dataset.
    reward: None where nothing is sampled.
    metric: scores held-out completions; None: the reward alone does.
    """

    examples: Examples | StreamedExamples
    eval_examples: list[Example] | None
    reward: Reward | None
    metric: Reward | None

    @property
    def sets(self) -> list[Sequence[Example]]:
        """The examples to check, and the held-out ones if any; of a large dataset a sample."""
        return [rows for rows in (self.examples.sample(), self.eval_examples) if rows]

    def place_rewards(self, policy: Policy) -> None:
        """Load the models of rewards beside the policy. Every process must call it."""
        for reward in filter(None, (self.reward, self.metric)):
            reward.place(Placement.beside(policy))

    @property
    def known(self) -> Examples:
        """The examples, or the first of a streaming dataset."""
        return self.examples.head if isinstance(self.examples, StreamedExamples) else self.examples

    def check_templates(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError for examples that the tokenizer's chat template refuses."""
        for rows in self.sets:
            check_templates(rows, tokenizer)


def read_inputs(
    dataset: str | Path | Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    reward: RewardSpec | None,
    *,
    config: GRAOConfig,
    eval_dataset: str | Path | Dataset | Sequence[Mapping[str, Any]] | None,
    metric: RewardSpec | None,
) -> Inputs:
    """Load the datasets and find the reward functions of a run.

    Raises:
        UserError: rows or rewards cannot be used, do not fit each other, or would have no effect.
    """
    timeout, reward_type = config.reward_timeout, config.reward_type
    formula = config.objective_options.formula
    _check_reward(reward, formula, evaluates=eval_dataset is not None)
    inputs = Inputs(
        examples=open_dataset(dataset, split="train", require_references=formula.uses_references),
        eval_examples=None if eval_dataset is None else load_examples(eval_dataset, split="test"),
        reward=None
        if reward is None
        else resolve_reward(reward, weights=config.reward_weights, timeout=timeout),
        metric=None if metric is None else resolve_reward(metric, timeout=longest(timeout)),
    )
    if isinstance(inputs.examples, StreamedExamples):
        _check_stream(config.max_steps, curriculum=config.curriculum)
    for rows in inputs.sets if inputs.reward is not None else []:
        inputs.reward.check(rows, reward_type=reward_type)
    if inputs.metric and inputs.eval_examples:
        inputs.metric.check(inputs.eval_examples, reward_type="pointwise")
    if reward_type == "pairwise":
        for name, rows in zip(("dataset", "eval_dataset"), inputs.sets, strict=False):
            check_references(name, rows)
        inputs.examples.compared = True  # also those that are drawn later
    if eval_dataset is None and metric is not None:
        raise UserError("metric is measured on eval_dataset: pass one, or leave metric out")
    check_samples(config.num_generations_eval, metric)
    if eval_dataset is None and config.eval_steps is not None:
        raise UserError(
            f"eval_steps={config.eval_steps} needs an eval_dataset: pass one, or leave it out"
        )
    for each in filter(None, (inputs.reward, inputs.metric)):
        each.check_ready()
    return inputs


def _check_reward(reward: RewardSpec | None, formula: Objective, *, evaluates: bool) -> None:
    """Raise UserError if there is no reward, and something is to be scored."""
    if reward is None and formula.needs_samples:
        raise UserError(
            "the samples of this objective are scored: pass a reward, or choose an objective that "
            'learns from references alone, such as objective="sft"'
        )
    if reward is None and evaluates:
        raise UserError("answers to eval_dataset are scored: pass a reward, or no eval_dataset")


def _check_stream(max_steps: int, *, curriculum: bool) -> None:
    """Raise UserError for options that a streaming dataset cannot serve."""
    if curriculum:
        raise UserError(
            "curriculum lets prompts of a streaming dataset rest that may never come again: "
            "leave it out"
        )
    if max_steps <= 0:
        raise UserError(
            "a streaming dataset has no length, by which num_train_epochs would be counted: "
            "set max_steps"
        )


def tokenizer_for(
    model: str | Path, tokenizer: PreTrainedTokenizerBase | None, inputs: Inputs
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is not loaded yet, whose chat template takes the examples."""
    tokenizer = tokenizer or load_tokenizer(model)
    inputs.check_templates(tokenizer)
    return tokenizer
