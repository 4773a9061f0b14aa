"""Builds the demo's model, a small Qwen3 over characters, and pretrains it by imitation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from grao_fast.demo.task import DIGITS, LENGTH

_PAD, _EOS = "<pad>", "<eos>"
_LEARNING_RATE = 1e-3
_BATCH_SIZE = 64
_IGNORED = -100  # the label that cross_entropy ignores


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character: the digits, '=', and the end of an answer."""
    vocabulary = {token: i for i, token in enumerate([_PAD, _EOS, *DIGITS, "="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=_PAD))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=_PAD, eos_token=_EOS, unk_token=_PAD
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Return a Qwen3 with 0.3 M random parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            max_position_embeddings=4 * LENGTH,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def imitate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, str]],
    *,
    steps: Iterable[int],
    seed: int,
) -> list[float]:
    """Train on the references alone, by the cross-entropy of their tokens, the end included.

    Returns the loss of every step. `steps` is a range, or a progress bar around one.
    """
    input_BL, label_BL = _encode(tokenizer, rows)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    losses = []
    model.train()
    for _ in steps:
        chosen = torch.randint(len(rows), (_BATCH_SIZE,), generator=generator)
        logits_BLV = model(input_ids=input_BL[chosen]).logits[:, :-1]
        loss = cross_entropy(
            logits_BLV.flatten(0, 1), label_BL[chosen, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _encode(
    tokenizer: PreTrainedTokenizerFast, rows: Sequence[Mapping[str, str]]
) -> tuple[Tensor, Tensor]:
    """Return tokens of prompt, reference and end, all of one length, and labels without prompts."""
    texts = [row["prompt"] + row["reference"] + _EOS for row in rows]
    input_BL = torch.tensor(tokenizer(texts)["input_ids"])
    label_BL = input_BL.clone()
    label_BL[:, : LENGTH + 1] = _IGNORED
    return input_BL, label_BL
