"""Defines the demo's task: sort eight digits, given only references that are always flawed.

    prompt     31415926=
    right      11234569
    reference  11243560     the fourth and fifth digit are swapped, and one digit became 0

The swap is at the same places in every reference, so a model that imitates them learns it; the
place of the 0 varies. In every reference, five digits of eight are right. The reward is how many
more digits one answer has in place than another; it never shows the right answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

LENGTH = 8
DIGITS = "0123456789"
SWAPPED = (3, 4)


def solution(prompt: str) -> str:
    """Return the digits of a prompt in order."""
    return "".join(sorted(prompt.rstrip("=")))


def flawed(prompt: str, zeroed: int) -> str:
    """Return the reference of a prompt: its solution, two places SWAPPED and one set to 0."""
    digits = list(solution(prompt))
    first, second = SWAPPED
    digits[first], digits[second] = digits[second], digits[first]
    digits[zeroed] = "0"
    return "".join(digits)


def make_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Return distinct prompts on which both flaws show, with their references."""
    generator = random.Random(seed)
    references: dict[str, str] = {}
    while len(references) < count:
        prompt = "".join(generator.choices(DIGITS, k=LENGTH)) + "="
        right = solution(prompt)
        if right[SWAPPED[0]] == right[SWAPPED[1]]:
            continue
        places = [i for i in range(LENGTH) if right[i] != "0" and i not in SWAPPED]
        references[prompt] = flawed(prompt, zeroed=generator.choice(places))
    return [{"prompt": prompt, "reference": text} for prompt, text in references.items()]


def in_place(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Return the share of the digits of each completion that are in place."""
    shares = []
    for prompt, completion in zip(prompts, completions, strict=True):
        right = solution(prompt)
        hits = sum(a == b for a, b in zip(completion, right, strict=False))
        shares.append(hits / max(len(right), len(completion)))
    return shares


def better_sorted(
    prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
) -> list[float]:
    """Pairwise reward: the share of digits in place, minus that of the reference."""
    pairs = zip(in_place(prompts, completions), in_place(prompts, references), strict=True)
    return [completion - reference for completion, reference in pairs]
