"""Tokenises rows of a dataset, and tells how their lengths and their template fit the model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grao_fast.config import SamplingOptions
from grao_fast.data.encoder import Encoder, TokenIds
from grao_fast.data.encoding import Encoded, number_of
from grao_fast.data.examples import Example
from grao_fast.data.prompts import sizes_of, take
from grao_fast.sampling.loaded import LoadedPolicy

READ = 1000  # rows that are tokenised, at most
_LONGEST = 100  # of these, the ones with the most bytes; the others are drawn at random

# Whether a row fits the model: its prompt is longer than max_prompt_length ("dropped"), has no
# tokens ("blank"), or leaves no room for max_new_tokens, or for an answer where nothing is sampled
# ("no room"); its reference leaves the context ("beyond"); one of its tokens has no embedding
# ("unknown").
Fit = Literal["fits", "refused", "dropped", "blank", "no room", "beyond", "unknown"]


@dataclass(frozen=True)
class Row:
    """A row as tokens.

    number: of the row in the dataset.
    stands_for: the number of rows that it stands for; 1 if all were read.
    """

    number: int
    example: Example
    ids: TokenIds
    fit: Fit
    stands_for: float = 1.0

    @property
    def encoded(self) -> Encoded:
        """The row as it is trained on."""
        ids = self.ids
        text = ids.text if ids.reference else None
        return Encoded(self.example, ids.prompt, ids.reference, text)


@dataclass(frozen=True)
class RowFacts:
    """The rows that were tokenised, and the oddities of their template.

    total: rows of the dataset.
    refused: rows that the chat template refuses, with its reasons.
    exceptions: rows whose reference does not simply follow the prompt, by reason; see `Encoder`.
    cut: rows whose reference was cut to max_reference_length, and so has no end.
    doubled: rows whose prompt begins with two BOS tokens.
    special: rows of messages whose contents hold the text of a special token.
    ends: how often each token ends a reference.
    ends_of_turns: tokens that end a turn of the template, and no sample.
    context: tokens that the model holds; None: no limit.
    """

    total: int
    rows: list[Row]
    refused: Mapping[int, str]
    exceptions: Mapping[str, list[int]]
    cut: list[int]
    doubled: list[int]
    special: list[int]
    ends: Counter[str]
    ends_of_turns: list[str]
    context: int | None

    def that(self, fit: Fit) -> list[Row]:
        """The rows that fit, or that do not in this way."""
        return [row for row in self.rows if row.fit == fit]

    def share(self, fit: Fit) -> float:
        """The share of the dataset's rows that fit, or do not in this way, as estimated."""
        return sum(row.stands_for for row in self.that(fit)) / self.total


def read_rows(
    examples: Sequence[Example],
    loaded: LoadedPolicy,
    sampling: SamplingOptions,
    *,
    seed: int,
    trained: bool = True,
) -> RowFacts:
    """Tokenise up to READ rows: those with the most bytes, and others at random.

    trained: False for held-out rows, whose references are scored and not read by the model.

    Raises UserError for messages if the tokenizer has no chat template.
    """
    tokenizer, places = loaded.tokenizer, _chosen(examples, seed)
    chosen = take(examples, list(places))
    numbers = [number_of(*each) for each in zip(chosen, places, strict=True)]
    encoder = Encoder(
        tokenizer,
        loaded.eos_token_ids,
        max_reference_length=sampling.max_reference_length if trained else None,
    )
    ids = encoder.encode(
        [each.prompt for each in chosen],
        [each.reference for each in chosen],
        numbers=numbers,
        options=[each.template_options for each in chosen],
    )

    def fit(number: int, of_row: TokenIds) -> Fit:
        if number in encoder.refusals:
            return "refused"
        return fit_of(of_row, loaded, sampling, trained=trained)

    rows = [
        Row(number, example, of_row, fit(number, of_row), stands_for)
        for number, example, of_row, stands_for in zip(
            numbers, chosen, ids, places.values(), strict=True
        )
    ]

    def those(test: Callable[[Row], bool]) -> list[int]:
        return [row.number for row in rows if test(row)]

    last = [row.ids.reference[-1] for row in rows if row.ids.reference]
    ends = [token for token in last if token in encoder.end_ids]  # the others were cut
    bos, special = tokenizer.bos_token_id, tokenizer.all_special_tokens
    return RowFacts(
        total=len(examples),
        rows=rows,
        refused=encoder.refusals,
        exceptions=encoder.exceptions,
        cut=those(lambda row: not encoder.end_ids.issuperset(row.ids.reference[-1:])),
        doubled=those(lambda row: bos is not None and row.ids.prompt[:2] == [bos, bos]),
        special=those(lambda row: _holds(row.example.prompt, special)),
        ends=Counter(tokenizer.convert_ids_to_tokens(ends)),
        ends_of_turns=encoder.ends_of_turns,
        context=loaded.context_length,
    )


def fit_of(
    ids: TokenIds, loaded: LoadedPolicy, sampling: SamplingOptions, *, trained: bool = True
) -> Fit:
    """Whether a row fits the model, by the rules of `encode_examples`."""
    prompt, reference = len(ids.prompt), len(ids.reference) if trained else 0
    context, longest = loaded.context_length, sampling.max_prompt_length
    if max([*ids.prompt, *(ids.reference if trained else ())], default=0) >= loaded.embedding_rows:
        return "unknown"
    if longest is not None and prompt > longest:
        return "dropped"
    if prompt == 0:
        return "blank"
    room = sampling.max_new_tokens if sampling.samples_drawn or not trained else 1
    if context is not None and prompt + room > context:
        return "no room"
    return "beyond" if context is not None and prompt + reference > context else "fits"


def drawn(facts: RowFacts, count: int, seed: int) -> list[Encoded]:
    """Up to `count` of the rows that fit, at random."""
    fitting = facts.that("fits")
    chosen = random.Random(seed).sample(fitting, min(count, len(fitting)))
    return [row.encoded for row in chosen]


def _chosen(examples: Sequence[Example], seed: int) -> dict[int, float]:
    """The places of the rows that are tokenised, and the number of rows that each stands for."""
    total = len(examples)
    if total <= READ:
        return dict.fromkeys(range(total), 1.0)
    by_size = np.argsort(-sizes_of(examples).group, kind="stable").tolist()
    others = random.Random(seed).sample(sorted(by_size[_LONGEST:]), READ - _LONGEST)
    for_each = dict.fromkeys(by_size[:_LONGEST], 1.0)
    for_each |= dict.fromkeys(others, (total - _LONGEST) / len(others))
    return dict(sorted(for_each.items()))


def _contents(value: Any) -> list[str]:
    """The texts of a prompt or a reference: of messages, their contents."""
    if value is None or isinstance(value, str):
        return [value or ""]
    return [str(message.get("content") or "") for message in value]


def _holds(prompt: Any, tokens: Sequence[str]) -> bool:
    """Whether messages hold the text of a special token, as where a template was applied before."""
    if isinstance(prompt, str):
        return False
    return any(token in text for text in _contents(prompt) for token in tokens)
