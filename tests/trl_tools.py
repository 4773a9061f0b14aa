"""Tools under TRL: a model, data whose references call one, and steps of processes that do so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl_clusters
from datasets import Dataset
from tiny import character_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.chat_template_utils import qwen2_5_chat_template
from trl_runs import Keeper, token_ids

ANSWER = "seven, since three and four are seven"  # longer than what samples say, so learned


def save_tool_model(folder: Path, *, width: int = 32) -> Path:
    """A tiny Llama under Qwen 2.5's chat template, and a tokenizer of characters."""
    tokenizer = character_tokenizer(
        "<|im_start|>", "<|im_end|>", chat_template=qwen2_5_chat_template
    )
    tokenizer.add_tokens(list("<>{}[]()_'\"&#\\;$"))
    tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 2048}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The one number.
        b: The other number.
    """
    return a + b


class Purse:
    """An environment: money is put into it."""

    def reset(self, **row: Any) -> str:
        self.money = 1
        return " You have 1."

    def put(self, amount: int) -> int:
        """Puts money into the purse.

        Args:
            amount: How much.
        """
        self.money += amount
        return self.money

    def get_reward(self) -> float:
        return float(self.money)


def called(name: str, **arguments: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def rows(reference: list[dict] | str, number: int = 3, **columns: Any) -> Dataset:
    asked = {"prompt": [{"role": "user", "content": "3 and 4?"}], "reference": reference}
    return Dataset.from_list([asked | columns] * number)


def turns(name: str = "add", **arguments: int) -> list[dict]:
    """A reference that calls a tool, reads its result, and answers."""
    return [
        {"role": "assistant", "tool_calls": [called(name, **arguments)]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": ANSWER},
    ]


def length(completions: list, **_: Any) -> list[float]:
    return [float(len(completion[-1]["content"])) for completion in completions]


def said(completions: list, **_: Any) -> list[float]:
    """How much was said in all turns, tools' results included; references win, so are learned."""
    return [
        float(sum(len(turn.get("content") or "") for turn in completion) % 39)
        for completion in completions
    ]


def call_of(tokenizer: Any, **arguments: int) -> list[int]:
    """The tokens of a turn that calls `add`."""
    function = json.dumps({"name": "add", "arguments": arguments})
    return tokenizer(f"<tool_call>\n{function}\n</tool_call><|im_end|>")["input_ids"]


class Caller(Keeper):
    """Samples, and has some turns call `add` in place of what was sampled.

    Row b calls b % 3 times, but for the first rollout of the second process, which calls nothing.
    """

    def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **named: Any):
        found, logprobs = super()._generate_single_turn(prompt_ids, *others, **named)
        nothing = dist.get_rank() == 1 and not self.rollouts
        for b, ids in enumerate(prompt_ids):
            text = self._tokenizer.decode(ids)
            wanted = re.findall(r'"arguments": {"a": (\d)', text) or [0 if nothing else b % 3]
            if text.count("<tool_response>") < int(wanted[0]):
                found[b] = call_of(self._tokenizer, a=int(wanted[0]), b=b)
        return found, logprobs


def one_step(model_folder: Path, folder: Path) -> None:
    """Take a step of plain SGD on two rollouts, in one of two processes; save what it did."""
    scored = []

    def watched(completions: list, **_: Any) -> list[float]:
        scored.append(said(completions))
        return scored[-1]

    args = trl_clusters.arguments(
        folder,
        steps_per_generation=1,
        optim="sgd",
        learning_rate=trl_clusters.LR,
        max_completion_length=360,
        max_tool_calling_iterations=2,
    )
    trainer = Caller(
        AutoModelForCausalLM.from_pretrained(model_folder),
        watched,
        args,
        rows(turns(a=3, b=4), number=6),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        tools=[add],
    )
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    saved = {
        "batches": [batch for _, batch in trainer.rollouts],
        "scored": scored,
        "calls": trainer.state.log_history[0]["tools/call_frequency"],
    }
    torch.save(saved | trl_clusters.division(trainer), folder / f"rank-{dist.get_rank()}.pt")


def groups_of(batches: list[dict[str, Tensor]]) -> tuple[list, list]:
    """Groups of 2 of the batches of all processes, references last, and what is learned of each."""
    sequences, masks, references = [], [], []
    for batch in batches:
        for b, (prompt, ids) in enumerate(token_ids(batch)):
            sequences.append((prompt, ids))
            mask_BC = batch.get("tool_mask", batch["completion_mask"])
            masks.append(mask_BC[b][: len(ids)].tolist())
            size = int(batch["lengths_B2"][b, 1])
            each = (batch[name][b][:size].tolist() for name in ("reference_ids", "reference_mask"))
            references.append(tuple(each))
    groups, learned = [], []
    for first in range(0, len(sequences), 2):
        (prompt, one), (_, other) = sequences[first : first + 2]
        ids, mask = references[first]
        groups.append((prompt, [one, other, ids]))
        learned.append([*masks[first : first + 2], mask])
    return groups, learned
