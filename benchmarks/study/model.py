"""The base model of the study, smaller than the demo's, and files that keep what was trained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grao_fast.demo.task import LENGTH


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 with 0.1 M random parameters."""
    torch.manual_seed(seed)
    config = qwen3_config(tokenizer, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config)


def qwen3_config(tokenizer: PreTrainedTokenizerFast, **options: bool | int) -> Qwen3Config:
    """Return the sizes of the base model, and of the reward model."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=4 * LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def trained_once(model: nn.Module, train: Callable[[], None], name: str, folder: Path) -> None:
    """Train a model, or load the weights that this code has once trained under this name."""
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("model", "preferences", "tasks")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = folder / f"{name}-{digest}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return
    train()
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), beside)
    beside.replace(path)
