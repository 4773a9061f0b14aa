"""The prompts of a run, encoded as they are drawn.

A token takes at least one byte of text, so the bytes of an example, which are known without reading
it, bound its tokens. Before the first step, only these examples are tokenised: a sample at even
distances, those whose bytes would exceed a limit of the model or `max_prompt_length`, and the
largest. All prompts that are too long are thus known, and the length of an epoch with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock
from typing import TYPE_CHECKING, overload

import numpy as np

from grao_fast.data.encoding import Encoded, Encoding, Lengths, Limits
from grao_fast.data.examples import Example, Examples
from grao_fast.data.rows import chunks, paced
from grao_fast.data.sizes import Sizes, text_size
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_KEPT = 2**20  # tokens of encoded examples that are kept: about 40 MB
_HEADERS = 64  # tokens of a template's headers beyond those that the sample has


class DrawnPrompts(Sequence[Encoded], ABC):
    """Prompts that are encoded as they are drawn.

    lengths: the longest that are known before the first step.
    """

    lengths: Lengths

    @abstractmethod
    def exact_lengths(self) -> Lengths:
        """The lengths that no prompt or reference exceeds."""


class Prompts(DrawnPrompts):
    """Encoded examples without those that are too long, each encoded when it is asked for.

    The latest are kept. Threads may share them.

    lengths: the longest of those that were encoded before the first step.
    """

    def __init__(self, examples: Sequence[Example], encoding: Encoding) -> None:
        self._examples, self._encoding = examples, encoding
        self._kept: OrderedDict[int, Encoded] = OrderedDict()
        self._kept_tokens = 0
        self._lock = Lock()
        self.lengths = Lengths(0, 0, 0)
        self._places = self._examine()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        index = int(self._places[place])
        with self._lock:
            found = self._kept.get(index)
            if found is None:
                found = self._draw(index)
                self._keep(index, found)
            self._kept.move_to_end(index)
        return found

    def exact_lengths(self) -> Lengths:
        """The lengths of all prompts and references, for which all are encoded once."""
        longest = self.lengths
        parts = list(chunks(self._places))
        for part in paced(parts, len(parts), "tokenising the whole dataset, in parts of 512"):
            encoded = self._encoding.encode(take(self._examples, part), part)
            longest = longest.joined(Lengths.of(filter(None, encoded)))
        return longest

    def _examine(self) -> np.ndarray:
        """Encode what must be known before the first step; returns the places that are kept."""
        sizes = sizes_of(self._examples)
        dropped: set[int] = set()
        sample = sizes.sample()
        surplus = self._encode(sample, sizes, dropped)
        if len(sample) < len(sizes.whole):
            chosen = self._beyond(sizes, surplus)
            chosen[sizes.largest()] = True
            chosen[list(sample)] = False
            left = np.flatnonzero(chosen).tolist()
            logger.info(
                "tokenising %d of %d examples before the first step: a sample of %d, and %d that "
                "are among the largest or may be too long",
                len(sample) + len(left), len(sizes.whole), len(sample), len(left),
            )  # fmt: skip
            self._encode(left, sizes, dropped)
        kept = np.delete(np.arange(len(sizes.whole)), sorted(dropped))
        self._encoding.report_dropped(kept=len(kept), of=len(sizes.whole))
        return kept

    def _encode(self, places: Sequence[int], sizes: Sizes, dropped: set[int]) -> int:
        """Encode examples, and note which are dropped; returns the most tokens beyond bytes."""
        surplus = 0
        parts = list(chunks(places))
        for part in paced(parts, len(parts), "tokenising, in parts of 512"):
            encoded = self._encoding.encode(take(self._examples, part), part)
            for place, each in zip(part, encoded, strict=True):
                if each is None:
                    dropped.add(place)
                    continue
                surplus = max(surplus, len(each.prompt_ids) - int(sizes.prompt[place]))
                self._keep(place, each)
            self.lengths = self.lengths.joined(Lengths.of(filter(None, encoded)))
        return surplus

    def _beyond(self, sizes: Sizes, surplus: int) -> np.ndarray:
        """Which examples may exceed a limit, by their bytes."""
        limits, headers = self._encoding.limits, 2 * surplus + _HEADERS
        beyond = np.zeros(len(sizes.whole), bool)
        if limits.max_prompt_length is not None:
            beyond |= sizes.prompt + headers > limits.max_prompt_length
        if limits.context_length is not None:
            beyond |= sizes.prompt + headers > limits.context_length - limits.room
            beyond |= sizes.whole + headers > limits.context_length
        return beyond

    def _draw(self, index: int) -> Encoded:
        (encoded,) = self._encoding.encode(take(self._examples, [index]), [index])
        if encoded is None:
            raise UserError(
                f"example {index}: its prompt has more tokens than max_prompt_length="
                f"{self._encoding.limits.max_prompt_length}, and more than its bytes let expect: "
                "leave it out of the dataset"
            )
        return encoded

    def _keep(self, index: int, encoded: Encoded) -> None:
        self._kept[index] = encoded
        self._kept_tokens += _tokens(encoded)
        while self._kept_tokens > _KEPT and len(self._kept) > 1:
            self._kept_tokens -= _tokens(self._kept.popitem(last=False)[1])


def open_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    eos_token_ids: Collection[int] = (),
) -> Prompts:
    """The prompts of a run. Arguments and errors are those of `encode_examples`.

    An example that cannot be used, and was not encoded before the first step, raises its error when
    it is drawn.
    """
    if not examples:
        raise UserError("there are no examples to encode")
    return Prompts(examples, Encoding(tokenizer, limits, eos_token_ids=eos_token_ids))


def lengths_of(prompts: Sequence[Encoded], *, exact: bool = False) -> Lengths:
    """The longest sequences of each kind; of those drawn, as known, or with `exact` of all."""
    if isinstance(prompts, DrawnPrompts):
        return prompts.exact_lengths() if exact else prompts.lengths
    return Lengths.of(prompts)


def sizes_of(examples: Sequence[Example]) -> Sizes:
    """Bytes of the text of every example, or more; known without reading those of a dataset."""
    if isinstance(examples, Examples):
        return examples.sizes
    prompt = np.array(
        [text_size(e.prompt) + text_size(e.template_options) for e in examples], np.int64
    )
    whole = prompt + [text_size(example.reference) for example in examples]
    return Sizes(prompt, whole, whole)


def take(examples: Sequence[Example], places: Sequence[int]) -> list[Example]:
    """Some of the examples; those of a dataset are read in one call."""
    if isinstance(examples, Examples):
        return examples.take(places)
    return [examples[place] for place in places]


def _tokens(encoded: Encoded) -> int:
    sampled = sum(len(each.token_ids) for each in encoded.completions)
    return len(encoded.prompt_ids) + len(encoded.reference_ids) + sampled
