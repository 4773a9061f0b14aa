"""Drawing tokens from logits, and making completions of them.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grao_fast.sampling import Completion

# Tokens of a block, whose probabilities are summed first: about the square root of a vocabulary,
# and a divisor of most, which then need no padding.
_BLOCK = 128


def draw(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token for every row; returns tokens and their log-probs as they were sampled.

    Args:
        logits: (B, V) float32.
        u: (B, 1) float64, uniform in [0, 1).
    """
    p = (logits / temperature if temperature > 0 else logits).softmax(-1)
    token = _invert(p, u) if temperature > 0 else logits.argmax(-1, keepdim=True)
    return token.squeeze(1), p.gather(1, token).squeeze(1).log()


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """Inverse-transform sampling: the first token (B, 1) with a cumulative probability of 1 - u.

    A block of `_BLOCK` tokens is found first, then the token in it. `torch.multinomial` would draw
    a random number for every token of the vocabulary, and a cumulative sum over all of it would
    need float64, since float32 rounds rare tokens away. A token of probability 0 is never drawn; a
    row of NaN gives an arbitrary token.
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
    """Make one completion of each row's first `lengths` tokens.

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
