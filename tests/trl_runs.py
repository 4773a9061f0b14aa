"""Runs of GRAOTrainer that keep what they did, and the same by the specification in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig

from grao_fast.integrations.trl import GRAOTrainer
from grao_fast.kernels import reference

EOS = 1
TEMPERATURE = 0.8
# Its name before Transformers 5.24 is the second.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(GRPOConfig, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"


def prompts(kinds: list[str]) -> Dataset:
    """Rows of a kind each, with references of other lengths than the completions'."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "count" + "!" * n}],
                "reference": [{"role": "assistant", "content": "one two three"[: 3 + 4 * (n % 3)]}],
                "kind": kind,
            }
            for n, kind in enumerate(kinds)
        ]
    )


def score(completion: list[dict], kind: str) -> float | None:
    """A number that looks random, the same for all ("dead"), or at times none ("gappy")."""
    total = sum(map(ord, completion[0]["content"]))
    if kind == "dead":
        return 0.5
    return None if kind == "gappy" and total % 3 == 0 else float(total % 7)


def reward(
    completions: list, kind: list[str], log_extra: Any = None, log_metric: Any = None, **_: Any
) -> list[float | None]:
    scores = [score(*each) for each in zip(completions, kind, strict=True)]
    if log_extra is not None:
        log_extra("said", [completion[0]["content"] for completion in completions])
        log_metric("scored", len(scores))
    return scores


class Keeper(GRAOTrainer):
    """Keeps generation batches as they are before TRL shuffles them, and all gradients."""

    def __init__(self, *arguments: Any, extra: dict[str, Tensor] | None = None, **named: Any):
        self.rollouts: list[tuple[list[dict], dict[str, Tensor]]] = []
        self.gradients: list[list[Tensor]] = []
        self.extra = extra or {}
        super().__init__(*arguments, **named)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs) | self.extra
        self.rollouts.append((inputs, output))
        return output


class _KeepGradients(TrainerCallback):
    def __init__(self, keeper: Keeper) -> None:
        self.keeper = keeper

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        gradients = [p.grad.clone() for p in self.keeper.model.parameters() if p.requires_grad]
        self.keeper.gradients.append(gradients)


def config(folder: Path, kind: type[GRPOConfig] = GRPOConfig, **options: Any) -> GRPOConfig:
    defaults = {
        "num_generations": 2,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "temperature": TEMPERATURE,
        "loss_type": "grpo",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        CHECKPOINTING: False,
    }
    return kind(str(folder), **{**defaults, **options})


def run(
    model_folder: Path,
    args: GRPOConfig,
    dataset: Dataset,
    *,
    lr: float | None = 0.0,
    reward_funcs: Any = reward,
    extra: dict[str, Tensor] | None = None,
    by_name: bool = False,
    resume_from: Path | None = None,
    **options: Any,
) -> Keeper:
    """Train by plain SGD, or with lr None by the optimiser of `args`; lr 0 moves no weight.

    by_name: TRL loads the model and makes the optimiser, and the gradients are of the first step.
    """
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    lr = None if by_name else lr
    trainer = Keeper(
        str(model_folder) if by_name else model,
        reward_funcs,
        args,
        dataset,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        optimizers=(None if lr is None else torch.optim.SGD(model.parameters(), lr=lr), None),
        extra=extra,
        **options,
    )
    trainer.add_callback(_KeepGradients(trainer))
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    return trainer


def double_of(model_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64)


def token_ids(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row of a generation batch, without padding."""
    return [
        tuple(
            batch[f"{name}_ids"][b][batch[f"{name}_mask"][b].bool()].tolist()
            for name in ("prompt", "completion")
        )
        for b in range(len(batch["prompt_ids"]))
    ]


def groups_of(tokenizer: Any, rows: list[dict], pairs: list, G: int) -> list:
    """(prompt ids, ids of G samples and the reference) of each group."""
    groups = []
    for start in range(0, len(rows), G):
        text = rows[start]["reference"][0]["content"]
        samples = [completion for _, completion in pairs[start : start + G]]
        ids = [*tokenizer(text)["input_ids"], EOS] if text.strip() else []  # blank: absent
        groups.append((pairs[start][0], [*samples, ids]))
    return groups


def rewards_of(tokenizer: Any, rows: list[dict], groups: list) -> Tensor:
    """(N, K) float64 by `score`, NaN for none and for an absent sequence."""
    kinds = [row["kind"] for row in rows[:: len(groups[0][1]) - 1]]
    scores = [
        [
            score([{"content": tokenizer.decode(ids, skip_special_tokens=True)}], kind)
            if ids
            else None
            for ids in sequences
        ]
        for (_, sequences), kind in zip(groups, kinds, strict=True)
    ]
    values = [[torch.nan if each is None else each for each in group] for group in scores]
    return torch.tensor(values, dtype=torch.float64)


def owners_of(groups: list) -> Tensor:
    """sequence_T: n * K + k of every token, in the order of `truth`."""
    lengths = [len(ids) for _, sequences in groups for ids in sequences]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def truth(
    double: torch.nn.Module,
    groups: list,
    rewards_NK: Tensor,
    *,
    learned: list[list[list[int]]] | None = None,
    **options: Any,
) -> reference.ReferenceLoss:
    """The specification's loss, from the stock model's hidden states of each sequence alone.

    learned: 1 or 0 for each token of each group's sequences; None: all are learned.
    """
    hidden, targets, counts = [], [], []
    for prompt, sequences in groups:
        for ids in sequences:
            states_LD = double.base_model(torch.tensor([prompt + ids])).last_hidden_state[0]
            hidden.append(states_LD[len(prompt) - 1 : -1])
            targets += ids
    if learned is not None:
        counts = [mask for group in learned for sequence in group for mask in sequence]
    counts_T = torch.tensor(counts or [1] * len(targets)).bool()
    return reference.grao_loss(
        torch.cat(hidden)[counts_T],
        double.lm_head.weight,
        torch.tensor(targets)[counts_T],
        owners_of(groups)[counts_T],
        rewards_NK,
        **({"temperature": TEMPERATURE} | options),
    )


def kept(trainer: Keeper, G: int = 2) -> list[tuple[list, Tensor]]:
    """Groups and rewards_NK of every generation batch of a run in one process."""
    batches = [(rows, token_ids(batch)) for rows, batch in trainer.rollouts]
    return [with_rewards(trainer._tokenizer, rows, pairs, G) for rows, pairs in batches]


def with_rewards(tokenizer: Any, rows: list[dict], pairs: list, G: int) -> tuple[list, Tensor]:
    groups = groups_of(tokenizer, rows, pairs, G)
    return groups, rewards_of(tokenizer, rows, groups)


def assert_same(gradients: list[Tensor], double: torch.nn.Module) -> None:
    for ours, (name, parameter) in zip(gradients, double.named_parameters(), strict=True):
        assert parameter.grad is not None
        error = float((ours - parameter.grad).abs().max())
        assert error <= 1e-5 * max(1e-2, float(parameter.grad.abs().max())), name
