"""Reads completions that a dataset stores: how they were answered, scored and sampled elsewhere.

Columns of a row, beside `prompt` and `reference`:

    completions        the completions, each text or messages; or, in their place,
    completion_ids     their token ids, each with the end-of-sequence token, if it has one
    rewards            a number for each completion, null for none
    reference_reward   a number, null for none
    logprobs           for each completion the log-prob of each of its tokens, its end-of-sequence
                       token included, under what sampled it; null where they are unknown

Rows may have different numbers of completions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from grao_fast.data.fields import Messages, read_reference
from grao_fast.system.errors import UserError

COMPLETIONS, TOKENS = "completions", "completion_ids"
STORED_COLUMNS = (COMPLETIONS, TOKENS, "rewards", "reference_reward", "logprobs")

_ROUNDING = 1e-3  # by which the log-prob of a certain token may be above 0


@dataclass(frozen=True)
class Stored:
    """The completions of a row.

    answers: the completions, text or messages each, None for a blank one; None: they are tokens.
    token_ids: the completions as token ids; None: they are answers.
    rewards: one for each; NaN where there is none.
    reference_reward: NaN where there is none.
    logprobs: one list for each, or None.
    """

    answers: Sequence[str | Messages | None] | None
    token_ids: Sequence[list[int]] | None
    rewards: Sequence[float]
    reference_reward: float
    logprobs: Sequence[Sequence[float] | None]


@dataclass(frozen=True)
class StoredFacts:
    """What is known of a whole dataset of stored completions.

    largest: the most completions of a row.
    has_logprobs: whether a completion has log-probs.
    unscored: rows with a completion that has no reward.
    unscored_references: rows with a reference that has none.
    """

    largest: int
    has_logprobs: bool
    unscored: list[int]
    unscored_references: list[int]

    @classmethod
    def of(cls, rows: Iterable[tuple[Stored, bool]]) -> StoredFacts:
        """The facts of rows in their order; each beside whether it has a reference."""
        largest, has_logprobs, unscored, references = 0, False, [], []
        for number, (stored, has_reference) in enumerate(rows):
            largest = max(largest, len(stored.rewards))
            has_logprobs = has_logprobs or any(each is not None for each in stored.logprobs)
            if any(map(math.isnan, stored.rewards)):
                unscored.append(number)
            if has_reference and math.isnan(stored.reference_reward):
                references.append(number)
        return cls(largest, has_logprobs, unscored, references)


def stores_completions(columns: Sequence[str]) -> bool:
    """Whether a dataset with these columns stores completions."""
    return COMPLETIONS in columns or TOKENS in columns


def check_columns(columns: Sequence[str], name: str) -> None:
    """Raise UserError if a dataset stores no completions, or stores them twice."""
    if not stores_completions(columns):
        raise UserError(
            f'{name} stores no completions, which sampler="dataset" trains on: it has '
            f"{', '.join(columns)}; add a column `completions` of lists of texts, or "
            "`completion_ids` of lists of token ids"
        )
    if COMPLETIONS in columns and TOKENS in columns:
        raise UserError(
            f"{name} has completions as text and as `completion_ids`: leave one of the columns out"
        )


def read_stored(row: Mapping[str, Any], where: str, prompt: str | Messages) -> Stored:
    """Read the stored completions of a row. Raises UserError for what cannot be used."""
    are_tokens = row.get(TOKENS) is not None
    name = TOKENS if are_tokens else COMPLETIONS
    given = _listed(row.get(name), f"{where}, `{name}`")
    places = [f"{where}, completion {k}" for k in range(len(given))]
    answers, token_ids = None, None
    if are_tokens:
        token_ids = [_token_ids(*each) for each in zip(given, places, strict=True)]
    else:
        answers = [_answer(*each, prompt) for each in zip(given, places, strict=True)]
    rewards = _for_each(row.get("rewards"), len(given), f"{where}, `rewards`")
    logprobs = _for_each(row.get("logprobs"), len(given), f"{where}, `logprobs`")
    return Stored(
        answers=answers,
        token_ids=token_ids,
        rewards=[_reward(*each) for each in zip(rewards, places, strict=True)],
        reference_reward=_reward(row.get("reference_reward"), f"{where}, the reference"),
        logprobs=[_logprobs(*each) for each in zip(logprobs, places, strict=True)],
    )


def _listed(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise UserError(
            f"{where} must be a list, got {type(value).__name__}: give one, empty if there is none"
        )
    return value


def _for_each(value: Any, completions: int, where: str) -> Sequence[Any]:
    """The list of a column, with one item for each completion; without the column, of None."""
    if value is None:
        return [None] * completions
    items = _listed(value, where)
    if len(items) != completions:
        raise UserError(
            f"{where} has {len(items)} items for {completions} completions: give one for each, "
            "null where there is none"
        )
    return items


def _answer(value: Any, where: str, prompt: str | Messages) -> str | Messages | None:
    if value is None:
        raise UserError(f"{where} is null: leave it out of the list, and its reward too")
    return read_reference(value, where, prompt)


def _token_ids(value: Any, where: str) -> list[int]:
    ids = list(_listed(value, where))
    wrong = next((each for each in ids if not _is_token(each)), None)
    if not ids or wrong is not None:
        found = "none" if not ids else repr(wrong)
        raise UserError(
            f"{where} must be one or more token ids, got {found}: leave an empty completion out, "
            "with its reward and log-probs"
        )
    return [int(each) for each in ids]


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _reward(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, Real) or not math.isfinite(value):
        raise UserError(f"{where}: its reward must be a finite number or null, got {value!r}")
    return float(value)


def _logprobs(value: Any, where: str) -> list[float] | None:
    if value is None:
        return None
    logprobs = list(_listed(value, f"{where}: its log-probs"))
    for place, each in enumerate(logprobs):
        if not isinstance(each, Real) or not math.isfinite(each) or each > _ROUNDING:
            raise UserError(
                f"{where}: log-prob {place} must be a finite number of at most 0, got {each!r}"
            )
    return [float(each) for each in logprobs]
