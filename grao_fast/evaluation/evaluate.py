"""`evaluate`: answer a dataset's prompts; measure RAS, NAG and the mean reward."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from grao_fast.config import GRAOConfig, SamplingOptions
from grao_fast.data.encoding import check_templates
from grao_fast.data.examples import Example, load_examples
from grao_fast.evaluation.answers import Answers, answers_of
from grao_fast.evaluation.compare import RewardSpec, evaluate_completions
from grao_fast.evaluation.pass_at_k import check_samples
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.models.attention.frequencies import hold_frequencies_of
from grao_fast.models.checks import check_given, restores_models
from grao_fast.models.loading import existing_path, load_tokenizer
from grao_fast.models.placement import Placement, world_of
from grao_fast.rewards import resolve_reward
from grao_fast.rewards.functions import ready
from grao_fast.rewards.limits import longest
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError
from grao_fast.system.files import writable_folder, write_file
from grao_fast.system.interruption import stoppable
from grao_fast.system.lines import COMPLETIONS_FILE, METRICS_FILE, write_lines
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import visible_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

RESULT_FILE = "eval.json"


@stoppable
@lenient_streams()
@visible_errors()
@restores_models
def evaluate(
    model: str | Path | nn.Module,
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    reward: RewardSpec,
    *,
    base_model: str | Path | nn.Module | None = None,
    config: GRAOConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metric: RewardSpec | None = None,
    output_dir: str | Path | None = None,
) -> EvaluationResult:
    """Answer a dataset's prompts greedily and measure RAS, NAG and the mean reward.

    Args:
        model: a folder or hub id of a model, or of an adapter, which is put on the base that it
            names; or a Transformers causal language model, or a PeftModel.
        dataset: as `grao_fast.train` takes it; of several splits, "test".
        reward: as `grao_fast.train` takes it.
        base_model: the model before alignment, for NAG; loaded after `model` has answered, so that
            only one is in memory.
        config: `reward_type`, `reward_weights`, `reward_timeout`, the lengths,
            `generation_batch_size`, `cache_implementation`, `device`, `bf16` and `seed` are read;
            and, for pass@k, `num_generations_eval` and `temperature`.
        tokenizer: of both models; None loads the one beside each.
        metric: a held-out measure, called as a pointwise reward is; samples are scored by it alone.
        output_dir: where eval.json and completions.jsonl are written; None: they are not.

    With several processes, each answers its share of the prompts, rank 0 scores, and all return
    the result.

    Raises:
        ValueError: as `grao_fast.train`; use_vllm is set; output_dir cannot be written, or is that
            of a training run, whose completions.jsonl would be overwritten.
        RewardError: the reward or the metric failed.
        Preempted: SIGTERM or SIGHUP came; a SystemExit of status 143 or 129.
    """
    # Without gradients and packing, models that cannot be trained can still be evaluated.
    config = config or GRAOConfig()
    if config.use_vllm:
        raise UserError("evaluate samples with Transformers: leave use_vllm and vllm_* out")
    config = config.replace(
        gradient_checkpointing=False,
        share_prefix=False,
        attention_backend="auto",
        use_liger_kernel=False,
        kl_coef=0.0,
    )
    with world_of(config) as world:
        check_samples(config.num_generations_eval, metric)
        check_given("model", model)
        if base_model is not None:
            check_given("base_model", base_model)
        folder = None
        if output_dir is not None:
            folder = world.main(lambda: _result_folder(Path(output_dir).expanduser()))
        examples = load_examples(dataset, split="test")
        scorer = resolve_reward(
            reward, weights=config.reward_weights, timeout=config.reward_timeout
        )
        scorer.check(examples, reward_type=config.reward_type)
        if metric is not None:
            metric = resolve_reward(metric, timeout=longest(config.reward_timeout))
            metric.check(examples, reward_type="pointwise")
        for each in filter(None, (scorer, metric)):
            each.check_ready()
        for named in (model, base_model):
            if isinstance(named, (str, Path)):
                existing_path(named)
        if not isinstance(model, nn.Module):
            check_templates(examples, tokenizer or load_tokenizer(model))

        options = {"config": config, "trained": False, "world": world}
        loaded = load_policy(model, tokenizer=tokenizer, **options)
        beside = Placement.beside(loaded.policy)
        examples, answers = _answer(loaded, examples, config.sampling, seed=config.seed)
        baseline = None
        if base_model is not None:
            if isinstance(base_model, nn.Module) and tokenizer is None:
                tokenizer = loaded.tokenizer
            del loaded  # frees the model before the next is loaded
            base = load_policy(base_model, tokenizer=tokenizer, **options)
            # Both answer the same prompts; those that were too long have been dropped.
            asked = [replace(each, reference=None) for each in examples]
            greedy = replace(config.sampling, max_prompt_length=None, num_generations_eval=None)
            baseline = _answer(base, asked, greedy, seed=config.seed)[1].greedy

        def compare() -> EvaluationResult:
            result = evaluate_completions(
                scorer,
                examples,
                answers.greedy,
                baseline=baseline,
                reward_type=config.reward_type,
                metric=metric,
                samples=answers.samples,
                seed=config.seed,
            )
            if folder is not None:
                write_file(folder / RESULT_FILE, json.dumps(result.to_dict(), indent=1) + "\n")
                write_lines(folder / COMPLETIONS_FILE, result.rows)
            return result

        for each in filter(None, (scorer, metric)):
            each.place(beside)
        with ready(scorer, metric):
            return world.main(compare)


def _answer(
    loaded: LoadedPolicy, examples: Sequence[Example], sampling: SamplingOptions, *, seed: int
) -> tuple[list[Example], Answers]:
    """The examples that fit the model, and its answers."""
    encoded = loaded.encode(examples, sampling, trained=False)
    hold_frequencies_of(loaded.causal_lm, (), encoded, sampling)
    answers = answers_of(loaded, encoded, sampling, seed=seed)
    return [item.scored for item in encoded], answers


def _result_folder(folder: Path) -> Path:
    if (folder / METRICS_FILE).exists():
        raise UserError(
            f"output_dir {str(folder)!r} is that of a training run, whose {COMPLETIONS_FILE} would "
            f"be overwritten: choose another"
        )
    return writable_folder(folder)
