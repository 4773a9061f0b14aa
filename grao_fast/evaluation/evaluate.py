"""How often a model beats its references and the model it came from: RAS and NAG.

R(a, b) > 0 means that answer a is better than b. A pairwise reward says so itself; a pointwise
one by the difference R(a) - R(b). Over the prompts, with greedy answers o, references y, and
answers of the aligned model (post) and of the base model (pre):

    RAS              share with R(o, y) > 0
    ras_win_or_tie   share with R(o, y) >= 0
    NAG              (wins - losses) / all, of R(post, pre)
    nag_wins         share with R(post, pre) > 0

The paper (arXiv 2508.07750) counts a win in RAS as R > 0 in one place and R >= 0 in its appendix,
so both are reported. It prints NAG as the share with R(post) > R(pre), and a table in which a NAG
is negative, which no share can be: `nag` is the reading that can, `nag_wins` the printed one.

Intervals are 95% percentile bootstrap intervals over prompts, of 10,000 resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grao_fast.config import GRAOConfig, RewardType
from grao_fast.data.encoding import Limits, check_templates, encode_examples
from grao_fast.data.examples import Example, load_examples
from grao_fast.data.fields import answer_text
from grao_fast.evaluation.bootstrap import bootstrap_intervals
from grao_fast.models.attention.frequencies import hold_frequencies, longest_context
from grao_fast.models.checks import gives_models_back
from grao_fast.reporting.tables import results_table
from grao_fast.rewards import Reward, resolve_reward
from grao_fast.system.errors import UserError
from grao_fast.system.files import write_file
from grao_fast.system.interruption import stoppable
from grao_fast.system.lines import COMPLETIONS_FILE, METRICS_FILE, write_lines
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import get_logger, visible_errors
from grao_fast.training.inputs import writable_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from grao_fast.models.policy import Policy
    from grao_fast.rewards.finding import RewardFunction

    RewardSpec = str | RewardFunction | Reward | Sequence[str | RewardFunction]

logger = get_logger(__name__)

RESULT_FILE = "eval.json"

METRICS = ("reward", "ras", "ras_win_or_tie", "nag", "nag_wins", "metric")


@dataclass(frozen=True)
class EvaluationResult:
    """Means over prompts; None where there was nothing to take it over.

    prompts: how many were evaluated.
    reward: mean of R(o), or of R(o, y) where the reward is pairwise.
    ras, ras_win_or_tie, nag, nag_wins: fractions, see the top of this module; RAS needs
        references, NAG completions of a base model.
    metric: mean of the held-out metric.
    intervals: the 95% bootstrap interval (low, high) of every one that is not None.
    rows: for every prompt, what was said and what it scored.
    """

    prompts: int
    reward: float | None
    ras: float | None
    ras_win_or_tie: float | None
    nag: float | None
    nag_wins: float | None
    metric: float | None
    intervals: dict[str, tuple[float, float]]
    rows: list[dict[str, Any]] = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """The means that there are, by name."""
        values = {name: getattr(self, name) for name in METRICS}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: prompts, the means that there are, and `intervals`."""
        intervals = {name: list(interval) for name, interval in self.intervals.items()}
        return {"prompts": self.prompts, **self.metrics(), "intervals": intervals}

    def table(self) -> Table:
        """A table for the terminal; rates in percent."""
        return results_table(self.prompts, self.metrics(), self.intervals)


def evaluate_completions(
    reward: RewardSpec,
    examples: Sequence[Example],
    completions: Sequence[str],
    *,
    baseline: Sequence[str] | None = None,
    reward_type: RewardType,
    metric: RewardSpec | None = None,
    seed: int = 0,
) -> EvaluationResult:
    """Compare completions with the references, and with a baseline's completions.

    Args:
        reward: a reward as `grao_fast.train` takes it.
        examples, completions: one completion of every example.
        baseline: of the base model, for NAG; one for every example.
        reward_type: "pointwise" or "pairwise".
        metric: a held-out measure, called as a pointwise reward is.
        seed: of the bootstrap.

    Raises:
        RewardError: the reward or the metric failed.
        ValueError: not one completion for every example.
    """
    for name, texts in (("completions", completions), ("baseline", baseline)):
        if texts is not None and len(texts) != len(examples):
            raise UserError(f"{name} must hold {len(examples)} texts, got {len(texts)}")
    if not examples:
        raise UserError("there is nothing to evaluate: no examples")
    examples = [replace(each, reference=answer_text(each.reference)) for each in examples]
    scores = _score(resolve_reward(reward), examples, completions, baseline, reward_type)
    if metric is not None:
        scores["metric"] = _tensor(resolve_reward(metric).score(examples, completions))
    per_prompt = {
        "reward": scores["reward"],
        "ras": _where_present(scores["vs_reference"], lambda r: r > 0),
        "ras_win_or_tie": _where_present(scores["vs_reference"], lambda r: r >= 0),
        "nag": _where_present(scores["vs_baseline"], torch.sign),
        "nag_wins": _where_present(scores["vs_baseline"], lambda r: r > 0),
        "metric": scores["metric"],
    }
    absent = int(scores["vs_reference"].isnan().sum())
    if absent:
        logger.warning(
            "%d of %d prompts have no reference or no reward, and are left out of RAS",
            absent, len(examples),
        )  # fmt: skip
    present = {name: values for name, values in per_prompt.items() if not values.isnan().all()}
    means = {name: float(values.nanmean()) for name, values in present.items()}
    return EvaluationResult(
        prompts=len(examples),
        intervals=bootstrap_intervals(present, seed=seed),
        rows=_rows(examples, completions, baseline, scores),
        **{name: means.get(name) for name in METRICS},
    )


