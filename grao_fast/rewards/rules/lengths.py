"""`Length`: completions that are neither too short nor too long."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, get_args

from grao_fast.models.loading import load_tokenizer
from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.named import NamedReward, texts_of

Unit = Literal["characters", "words", "tokens"]


class Length(NamedReward):
    """1 where a completion's length lies between two limits, falling to 0 outside of them.

    Args:
        most: the greatest length; None: no limit.
        least: the least length.
        slack: the score falls in a straight line, and reaches 0 this far outside of the limits; 0:
            at once.
        unit: of all lengths: "characters", "words" (between white space), or "tokens".
        tokenizer: folder or hub id of a model whose tokens are counted; for "tokens" alone.
        name: in metrics.

    Raises:
        RewardError: limits that no length fits, or a unit without its tokenizer.
    """

    def __init__(
        self,
        most: float | None = None,
        *,
        least: float = 0,
        slack: float = 0,
        unit: Unit = "words",
        tokenizer: str | Path | None = None,
        name: str = "length",
    ) -> None:
        if unit not in get_args(Unit):
            raise RewardError(f"unit must be one of {', '.join(get_args(Unit))}; got {unit!r}")
        for argument, value in (("least", least), ("most", most), ("slack", slack)):
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise RewardError(f"{argument} must be a number of at least 0, got {value!r}")
        if most is None and least == 0:
            raise RewardError("Length needs most, least or both: every length would score 1")
        if most is not None and most < least:
            raise RewardError(f"most must be at least least={least:g}, got {most:g}")
        if (unit == "tokens") != (tokenizer is not None):
            raise RewardError('unit="tokens" needs a tokenizer, and no other unit takes one')
        self._unit, self._slack = unit, slack
        self._least, self._most = least, math.inf if most is None else most
        self._tokenizer: Any = None if tokenizer is None else load_tokenizer(tokenizer)
        settings = {"most": most, "least": least, "slack": slack, "unit": unit}
        super().__init__(name, takes=["completions"], settings=settings)

    def __call__(self, completions: Any, **columns: Any) -> list[float]:
        """Score completions."""
        return [self._score(length) for length in self._lengths(texts_of(completions))]

    def _lengths(self, texts: list[str]) -> list[int]:
        if self._unit == "characters":
            return [len(text) for text in texts]
        if self._unit == "words":
            return [len(text.split()) for text in texts]
        tokens = self._tokenizer(texts, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in tokens["input_ids"]]

    def _score(self, length: int) -> float:
        beyond = max(self._least - length, length - self._most)
        if beyond <= 0:
            return 1.0
        return max(0.0, 1.0 - beyond / self._slack) if self._slack else 0.0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
