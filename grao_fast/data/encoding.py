"""Turns examples into token ids that fit the model, or says which example does not and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from grao_fast.data.encoder import Encoder, TokenIds
from grao_fast.data.examples import Example
from grao_fast.data.stored_tokens import StoredCompletion, StoredEncoder
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    reference_ids: empty if the example has no reference.
    reference_text: the reference as its tokens decode, the text that rewards see; None without one.
    completions: those that the dataset stores; empty where it stores none.
    """

    example: Example
    prompt_ids: list[int]
    reference_ids: list[int]
    reference_text: str | None
    completions: Sequence[StoredCompletion] = ()

    @property
    def scored(self) -> Example:
        """The example for rewards, whose reference is `reference_text`."""
        return replace(self.example, reference=self.reference_text)


@dataclass(frozen=True)
class Limits:
    """What the tokens of an example must fit.

    max_new_tokens: the most tokens of a completion, sampled or stored.
    context_length: tokens that the model can hold, prompt and continuation; None: no limit.
    max_prompt_length: longer prompts are dropped, with a warning; None: none is dropped.
    max_reference_length: longer references are cut; None: none is cut.
    embedding_rows: the size of the model's embedding, which no token id may reach; None: any may.
    samples_drawn: whether completions are sampled, for which every prompt must leave room.
    """

    max_new_tokens: int
    context_length: int | None = None
    max_prompt_length: int | None = None
    max_reference_length: int | None = None
    embedding_rows: int | None = None
    samples_drawn: bool = True

    @property
    def room(self) -> int:
        """Tokens that must fit behind every prompt: those of a sample, or at least one."""
        return self.max_new_tokens if self.samples_drawn else 1


class Lengths(NamedTuple):
    """Tokens of the longest prompt, the longest reference, and the longest of both together.

    completion: of the longest that is stored; 0 where none is.
    """

    prompt: int
    reference: int
    together: int
    completion: int = 0

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Lengths:
        """The lengths of examples; zero if there are none."""
        longest = cls(0, 0, 0)
        for each in encoded:
            prompt, reference = len(each.prompt_ids), len(each.reference_ids)
            completion = max((len(c.token_ids) for c in each.completions), default=0)
            longest = longest.joined(cls(prompt, reference, prompt + reference, completion))
        return longest

    def joined(self, other: Lengths) -> Lengths:
        """The longest of both."""
        return Lengths(*map(max, self, other))


def check_templates(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError for examples that the chat template refuses; needs no model."""
    encoder = Encoder(tokenizer)
    for index, example in enumerate(examples):
        number = number_of(example, index)
        encoder.check(number, example.prompt, example.reference, example.template_options)
    encoder.raise_refusals()


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    eos_token_ids: Collection[int] = (),
    trained: bool = True,
) -> list[Encoded]:
    """Tokenise examples and check that they fit the model.

    Messages go through the tokenizer's chat template, see `grao_fast.data.chat`; text is tokenised
    as it is. See `Encoder` for references.

    Args:
        eos_token_ids: all tokens that end a completion of the model.
        trained: False if the model does not read the references: they are neither cut nor checked.

    Raises:
        ValueError: the tokenizer has no EOS or chat template; the template refuses a prompt or
            reference, or it does not fit the model (the message names the example, counted from 0,
            and what to set); no example is left.
    """
    encoding = Encoding(tokenizer, limits, eos_token_ids=eos_token_ids, trained=trained)
    encoded = encoding.encode(examples, range(len(examples)))
    kept = [each for each in encoded if each is not None]
    encoding.report_dropped(kept=len(kept), of=len(examples))
    return kept


class Encoding:
    """Turns examples into token ids that fit the model, in one or more calls of `encode`.

    Arguments and errors are those of `encode_examples`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *,
        eos_token_ids: Collection[int] = (),
        trained: bool = True,
    ) -> None:
        context, new = limits.context_length, limits.max_new_tokens
        if limits.samples_drawn and context is not None and new >= context:
            raise UserError(
                f"max_new_tokens={new} leaves no room for a prompt in the model's context of "
                f"{context} tokens: lower it"
            )
        self.tokenizer, self.limits, self.trained = tokenizer, limits, trained
        cut_to = limits.max_reference_length if trained else None
        self._encoder = Encoder(tokenizer, eos_token_ids, max_reference_length=cut_to)
        self._stored = StoredEncoder(
            tokenizer, eos_token_ids, max_new_tokens=new, embedding_rows=limits.embedding_rows
        )
        self._shortest_dropped = math.inf

    def encode(self, examples: Sequence[Example], places: Sequence[int]) -> list[Encoded | None]:
        """Tokenise examples; None for those that max_prompt_length drops.

        places: the examples' numbers in errors, if they are of no dataset.
        """
        numbers = [number_of(*each) for each in zip(examples, places, strict=True)]
        ids = self._encoder.encode(
            [example.prompt for example in examples],
            [example.reference for example in examples],
            numbers=numbers,
            options=[example.template_options for example in examples],
        )
        self._encoder.report()
        rows = self.limits.embedding_rows
        if rows is not None:
            check_tokens(ids, self.tokenizer, rows, references=self.trained, numbers=numbers)
        each = zip(numbers, examples, ids, strict=True)
        return self._with_completions([self._fitted(*every) for every in each])

    def _with_completions(self, encoded: list[Encoded | None]) -> list[Encoded | None]:
        """Examples to train on, with the completions that are stored beside them."""
        found = {n: e for n, e in enumerate(encoded) if e is not None and e.example.stored}
        if not found or not self.trained:
            return encoded
        examples = [each.example for each in found.values()]
        completions = self._stored.encode(examples, [number_of(e, 0) for e in examples])
        for example, of_it, each in zip(examples, completions, found.values(), strict=True):
            longest = max((len(completion.token_ids) for completion in of_it), default=0)
            _check_stored_fits(number_of(example, 0), len(each.prompt_ids), longest, self.limits)
        whole = dict(zip(found, completions, strict=True))
        return [
            replace(each, completions=whole[n]) if each is not None and n in whole else each
            for n, each in enumerate(encoded)
        ]

    def report_dropped(self, *, kept: int, of: int) -> None:
        """Log how many examples were dropped. Raises UserError if none is left."""
        most = self.limits.max_prompt_length
        if not of:
            raise UserError("there are no examples to encode")
        if not kept:
            raise UserError(
                f"none of {of} prompts has at most max_prompt_length={most} tokens: the shortest "
                f"has {self._shortest_dropped}; raise it"
            )
        if kept < of:
            logger.warning(
                "dropped %d of %d prompts of more than max_prompt_length=%d tokens",
                of - kept, of, most,
            )  # fmt: skip

    def _fitted(self, number: int, example: Example, ids: TokenIds) -> Encoded | None:
        """An encoded example, or None if it is dropped. Raises UserError if it does not fit."""
        prompt, reference = len(ids.prompt), len(ids.reference) if self.trained else 0
        most = self.limits.max_prompt_length
        if most is not None and prompt > most:
            self._shortest_dropped = min(self._shortest_dropped, prompt)
            return None
        _check_fits(number, prompt, reference, self.limits)
        return Encoded(example, ids.prompt, ids.reference, ids.text if ids.reference else None)