@stoppable
@lenient_streams()
@visible_errors()
@gives_models_back
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
        base_model: the model before alignment, for NAG; loaded when `model` has answered, so that
            only one is in memory.
        config: `reward_type`, `reward_weights`, `reward_timeout`, the lengths,
            `generation_batch_size`, `cache_implementation`, `device`, `bf16` and `seed` are read.
        tokenizer: of both models; None loads the one beside each.
        metric: a held-out measure, called as a pointwise reward is.
        output_dir: eval.json and completions.jsonl are written there; None: nowhere.

    Raises:
        ValueError: as `grao_fast.train`; use_vllm is set; output_dir cannot be written, or is that
            of a training run, whose completions.jsonl would be overwritten.
        RewardError: the reward or the metric failed.
        Preempted: SIGTERM or SIGHUP came; a SystemExit of status 143 or 129.
    """
    from grao_fast.models.loading import existing_path, load_tokenizer
    from grao_fast.models.policy import load_policy

    # Neither gradients nor packing: what cannot be trained can still be evaluated.
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
    folder = None if output_dir is None else _result_folder(Path(output_dir).expanduser())
    examples = load_examples(dataset, split="test")
    scorer = resolve_reward(reward, weights=config.reward_weights, timeout=config.reward_timeout)
    scorer.check(examples, reward_type=config.reward_type)
    if metric is not None:
        metric = resolve_reward(metric, timeout=config.reward_timeout)
        metric.check(examples, reward_type="pointwise")
    for named in (model, base_model):
        if isinstance(named, (str, Path)):
            existing_path(named)

    if not isinstance(model, nn.Module):
        check_templates(examples, tokenizer or load_tokenizer(model))
    policy = load_policy(model, config=config, tokenizer=tokenizer, trained=False)
    examples, completions = _answer(policy, examples, config)
    baseline = None
    if base_model is not None:
        if isinstance(base_model, nn.Module) and tokenizer is None:
            tokenizer = policy.tokenizer
        del policy  # frees the model before the next is loaded
        base = load_policy(base_model, config=config, tokenizer=tokenizer, trained=False)
        # Both answer the same prompts: what was too long for the first has been dropped.
        asked = [replace(each, reference=None) for each in examples]
        _, baseline = _answer(base, asked, config.replace(max_prompt_length=None))
    result = evaluate_completions(
        scorer,
        examples,
        completions,
        baseline=baseline,
        reward_type=config.reward_type,
        metric=metric,
        seed=config.seed,
    )
    if folder is not None:
        write_file(folder / RESULT_FILE, json.dumps(result.to_dict(), indent=1) + "\n")
        write_lines(folder / COMPLETIONS_FILE, result.rows)
    return result


def _answer(
    policy: Policy, examples: Sequence[Example], config: GRAOConfig
) -> tuple[list[Example], list[str]]:
    """Greedy answers, and the examples that they answer."""
    encoded = encode_examples(
        examples,
        policy.tokenizer,
        Limits(
            max_new_tokens=config.max_new_tokens,
            context_length=policy.context_length,
            max_prompt_length=config.max_prompt_length,
            embedding_rows=policy.embedding_rows,
        ),
        eos_token_ids=policy.eos_token_ids,
        trained=False,
    )
    hold_frequencies(policy.causal_lm, longest_context((), encoded, config.max_new_tokens))
    texts = policy.answer(
        [item.prompt_ids for item in encoded],
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    return [item.scored for item in encoded], texts


def _result_folder(folder: Path) -> Path:
    if (folder / METRICS_FILE).exists():
        raise UserError(
            f"output_dir {str(folder)!r} is that of a training run, whose {COMPLETIONS_FILE} would "
            f"be overwritten: choose another"
        )
    return writable_folder(folder)


def _score(
    reward: Reward,
    examples: Sequence[Example],
    completions: Sequence[str],
    baseline: Sequence[str] | None,
    reward_type: RewardType,
) -> dict[str, Tensor]:
    """Rewards and comparisons of every prompt, float64; NaN where there is none."""
    absent_N = torch.full((len(examples),), math.nan, dtype=torch.float64)
    scores: dict[str, Tensor] = {"vs_baseline": absent_N, "metric": absent_N}
    groups = [[text] for text in completions]
    if reward_type == "pointwise" and baseline is not None:
        # One call scores them all; a reward that is noisy or slow is asked once for each text.
        groups = [list(pair) for pair in zip(completions, baseline, strict=True)]
    rewards_NK = reward.score_groups(examples, groups, reward_type=reward_type).rewards_NK
    scores["reward"], scores["reference_reward"] = rewards_NK[:, 0], rewards_NK[:, -1]
    scores["vs_reference"] = rewards_NK[:, 0] - rewards_NK[:, -1]
    if baseline is not None and reward_type == "pointwise":
        scores["vs_baseline"] = rewards_NK[:, 0] - rewards_NK[:, 1]
    elif baseline is not None:
        scores["vs_baseline"] = _tensor(
            reward.compare(examples, completions, baseline, reward_type=reward_type)
        )
    return scores


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _where_present(values_N: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The function of every value, NaN of NaN: comparisons and sign() would make it 0."""
    return torch.where(values_N.isnan(), values_N, function(values_N).double())


def _rows(
    examples: Sequence[Example],
    completions: Sequence[str],
    baseline: Sequence[str] | None,
    scores: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    rows = []
    for n, (example, completion) in enumerate(zip(examples, completions, strict=True)):
        row = {
            "prompt": example.prompt,
            "reference": example.reference,
            "completion": completion,
            "baseline": None if baseline is None else baseline[n],
        }
        values = {name: float(values_N[n]) for name, values_N in scores.items()}
        row |= {name: None if math.isnan(value) else value for name, value in values.items()}
        rows.append(row)
    return rows
