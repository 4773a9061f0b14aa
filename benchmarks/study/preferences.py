"""A reward model for the demo's task: a tiny classifier that has learned from noisy preferences."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerFast, Qwen3ForSequenceClassification

from grao_fast.demo.base_model import imitate
from grao_fast.demo.task import DIGITS, LENGTH, in_place, solution
from grao_fast.rewards.reward_model import RewardModel
from study.arms import Rows
from study.model import make_model, qwen3_config, trained_once

PAIRS = 8000
IMITATION_STEPS = 400
STEPS, BATCH_SIZE, LEARNING_RATE = 400, 64, 1e-3
SHARPNESS = 16.0  # of two answers, that with one digit more in place is preferred in 88%


def learned_reward(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, *, seed: int, folder: Path
) -> RewardModel:
    """Return a reward model trained on pairs of answers to the prompts of `rows`.

    Of two answers, each is preferred with probability sigmoid(SHARPNESS times the difference of
    their shares of digits in place), and the loss is Bradley and Terry's. As is usual, the model
    begins as one that has imitated answers, here the references of `rows`.

    Args:
        rows: prompts with their solutions.
        folder: keeps the trained weights.
    """
    torch.manual_seed(seed)
    model = Qwen3ForSequenceClassification(qwen3_config(tokenizer, num_labels=1))

    def learn() -> None:
        begun = make_model(tokenizer, seed=seed)
        imitate(begun, tokenizer, rows, steps=range(IMITATION_STEPS), seed=seed)
        model.model.load_state_dict(begun.model.state_dict())
        _learn(model, *_pairs(rows, tokenizer, seed=seed), seed=seed)

    trained_once(model, learn, f"preferences-{seed}", folder)
    return RewardModel(model.eval(), tokenizer=tokenizer, layout="joined", name="preferences")


def _learn(
    model: Qwen3ForSequenceClassification, chosen_BL: Tensor, rejected_BL: Tensor, *, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    model.train()
    for _ in range(STEPS):
        drawn = torch.randint(len(chosen_BL), (BATCH_SIZE,), generator=generator)
        ids_BL = torch.cat([chosen_BL[drawn], rejected_BL[drawn]])
        better_B, worse_B = model(input_ids=ids_BL).logits.squeeze(1).chunk(2)
        loss = -logsigmoid(better_B - worse_B).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def _pairs(rows: Rows, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return the tokens of PAIRS preferred texts, and of those that were not preferred."""
    generator = random.Random(seed)
    chosen, rejected = [], []
    for _ in range(PAIRS):
        prompt = generator.choice(rows)["prompt"]
        first, second = _answer(prompt, generator), _answer(prompt, generator)
        score, other = in_place([prompt] * 2, [first, second])
        preferred = torch.sigmoid(torch.tensor(SHARPNESS * (score - other))).item()
        if generator.random() > preferred:
            first, second = second, first
        chosen.append(prompt + first)
        rejected.append(prompt + second)
    ids = tokenizer(chosen + rejected, padding=True, return_tensors="pt")["input_ids"]
    return ids[:PAIRS], ids[PAIRS:]


def _answer(prompt: str, generator: random.Random) -> str:
    """Return digits in order, up to six of them other than the prompt's, after up to four changes.

    Without the former, a reward model learns to tell digits in order, whatever the prompt is.
    """
    digits = list(solution(prompt))
    for place in generator.sample(range(LENGTH), generator.choice((0, 0, 0, 1, 2, 4, 6))):
        digits[place] = generator.choice(DIGITS)
    digits.sort()
    for _ in range(generator.choice((0, 0, 1, 2, 4))):
        i, j = generator.sample(range(LENGTH - 1), 2)
        change = generator.choice(("swap", "swap", "replace", "drop", "insert"))
        if change == "swap" and max(i, j) < len(digits):
            digits[i], digits[j] = digits[j], digits[i]
        elif change == "insert":
            digits.insert(i, generator.choice(DIGITS))
        elif change == "drop":
            del digits[i : i + 1]
        else:
            digits[i : i + 1] = generator.choice(DIGITS)
    return "".join(digits)
