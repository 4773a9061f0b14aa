"""What TRL's own tests ask of GRPOTrainer, asked of GRAOTrainer, beside GRPOTrainer where it helps.

TRL's tests load models and data from the hub. Here they are tiny and local, and every row has a
reference; names of TRL's tests stand beside what they correspond to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

pytest.importorskip("trl")

from tiny import character_tokenizer, save_tiny_classifier
from trl import GRPOTrainer
from trl.chat_template_utils import qwen2_5_chat_template
from trl_runs import config

from grao_fast.integrations.trl import GRAOTrainer

WORDS = ["better than", "explicit is", "simple", "complex or not", "flat", "sparse is better"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 under Qwen 2.5's chat template, and a tokenizer of characters."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = character_tokenizer(
        "<|im_start|>", "<|im_end|>", chat_template=qwen2_5_chat_template
    )
    tokenizer.add_tokens(list("<>{}[]()_'\"&#\\;$"))
    tokenizer.eos_token = "<|im_end|>"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_rows() -> Dataset:
    return Dataset.from_list(
        [{"prompt": word, "reference": f" {word}!", "value": n} for n, word in enumerate(WORDS)]
    )


def message_rows() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "reference": [{"role": "assistant", "content": row["reference"]}],
            }
            for row in text_rows()
        ]
    )


def said(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def letters(completions: list, **_: Any) -> list[float]:
    return [float(sum(map(ord, said(each))) % 11) for each in completions]


def variety(completions: list, **_: Any) -> list[float]:
    return [float(len(set(said(each)))) for each in completions]


async def later(completions: list, **columns: Any) -> list[float]:
    return variety(completions, **columns)


def nothing(completions: list, **_: Any) -> list[None]:
    return [None] * len(completions)


def far_from_value(completions: list, value: list[int], **_: Any) -> list[float]:
    return [abs(n - score) for n, score in zip(value, letters(completions), strict=True)]


class Recording:
    """Keeps rollouts as they are before a shuffle, and what steps are given."""

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.rollouts = [*getattr(self, "rollouts", []), (inputs, output)]
        return output

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.given = [*getattr(self, "given", []), inputs]
        return super().training_step(model, inputs, num_items_in_batch)


class OfTRL(Recording, GRPOTrainer):
    pass


class OfGRAO(Recording, GRAOTrainer):
    pass


def make(
    kind: type[GRPOTrainer], model: Any, folder: Path, rewards: Any, data: Any, **options: Any
) -> Any:
    """A trainer; options that no parameter is named after are of its arguments."""
    names = ("eval_dataset", "reward_processing_classes", "peft_config", "tools")
    names += ("environment_factory", "rollout_func", "processing_class")
    named = {name: options.pop(name) for name in names if name in options}
    defaults = {"num_generations": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
    args = config(folder, **(defaults | options))
    if isinstance(rewards, list):
        rewards = list(rewards)  # TRL writes to it
    return kind(str(model) if isinstance(model, Path) else model, rewards, args, data, **named)


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters()}


CASES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "text": (text_rows, letters, {}),
    "messages": (message_rows, letters, {}),
    "stream": (lambda: text_rows().to_iterable_dataset(), letters, {}),
    "weights": (text_rows, [letters, variety], {"reward_weights": [0.7, 0.3]}),
    "async": (text_rows, [letters, later], {}),
    "none": (text_rows, [letters, nothing], {}),
    "column": (text_rows, far_from_value, {}),
    "padding": (text_rows, letters, {"pad_to_multiple_of": 8}),
    "sampling": (
        text_rows,
        letters,
        {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1},
    ),
    "beams": (
        text_rows,
        letters,
        {"generation_kwargs": {"num_beams": 2, "top_k": 50, "length_penalty": -0.1}},
    ),
    "larger group": (
        text_rows,
        letters,
        {"num_generations": 6, "gradient_accumulation_steps": 2},
    ),
    "iterations": (text_rows, letters, {"num_iterations": 2, "max_steps": 2}),
    "kl": (text_rows, letters, {"beta": 0.1}),
    "template": (message_rows, letters, {"chat_template_kwargs": {"enable_thinking": False}}),
    "workers": (text_rows, letters, {"dataloader_num_workers": 1}),
}
SHARED = ("reward", "reward_std", "frac_reward_zero_std", "num_tokens", "completions/", "rewards/")


@pytest.mark.parametrize("case", CASES)
def test_samples_and_metrics_are_trls(qwen: Path, tmp_path: Path, case: str):
    data, rewards, options = CASES[case]
    theirs, ours = (make(kind, qwen, tmp_path, rewards, data(), **options) for kind in (OfTRL, OfGRAO))
    theirs.train()
    ours = make(OfGRAO, qwen, tmp_path, rewards, data(), **options)
    began = weights_of(ours)
    ours.train()
    (their_rows, their_batch), (rows, batch) = theirs.rollouts[0], ours.rollouts[0]
    assert rows == their_rows
    for name in ("prompt_ids", "completion_ids", "completion_mask"):
        assert torch.equal(batch[name], their_batch[name])
    expected, logged = theirs.state.log_history[0], ours.state.log_history[0]
    names = [name for name in expected if name.startswith(SHARED)]
    assert len(names) >= 12
    for name in names:
        assert logged[name] == pytest.approx(expected[name], nan_ok=True), name
    for name, weight in weights_of(ours).items():
        assert not torch.equal(weight, began[name]), name
