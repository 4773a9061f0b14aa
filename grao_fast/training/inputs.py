"""What `train` reads and checks before it loads a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedTokenizerBase

from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import check_templates
from grao_fast.data.examples import (
    Example,
    Examples,
    check_references,
    load_examples,
)
from grao_fast.data.rows import paced
from grao_fast.data.stored import StoredFacts
from grao_fast.data.streaming import StreamedExamples, open_dataset
from grao_fast.evaluation.compare import RewardSpec
from grao_fast.evaluation.pass_at_k import check_samples
from grao_fast.models.loading import load_tokenizer
from grao_fast.models.placement import Placement
from grao_fast.models.policy import Policy
from grao_fast.rewards import Reward, resolve_reward
from grao_fast.rewards.limits import longest
from grao_fast.sampling import Sampler
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = get_logger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The examples of a run, and what scores them.

    config: that of the run, with the options that follow from the dataset.
    examples: read as they are drawn.
    eval_examples: held out; None without an eval_dataset.
    reward: None where nothing is scored.
    metric: scores held-out completions; None: the reward alone does.
    scores: whether the reward scores anything in training; elsewhere it only evaluates.
    """

    config: GRAOConfig
    examples: Examples | StreamedExamples
    eval_examples: list[Example] | None
    reward: Reward | None
    metric: Reward | None
    scores: bool

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
    sampler: Sampler | None = None,
) -> Inputs:
    """Load the datasets and find the reward functions of a run.

    sampler: the user's own, if there is one.

    Raises:
        UserError: rows or rewards cannot be used, do not fit each other, or would have no effect.
    """
    timeout, reward_type = config.reward_timeout, config.reward_type
    formula = config.objective_options.formula
    stored = config.sampler == "dataset"
    evaluates = eval_dataset is not None
    _check_reward(reward, config, evaluates=evaluates)
    if not evaluates:
        _check_sampling(config, sampler)
    examples = open_dataset(
        dataset, split="train", require_references=formula.uses_references, stored=stored
    )
    scores = formula.needs_samples
    if stored:
        assert isinstance(examples, Examples), "a streaming dataset is refused"
        config, scores = _of_stored(examples, config, reward is not None, evaluates)
    inputs = Inputs(
        config=config,
        examples=examples,
        eval_examples=None
        if eval_dataset is None
        else load_examples(eval_dataset, split="test", stored=stored),
        reward=None
        if reward is None
        else resolve_reward(reward, weights=config.reward_weights, timeout=timeout),
        metric=None if metric is None else resolve_reward(metric, timeout=longest(timeout)),
        scores=scores,
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


def _check_reward(reward: RewardSpec | None, config: GRAOConfig, *, evaluates: bool) -> None:
    """Raise UserError for a reward that is missing, or never called, and for options of none."""
    samples = config.objective_options.formula.needs_samples
    if reward is None and samples and config.sampler != "dataset":
        raise UserError(
            "the samples of this objective are scored: pass a reward, or choose an objective that "
            'learns from references alone, such as objective="sft"'
        )
    if reward is None and evaluates:
        raise UserError("answers to eval_dataset are scored: pass a reward, or no eval_dataset")
    if reward is not None and not samples and not evaluates:
        raise UserError(
            f"the reward has no effect with objective={config.objective!r}, which scores nothing "
            "in training: leave it out, or pass an eval_dataset"
        )
    given = {option: getattr(config, option) for option in ("reward_weights", "reward_timeout")}
    if not samples:
        given["reward_type"] = config.reward_type
    for option, value in given.items() if reward is None else ():
        if value != getattr(GRAOConfig, option):
            raise UserError(f"{option}={value!r} has no effect without a reward: leave it out")


# Options of a sampler that this package makes; those of vLLM need use_vllm.
_OF_SAMPLER = ("use_vllm", "generation_batch_size", "cache_implementation")


def _check_sampling(config: GRAOConfig, sampler: Sampler | None) -> None:
    """Raise UserError for a sampler, or an option of one, in a run that samples nothing."""
    if config.sampling.samples_drawn:
        return
    given = {option: getattr(config, option) for option in _OF_SAMPLER}
    changed = [o for o, value in given.items() if value != getattr(GRAOConfig, o)]
    if sampler is not None or changed:
        named = f"{changed[0]}={given[changed[0]]!r}" if changed else "the sampler"
        raise UserError(
            f"{named} has no effect where nothing is sampled, neither in training nor for an "
            "eval_dataset: leave it out"
        )


def sampled_by(
    config: GRAOConfig | None, sampler: Sampler | Literal["dataset"] | None
) -> tuple[GRAOConfig, Sampler | None]:
    """The configuration of a run and the user's sampler, if that is an object."""
    config = config or GRAOConfig()
    if not isinstance(sampler, str):
        return config, sampler
    if sampler != "dataset":
        raise UserError(
            f'sampler={sampler!r}: by name there is "dataset" alone, for stored completions; pass '
            "an object, or leave it out"
        )
    return config.replace(sampler=sampler), None


def _of_stored(
    examples: Examples, config: GRAOConfig, has_reward: bool, evaluates: bool
) -> tuple[GRAOConfig, bool]:
    """The configuration with the options that follow from stored completions, all of them read.

    Returns with it whether a completion or a reference has no stored reward, but needs one.

    Raises UserError for what has no reward, or for options and rewards that have no effect.
    """
    reading = paced(examples, len(examples), "reading the stored completions")
    facts = StoredFacts.of((e.stored, e.reference is not None) for e in reading if e.stored)
    if not facts.largest:
        raise UserError("no row of the dataset stores a completion: `completions` are all empty")
    default = {field.name: field.default for field in fields(GRAOConfig)}
    unscored = "" if not facts.unscored else f"a completion of row {first_of(facts.unscored)}"
    formula, pairwise = config.objective_options.formula, config.reward_type == "pairwise"
    # an objective that imitates every reference asks for no reward of it
    judged = formula.uses_references and not formula.needs_references and not pairwise
    if judged and facts.unscored_references and not unscored:
        unscored = f"the reference of row {first_of(facts.unscored_references)}"
    if unscored and not has_reward:
        raise UserError(
            f"no reward is stored for {unscored}, and there is no reward function: store one "
            "(`rewards`, `reference_reward`), or pass a reward, which then scores what has none"
        )
    if has_reward and not unscored and not evaluates:
        raise UserError(
            "the reward has no effect: every stored completion and reference has its own, and "
            "nothing is evaluated; leave the reward out"
        )
    given = config.num_generations
    if given not in (default["num_generations"], facts.largest):
        raise UserError(
            f"num_generations={given} has no effect on stored completions, of which a row has up "
            f"to {facts.largest}: leave it out"
        )
    changes: dict[str, Any] = {"num_generations": facts.largest}
    name = "vllm_importance_sampling_clip_max"
    if not facts.has_logprobs and not formula.two_passes:
        cap = getattr(config, name)
        if cap not in (default[name], None):
            raise UserError(
                f"{name}={cap} has no effect without stored log-probs: add a column `logprobs`, "
                "or leave it out"
            )
        changes[name] = None
    if facts.has_logprobs and formula.two_passes:
        logger.warning(
            "the stored log-probs have no effect with objective=%r, whose tokens have no "
            "importance weight: completions count as the policy's own",
            config.objective,
        )
    return config.replace(**changes), bool(unscored)


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
