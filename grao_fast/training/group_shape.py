"""The shape of the largest group of a run, for which memory is measured before the first step.

It is the longest prompt with G samples of max_new_tokens, or as long as the longest that is stored,
and the longest reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grao_fast.config import SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.data.packing import Group
from grao_fast.data.prompts import lengths_of
from grao_fast.objectives import Objective


@dataclass(frozen=True)
class GroupShape:
    """Tokens of a prompt and of each of its sequences.

    stored: whether its samples are stored.
    """

    prompt: int
    sequences: tuple[int, ...]
    stored: bool = False

    @classmethod
    def largest(
        cls, prompts: Sequence[Encoded], sampling: SamplingOptions, formula: Objective
    ) -> GroupShape:
        """The longest prompt, samples and reference of a run, in one group."""
        G = sampling.num_generations if formula.needs_samples else 0
        lengths = lengths_of(prompts)
        samples = (lengths.completion or sampling.max_new_tokens,) * G
        return cls(lengths.prompt, (*samples, lengths.reference), lengths.completion > 0)

    def scaled(self, factor: float) -> GroupShape:
        """This shape scaled, with at least one token where there was any."""

        def scale(length: int) -> int:
            return max(min(1, length), round(length * factor))

        return GroupShape(scale(self.prompt), tuple(map(scale, self.sequences)), self.stored)

    def group(self) -> Group:
        """A group of this shape, all live; the memory of a loss does not depend on token ids."""
        return Group([0] * self.prompt, [[0] * length for length in self.sequences])
