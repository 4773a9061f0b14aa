"""One seed for each prompt, and the random numbers that its completions are drawn with.

A prompt's numbers depend on its own seed and on how many completions it gets. They are the same
whichever prompts it is sampled with, in whatever order and batch, on every device.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grao_fast.kernels.devices import to_device

# Tokens whose numbers are drawn and copied to the device at once.
_BLOCK = 64


def prompt_seeds(seed: int, prompts: int) -> list[int]:
    """A seed below 2**31 for each prompt, which depends on `seed` and the prompt's place alone."""
    draw = random.Random(seed)
    return [draw.getrandbits(31) for _ in range(prompts)]


def uniform_numbers(
    seeds: Sequence[int], num_generations: int, device: torch.device
) -> Iterator[Tensor]:
    """For every token in turn, a number in [0, 1) for each completion, grouped by prompt.

    They are float64 of shape (B, 1) with B = prompts x num_generations, and come from a generator
    on the CPU for each prompt.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        blocks = [
            torch.rand(_BLOCK, num_generations, 1, dtype=torch.float64, generator=generator)
            for generator in generators
        ]
        yield from to_device(torch.cat(blocks, dim=1), device)
