"""Regular expressions, with a time limit: `Regex`, and what other rules extract with one."""

from __future__ import annotations

from collections import deque
from typing import Any

import regex

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.named import NamedReward, texts_of
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

SECONDS = 1.0


class Pattern:
    """A compiled regular expression of the package `regex`, whose syntax extends that of `re`.

    Unlike `re`, it can be limited in time, and lets other threads run. A pattern that backtracks
    can take longer than the universe has existed for one short text.
    """

    def __init__(self, pattern: str, *, ignore_case: bool, seconds: float) -> None:
        """Compile a pattern. Raises RewardError if it is not valid."""
        if not seconds > 0:
            raise RewardError(f"seconds must be above 0, got {seconds}")
        flags = regex.DOTALL | (regex.IGNORECASE if ignore_case else 0)
        try:
            self._compiled: Any = regex.compile(pattern, flags)
        except (regex.error, TypeError) as error:
            raise RewardError(f"{pattern!r} is not a regular expression: {error}") from error
        self.seconds = seconds

    def matches(self, text: str, *, full: bool) -> bool:
        """Whether the pattern matches anywhere in a text, or all of it. Raises TimeoutError."""
        match = self._compiled.fullmatch if full else self._compiled.search
        return match(text, timeout=self.seconds, concurrent=True) is not None

    def last(self, text: str) -> str | None:
        """The first group of the last match, or the whole match without groups; None: no match.

        Raises TimeoutError.
        """
        found = self._compiled.finditer(text, timeout=self.seconds, concurrent=True)
        last = next(iter(deque(found, maxlen=1)), None)
        if last is None:
            return None
        return last[1] if self._compiled.groups else last[0]


def warn_of_time(name: str, scores: list[float | None], late: int, seconds: float) -> None:
    """Log how many texts got no reward since they took too long; nothing if none did."""
    if late:
        logger.warning(
            "reward %s: %d of %d completions took longer than %g seconds, and have no reward",
            name, late, len(scores), seconds,
        )  # fmt: skip


class Regex(NamedReward):
    """1 where a regular expression matches a completion, else 0.

    A dot matches line breaks too. A completion on which the match takes longer than `seconds` has
    no reward, with a warning.

    Args:
        pattern: of the package `regex`, which reads all patterns of `re`.
        full: whether it must match the whole completion, white space at both ends aside.
        ignore_case: whether capital and small letters are equal.
        seconds: time limit of one match, in seconds of computing.
        name: in metrics.

    Raises:
        RewardError: the pattern is not valid.
    """

    def __init__(
        self,
        pattern: str,
        *,
        full: bool = False,
        ignore_case: bool = False,
        seconds: float = SECONDS,
        name: str = "regex",
    ) -> None:
        self._pattern = Pattern(pattern, ignore_case=ignore_case, seconds=seconds)
        self._full = full
        settings = {"pattern": pattern, "full": full, "ignore_case": ignore_case}
        super().__init__(name, takes=["completions"], settings=settings)

    def __call__(self, completions: Any, **columns: Any) -> list[float | None]:
        """Score completions."""
        scores: list[float | None] = []
        late = 0
        for text in texts_of(completions):
            try:
                text = text.strip() if self._full else text
                scores.append(float(self._pattern.matches(text, full=self._full)))
            except TimeoutError:
                scores.append(None)
                late += 1
        warn_of_time(self.__name__, scores, late, self._pattern.seconds)
        return scores
