"""Turns stored completions into tokens, each as a sampler would have returned it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grao_fast.data.encoder import Encoder
from grao_fast.data.examples import Example
from grao_fast.data.fields import Messages
from grao_fast.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StoredCompletion:
    """A stored completion as tokens.

    logprobs: one for each token; NaN where they are unknown.
    finished: whether it ends in an end-of-sequence token.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


class StoredEncoder:
    """Tokenises the completions of examples.

    A text gets the tokens that a reference with the same text would have, and an end-of-sequence
    token; token ids are taken as they are.

    Args:
        max_new_tokens: the most tokens of a completion.
        embedding_rows: the size of the model's embedding; None: any token will do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        *,
        max_new_tokens: int,
        embedding_rows: int | None,
    ) -> None:
        self._encoder = Encoder(tokenizer, eos_token_ids, answer="completion")
        self._most, self._rows = max_new_tokens, embedding_rows

    def encode(self, examples: Sequence[Example], numbers: Sequence[int]) -> list[_Completions]:
        """The completions of each example. Raises UserError for those that cannot be used.

        numbers: of the examples, in errors.
        """
        tokens = self._tokenise(examples, numbers)
        return [
            [self._completion(example, k, ids, number) for k, ids in enumerate(of_it)]
            for example, of_it, number in zip(examples, tokens, numbers, strict=True)
        ]

    def _tokenise(
        self, examples: Sequence[Example], numbers: Sequence[int]
    ) -> list[list[list[int]]]:
        """The token ids of each example's completions."""
        end: Any = self._encoder.tokenizer.eos_token_id  # all of a blank completion
        tokens: list[list[list[int]]] = [[] for _ in examples]
        places: list[tuple[int, int]] = []  # of an example, and of a completion of it
        answers: list[str | Messages] = []
        for n, example in enumerate(examples):
            stored = example.stored
            assert stored is not None, "examples are read with their completions"
            if stored.token_ids is not None:
                tokens[n] = [list(ids) for ids in stored.token_ids]
            for k, answer in enumerate(stored.answers or ()):
                tokens[n].append([end])
                if answer is not None:
                    places.append((n, k))
                    answers.append(answer)
        encoded = self._encoder.encode(
            [examples[n].prompt for n, _ in places],
            answers,
            numbers=[numbers[n] for n, _ in places],
            options=[examples[n].template_options for n, _ in places],
        )
        self._encoder.report()
        for (n, k), of_answer in zip(places, encoded, strict=True):
            tokens[n][k] = of_answer.reference
        return tokens

    def _completion(
        self, example: Example, k: int, token_ids: list[int], number: int
    ) -> StoredCompletion:
        stored, where = example.stored, f"row {number}, completion {k}"
        assert stored is not None
        if len(token_ids) > self._most:
            raise UserError(
                f"{where} has {len(token_ids)} tokens, more than max_new_tokens={self._most}: "
                "raise it, or leave the completion out"
            )
        if self._rows is not None and max(token_ids) >= self._rows:
            raise UserError(
                f"{where}: token {max(token_ids)} is beyond the model's embedding of {self._rows} "
                "rows: another tokenizer wrote it"
            )
        finished = token_ids[-1] in self._encoder.end_ids
        logprobs = stored.logprobs[k]
        if logprobs is None:
            return StoredCompletion(token_ids, [math.nan] * len(token_ids), finished)
        if len(logprobs) != len(token_ids):
            raise UserError(
                f"{where} has {len(logprobs)} log-probs and {len(token_ids)} tokens: "
                + _cause(len(logprobs), len(token_ids), are_tokens=stored.token_ids is not None)
            )
        return StoredCompletion(token_ids, [*logprobs], finished)


_Completions = list[StoredCompletion]


def _cause(logprobs: int, tokens: int, *, are_tokens: bool) -> str:
    """The likely cause of a number of log-probs that does not fit, and the remedy."""
    if are_tokens:
        return "give one for each of its `completion_ids`"
    if logprobs == tokens - 1:
        return (
            "its end-of-sequence token has none: add it, or give `completion_ids` if the "
            "completion was cut before its end"
        )
    return (
        "another tokenizer sampled it, or this one writes its text by other tokens: give "
        "`completion_ids` in place of its text"
    )
