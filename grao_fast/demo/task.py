"""The demo's task: put eight digits in order, shown only by references that are always flawed.

    prompt     31415926=
    right      11234569
    reference  11243560     the fourth and fifth digit have changed places, and one became 0

The swap is at the same places in every reference: whoever imitates them learns it. The zeroed place
differs from prompt to prompt. So five digits of eight are right in every reference. The reward says
by how much one answer has more digits in place than another; it never shows the right one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

LENGTH = 8
DIGITS = "0123456789"
SWAPPED = (3, 4)


def solution(prompt: str) -> str:
    """The digits of a prompt in order."""
    return "".join(sorted(prompt.rstrip("=")))


def flawed(prompt: str, zeroed: int) -> str:
    """The reference of a prompt: its solution with SWAPPED places swapped and one zeroed."""
    digits = list(solution(prompt))
    first, second = SWAPPED
    digits[first], digits[second] = digits[second], digits[first]
    digits[zeroed] = "0"
    return "".join(digits)


def make_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Prompts that differ from each other, on which both flaws show, with their references."""
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
    """Share of the digits of each completion that are where they belong."""
    shares = []
    for prompt, completion in zip(prompts, completions, strict=True):
        right = solution(prompt)
        hits = sum(a == b for a, b in zip(completion, right, strict=False))
        shares.append(hits / max(len(right), len(completion)))
    return shares


def better_sorted(
    prompts: Sequence[str], completions: Sequence[str], references: Sequence[str]
) -> list[float]:
    """The pairwise reward: by how much a completion has more digits in place than its reference."""
    pairs = zip(in_place(prompts, completions), in_place(prompts, references), strict=True)
    return [completion - reference for completion, reference in pairs]
