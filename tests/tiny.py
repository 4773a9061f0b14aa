"""Provides a tiny model and dataset, saved in a folder as a user's are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,?!+-=*/:\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def character_tokenizer(*special: str, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A tokenizer of characters: <pad> 0, <eos> 1, <unk> 2; the special tokens come last."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def save_tiny_model(folder: Path, *, tied: bool = True) -> Path:
    """Save a random two-layer Llama of 64 dimensions, and a tokenizer of characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sums(number: int) -> list[dict]:
    """Return rows with a question, a correct reference, and the answer as a column."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{a}+{b}=?"}],
            "reference": f"{a}+{b}={a + b}",
            "answer": str(a + b),
        }
        for a, b in ((i % 7, i % 5) for i in range(number))
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_tiny_classifier(
    folder: Path, *, labels: tuple[str, ...] = ("score",), chat_template: str | None = None
) -> Path:
    """Save a random two-layer Llama that classifies sequences, and a tokenizer of characters.

    Its configuration has no padding token, as those of many reward models have none.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = character_tokenizer(chat_template=chat_template)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=1,
            id2label=dict(enumerate(labels)),
            label2id={label: n for n, label in enumerate(labels)},
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