def number_of(example: Example, place: int) -> int:
    """The number of an example in errors: that of its row, if it has one."""
    return place if example.row is None else example.row


def check_tokens(
    ids: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    embedding_rows: int,
    *,
    references: bool,
    numbers: Sequence[int] | None = None,
) -> None:
    """Raise UserError for token ids beyond the model's embedding, as of a tokenizer that grew.

    numbers: of the examples, in errors; None: 0, 1, 2...
    """
    numbers = range(len(ids)) if numbers is None else numbers
    largest = [
        max([*each.prompt, *(each.reference if references else ())], default=0) for each in ids
    ]
    beyond = [index for index, token in enumerate(largest) if token >= embedding_rows]
    if beyond:
        token = largest[beyond[0]]
        raise UserError(
            f"example {first_of([numbers[n] for n in beyond])} of {len(ids)}: token {token}, "
            f"{tokenizer.convert_ids_to_tokens(token)!r}, is beyond the model's embedding of "
            f"{embedding_rows} rows: call model.resize_token_embeddings({len(tokenizer)}) and save "
            "the model, or use the tokenizer that belongs to it"
        )


def _check_fits(number: int, prompt: int, reference: int, limits: Limits) -> None:
    """Raise UserError if a prompt and a reference of so many tokens do not fit the model."""
    if prompt == 0:
        raise UserError(f"example {number}: the prompt has no tokens")
    context, room = limits.context_length, limits.room
    if context is None:
        return
    if prompt + room > context and limits.samples_drawn:
        raise UserError(
            f"example {number}: a prompt of {prompt} tokens and max_new_tokens={room} do not fit "
            f"the model's context of {context}: lower max_new_tokens, or set "
            f"max_prompt_length={context - room} to drop such prompts"
        )
    if prompt + room > context:
        raise UserError(
            f"example {number}: a prompt of {prompt} tokens leaves no room for an answer in the "
            f"model's context of {context}: set max_prompt_length={context - room} to drop such "
            "prompts"
        )
    if prompt + reference > context:
        most = room if limits.samples_drawn else context - prompt
        raise UserError(
            f"example {number}: a prompt of {prompt} tokens and a reference of {reference} do not "
            f"fit the model's context of {context}: set max_reference_length={most} to cut "
            "references"
        )


def _check_stored_fits(number: int, prompt: int, completion: int, limits: Limits) -> None:
    """Raise UserError if a prompt and its longest stored completion do not fit the model."""
    context = limits.context_length
    if context is not None and prompt + completion > context:
        raise UserError(
            f"example {number}: a prompt of {prompt} tokens and a stored completion of "
            f"{completion} do not fit the model's context of {context}: leave the completion out, "
            f"or set max_prompt_length={max(1, context - completion)} to drop such prompts"
        )
