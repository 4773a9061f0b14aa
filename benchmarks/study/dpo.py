"""DPO (arXiv 2305.18290, Eq. 7), by TRL's `DPOTrainer`, on the study's prompts and rewards.

    loss = -mean log sigmoid(beta (log pi(w)/pi_0(w) - log pi(l)/pi_0(l)))

pi_0 is the base model. It is offline: the base model samples G completions for the prompts of all
steps, and each group gives one pair, w the best and l the worst of its answers by reward, the
reference among them. A group whose rewards are all equal gives none. beta is 0.1, the default of
the paper and of TRL (1.16).

A step takes as many pairs as other methods take prompts, in the order in which prompts were drawn;
when none is left, the first come again. So after each step, the samples that the run has used are
those of the first groups only, and these are what the meter counts. Its seconds hold the sampling
of all groups, and TRL's tokenisation, from the first step on.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from grao_fast.config import GRAOConfig
from study.arms import Meter, Problem
from study.samples import Samples, Sampling, config_of

if TYPE_CHECKING:
    from trl.trainer.dpo_trainer import DPOTrainer


class Pair(NamedTuple):
    """A prompt with the best and the worst of its answers, as text and as tokens.

    best_ids, worst_ids: tokens of a sample as they were sampled; None for the reference.
    group: place of its group among all that were sampled.
    """

    prompt: str
    best: str
    worst: str
    best_ids: list[int] | None
    worst_ids: list[int] | None
    group: int


def pairs_of(samples: Samples, *, first: int = 0) -> list[Pair]:
    """The pairs of a step's groups: of equal rewards, the first sample counts, references last.

    first: place of the first group among all that were sampled.
    """
    pairs = []
    for n, rewards_K in enumerate(samples.rewards_NK):
        rewards = rewards_K.tolist()
        known = [k for k, reward in enumerate(rewards) if reward == reward]  # not NaN
        if not known:
            continue
        best, worst = max(known, key=rewards.__getitem__), min(known, key=rewards.__getitem__)
        if rewards[best] == rewards[worst]:
            continue
        texts = [*samples.texts[n], samples.references[n]]
        ids = [*(completion.token_ids for completion in samples.completions[n]), None]
        pairs.append(
            Pair(samples.prompts[n], texts[best], texts[worst], ids[best], ids[worst], first + n)
        )
    return pairs


@dataclass(frozen=True)
class DPO:
    """An arm; see the top of this module."""

    beta: float = 0.1

    def __call__(self, problem: Problem, *, learning_rate: float, meter: Meter) -> None:
        config = config_of(problem, learning_rate=learning_rate)
        sampling = Sampling(problem, config)
        importlib.import_module("trl.trainer.dpo_trainer")  # takes seconds that are no training
        meter.restart()
        pairs, tokens = [], []
        for step in range(config.max_steps):
            samples = sampling.step(step)
            pairs += pairs_of(samples, first=len(tokens))
            tokens += [sum(len(c.token_ids) for c in group) for group in samples.completions]
        used = _used(pairs, tokens, config.max_steps, config.prompts_per_step)
        callback = _Steps(problem.model, meter, used)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(problem, pairs, config, self.beta, folder, callback)
            trainer.train()


def make_trainer(
    problem: Problem,
    pairs: Sequence[Pair],
    config: GRAOConfig,
    beta: float,
    folder: str,
    callback: TrainerCallback | None = None,
) -> DPOTrainer:
    """A trainer of a copy of the problem's model, to which TRL adds a method of its own.

    TRL is imported here, so that tables of results do not need it.
    """
    if not pairs:
        raise ValueError("no group has two different rewards: DPO has no pair to learn from")
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    arguments = DPOConfig(
        output_dir=folder,
        beta=beta,
        max_length=None,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.prompts_per_step,
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    disable_progress_bar()
    rows = [{"prompt": p.prompt, "chosen": p.best, "rejected": p.worst} for p in pairs]
    trainer = DPOTrainer(
        copy.deepcopy(problem.model),
        copy.deepcopy(problem.model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=problem.tokenizer,
        callbacks=None if callback is None else [callback],
    )
    trainer.remove_callback(PrinterCallback)  # of every log, where there is no progress bar
    check_tokens(trainer.train_dataset, pairs, problem)
    return trainer


def check_tokens(dataset: Any, pairs: Sequence[Pair], problem: Problem) -> None:
    """Raise ValueError unless TRL's tokens are those of the prompt, the answer and its end.

    TRL ends every answer, also one that was cut at the most tokens of a sample.
    """
    end = [problem.tokenizer.eos_token_id]

    def expected(text: str, sampled: list[int] | None) -> list[int]:
        ids: list[int] = problem.tokenizer(text)["input_ids"] if sampled is None else sampled
        return ids if ids[-1:] == end else ids + end

    for row, pair in zip(dataset, pairs, strict=True):
        theirs = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
        ours = (
            problem.tokenizer(pair.prompt)["input_ids"],
            expected(pair.best, pair.best_ids),
            expected(pair.worst, pair.worst_ids),
        )
        if theirs != ours:
            raise ValueError(f"TRL's tokens of a pair are {theirs}, those sampled are {ours}")


def _used(pairs: Sequence[Pair], tokens: Sequence[int], steps: int, batch: int) -> list[int]:
    """Tokens that were sampled for the groups up to the last pair of each step; at the end, all."""
    until = [0, *accumulate(tokens)]
    places = [min(step * batch, len(pairs)) - 1 for step in range(1, steps + 1)]
    used = [until[pairs[place].group + 1] for place in places]
    return [*used[:-1], until[-1]]


class _Steps(TrainerCallback):
    """Brings the weights back after every step, and tells a meter of it."""

    def __init__(self, model: PreTrainedModel, meter: Meter, used: Sequence[int]) -> None:
        self._model, self._meter, self._used = model, meter, [0, *used]

    def on_step_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        with torch.no_grad():
            self._model.load_state_dict(trained["model"].state_dict())
        step = state.global_step
        self._meter.step(sampled=self._used[step] - self._used[step - 1])
