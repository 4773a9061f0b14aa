"""Scoring token ids by a sequence classifier, in batches of similar lengths.

Suffixes: S texts of a batch, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from grao_fast.rewards.conversations import Ids

Output = Literal["logit", "probability"]

_FEW = 16  # tokens of padding that cost less than another batch


def batches(texts: Sequence[Ids], tokens: int) -> Iterator[list[Ids]]:
    """Yield texts of similar lengths, the longest first, up to so many tokens with padding.

    A text that would be padded by more than a quarter of the batch's longest begins another batch.
    """
    batch: list[Ids] = []
    for text in sorted(texts, key=lambda text: -len(text.tokens)):
        longest = len((batch or [text])[0].tokens)
        padding = longest - len(text.tokens)
        if batch and ((len(batch) + 1) * longest > tokens or padding > max(_FEW, longest // 4)):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@torch.no_grad()
def label_values(model: Any, batch: Sequence[Ids], *, output: Output) -> Tensor:
    """Return values_SL, float32 on the CPU: of every text, the values of all labels."""
    device = next(model.parameters()).device
    with _padding(model, batch) as pad:
        options = {
            "input_ids": _padded([text.tokens for text in batch], pad, device),
            "attention_mask": _padded([[1] * len(text.tokens) for text in batch], 0, device),
        }
        if batch[0].kinds is not None:
            options["token_type_ids"] = _padded([text.kinds or () for text in batch], 0, device)
        values_SL = model(**options).logits.float()
    if output == "probability":
        alone = model.config.problem_type == "multi_label_classification" or values_SL.shape[1] == 1
        values_SL = values_SL.sigmoid() if alone else values_SL.softmax(dim=1)
    return values_SL.cpu()


@contextmanager
def _padding(model: Any, batch: Sequence[Ids]) -> Iterator[int]:
    """A context in which the model knows a padding token; it reads the score before the padding.

    Without a token of its own, it is one that the batch does not hold.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is not None:
        yield config.pad_token_id
        return
    held = {token for text in batch for token in text.tokens}
    config.pad_token_id = next(n for n in range(len(held) + 1) if n not in held)
    try:
        yield config.pad_token_id
    finally:
        config.pad_token_id = None


def _padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=device)
