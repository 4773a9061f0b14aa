"""`ExactMatch`: the answer that a column holds, and no other."""

from __future__ import annotations

from typing import Any

from grao_fast.rewards.named import NamedReward, accepted_answers, check_column, texts_of
from grao_fast.rewards.rules.patterns import SECONDS, Pattern, warn_of_time


class ExactMatch(NamedReward):
    """1 where a completion is the answer in a column, else 0.

    White space at both ends does not count. The column holds text, a number, or a list of answers
    that all count; a row with None has no reward.

    Args:
        column: of the dataset; "references" compares with the references.
        extract: a regular expression that finds the answer within the completion: its first group,
            or all of it without groups, where it matches last. A completion without a match scores
            0. None: the whole completion is the answer.
        ignore_case: whether capital and small letters are equal.
        name: in metrics.

    Raises:
        RewardError: the column or the expression is not valid.
    """

    def __init__(
        self,
        column: str = "answer",
        *,
        extract: str | None = None,
        ignore_case: bool = False,
        name: str = "exact_match",
    ) -> None:
        self._column = check_column(column)
        self._extract = None
        if extract is not None:
            self._extract = Pattern(extract, ignore_case=ignore_case, seconds=SECONDS)
        self._ignore_case = ignore_case
        settings = {"column": column, "extract": extract, "ignore_case": ignore_case}
        super().__init__(name, takes=["completions", column], settings=settings)

    def __call__(self, completions: Any, **columns: Any) -> list[float | None]:
        """Score completions."""
        scores: list[float | None] = []
        late = 0
        where = f"reward {self.__name__}: column {self._column!r}"
        for text, value in zip(texts_of(completions), columns[self._column], strict=True):
            answers = accepted_answers(value, where)
            if not answers:
                scores.append(None)
                continue
            try:
                given = text if self._extract is None else self._extract.last(text)
            except TimeoutError:
                scores.append(None)
                late += 1
                continue
            wanted = {self._plain(answer) for answer in answers}
            scores.append(float(given is not None and self._plain(given) in wanted))
        warn_of_time(self.__name__, scores, late, SECONDS)
        return scores

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self._ignore_case else text.strip()
