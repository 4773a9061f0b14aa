"""Drawing tokens from logits, and the completions that they make up.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_fast.sampling import Completion

# Tokens whose probabilities are summed before one of them is drawn: about the vocabulary's root,
# and a divisor of most vocabularies, which then need no padding.
_BLOCK = 128


def draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """A token of every row and its log-prob under the distribution it was drawn from.

    Args:
        logits: (B, V) float32.
        u: (B, 1) float64, uniform in [0, 1).
    """
    p = (logits / temperature if temperature > 0 else logits).softmax(-1)
    token = _invert(p, u) if temperature > 0 else logits.argmax(-1, keepdim=True)
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """The token of every row, (B, 1), at which its distribution function reaches 1 - u.

    First the block of `_BLOCK` tokens, then the token in it: `torch.multinomial` draws a random
    number for every token of the vocabulary, and one sum over all of it had to be held in float64,
    as in float32 it would round rare tokens away. A token of probability 0 is never drawn; a row of
    NaN gives some token.
    """
    V = p.shape[1]
    blocks = (F.pad(p, (0, -V % _BLOCK)) if V % _BLOCK else p).unflatten(1, (-1, _BLOCK))
    mass = blocks.sum(-1).double()
    cdf = mass.cumsum(-1)
    point = (1 - u) * cdf[:, -1:]
    block = torch.searchsorted(cdf, point).clamp(max=mass.shape[1] - 1)
    before = F.pad(cdf, (1, 0)).gather(1, block)
    share = ((point - before) / mass.gather(1, block)).clamp(max=1)  # 0 < share, of the block
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
    within = torch.searchsorted(inside, share * inside[:, -1:])
    return (block * _BLOCK + within).clamp(max=V - 1)


def completions_of(
    tokens: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor, *, model: str
) -> list[Completion]:
    """One completion a row, of its first `lengths` tokens.

    Raises FloatingPointError, naming `model`, where a log-prob is NaN.
    """
    if bool(logprobs.isnan().any()):
        raise FloatingPointError(
            f"{model} gives logits that are NaN or infinite: its weights may be broken, or have "
            "diverged under a learning_rate that is too high"
        )
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    return [
        Completion(token_ids=ids[:length], logprobs=logps[:length], finished=done)
        for ids, logps, length, done in rows
    ]
