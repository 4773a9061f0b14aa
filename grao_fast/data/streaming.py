"""Streaming datasets (`datasets.IterableDataset`): rows in their own order, from a source without
length, which a resumed run goes on reading where it was.

A checkpoint holds the dataset's `state_dict` from at most 64 prompts before the next one, and a
digest of the row that followed, which a resumed run must find there. A shuffle buffer's content is
not part of a `state_dict`: of such a dataset, the epoch is read again up to there.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, overload

from grao_fast.data.encoding import Encoded, Encoding, Lengths, Limits
from grao_fast.data.examples import (
    Example,
    Examples,
    check_references,
    examples_of,
    open_examples,
)
from grao_fast.data.prompts import DrawnPrompts, open_prompts
from grao_fast.data.rows import ListRows, without_padding
from grao_fast.data.sources import SourceRows
from grao_fast.system.digests import digest_rows
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_NAME = "the streaming dataset"
_HEAD = 256  # rows that are checked before the first step
_NAMES = 16  # rows that tell one dataset from another
_MARK = 64  # prompts between states of the dataset that are kept


def open_dataset(
    dataset: str | Path | Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    require_references: bool = False,
    stored: bool = False,
) -> Examples | StreamedExamples:
    """Open a dataset, streaming or not, whose examples are read as they are drawn.

    Arguments and errors are those of `load_examples`.
    """
    import datasets

    source: Any = dataset
    if isinstance(source, datasets.IterableDatasetDict):
        if split not in source:
            raise UserError(f"the dataset has no split {split!r}; it has {', '.join(source)}")
        source = source[split]
    if not isinstance(source, datasets.IterableDataset):
        return open_examples(
            dataset, split=split, require_references=require_references, stored=stored
        )
    if stored:
        raise UserError(
            'sampler="dataset" reads all rows before the first step, to know the largest group: '
            "pass a dataset that is not streaming"
        )
    return StreamedExamples(source, require_references=require_references)


def draw_prompts(
    examples: Sequence[Example] | StreamedExamples,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    *,
    eos_token_ids: Collection[int] = (),
) -> DrawnPrompts:
    """The prompts of a run, streamed or not; see `open_prompts`."""
    if isinstance(examples, StreamedExamples):
        return StreamedPrompts(examples, Encoding(tokenizer, limits, eos_token_ids=eos_token_ids))
    return open_prompts(examples, tokenizer, limits, eos_token_ids=eos_token_ids)


class StreamedExamples:
    """The examples of a streaming dataset.

    head: the first of them, which are read at once.
    compared: as in `Examples`.
    """

    def __init__(self, dataset: IterableDataset, *, require_references: bool) -> None:
        self.dataset = dataset
        self._rows = list(islice(dataset.with_format(None), _HEAD))
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        source = SourceRows(_NAME, columns, ListRows(list(map(without_padding, self._rows))))
        if not self._rows:
            raise UserError(f"{_NAME} is empty: it has no rows")
        self.head, self._columns = examples_of(source, require_references=require_references)
        self.compared = False

    def sample(self) -> Examples:
        """The examples to check."""
        return self.head

    def digest(self) -> str:
        """Return a digest of the features and the first rows."""
        return digest_rows([str(self.dataset.features), *self._rows[:_NAMES]])

    def read(self, number: int, row: Mapping[str, Any]) -> Example | None:
        """Return a row as an example; None for a transcript that ends in a blank answer."""
        example = self._columns.example(number, without_padding(row))
        if self.compared:
            check_references(_NAME, [example])
        blank = example.reference is None and self._columns.transcripts
        return None if blank else example


class StreamedPrompts(DrawnPrompts):
    """The encoded prompts of a streaming dataset, by the order in which they come.

    They are drawn one after another, through as many epochs as it takes; those that are too long
    are left out. Threads may share them. There is no length.

    kept: how many of the latest prompts may be asked for again.
    lengths: as far as the limits and the first rows tell.
    """

    def __init__(self, examples: StreamedExamples, encoding: Encoding) -> None:
        self._examples, self._encoding = examples, encoding
        self._cursor = _Cursor(examples.dataset)
        self._latest: deque[Encoded] = deque()
        self._next = 0  # place of the next prompt
        self._marks: deque[dict[str, Any]] = deque()
        self._lock = Lock()
        self.kept = 1
        head = encoding.encode(list(examples.head), range(len(examples.head)))
        self.lengths = self._bounded(Lengths.of(filter(None, head)))

    def __len__(self) -> int:
        raise TypeError("a streaming dataset has no length")

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[each] for each in range(place.start or 0, place.stop, place.step or 1)]
        with self._lock:
            while self._next <= place:
                self._draw()
            first = self._next - len(self._latest)
            assert place >= first, f"prompt {place} has passed: those from {first} on are kept"
            return self._latest[place - first]

    def exact_lengths(self) -> Lengths:
        """The most that the limits let through, since the stream's end is unknown."""
        limits = self._encoding.limits
        if limits.context_length is None:
            raise UserError(
                "the model's rotary frequencies depend on the longest context, which a streaming "
                "dataset does not tell: set max_prompt_length and max_reference_length, or pass "
                "a dataset with a length"
            )
        prompt = limits.context_length - limits.room
        return Lengths(prompt, limits.context_length, limits.context_length)

    def state(self, place: int) -> dict[str, Any] | None:
        """What `load` needs to go on at a place, as data for JSON; None at the beginning."""
        with self._lock:
            before = [mark for mark in self._marks if mark["place"] <= place]
            assert before or not self._marks, f"prompt {place} has passed, and its state with it"
            return before[-1] if before else None

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the state of a checkpoint; None: from the beginning.

        Raises UserError if the dataset does not give the row that the run had there.
        """
        if state is None:
            return
        if state["dataset"] is None:
            logger.info(
                "%s keeps no state that can be saved, as with a shuffle buffer: reading %d rows "
                "again", _NAME, state["rows"],
            )  # fmt: skip
            self._cursor.begin(state["epoch"])
            for _ in range(state["rows"]):
                self._cursor.take()
        else:
            self._cursor.begin(state["epoch"], state["rows"], state["dataset"])
        if digest_rows([self._cursor.ahead()]) != state["row"]:
            raise UserError(
                f"the streaming dataset gives another row {state['rows']} in epoch "
                f"{state['epoch']} than the run had: resume with the dataset of the run, whose "
                "order must not change, or start anew in another output_dir"
            )
        self._next = state["place"]
        self._marks.append(dict(state))

    def _draw(self) -> None:
        """Encode the next prompt that is short enough."""
        if self._next % _MARK == 0 and not (self._marks and self._marks[-1]["place"] == self._next):
            mark = {"place": self._next, **self._cursor.state()}
            self._marks.append(mark | {"row": digest_rows([self._cursor.ahead()])})
        epoch, encoded = self._cursor.epoch, None
        while encoded is None:
            number, row = self._cursor.take()
            if self._cursor.epoch > epoch + 1:
                raise UserError(
                    "no prompt of the streaming dataset is short enough: raise max_prompt_length"
                )
            example = self._examples.read(number, row)
            if example is not None:
                (encoded,) = self._encoding.encode([example], [number])
        self._latest.append(encoded)
        self._next += 1
        while len(self._latest) > self.kept:
            self._latest.popleft()
        first = self._next - len(self._latest)
        while len(self._marks) > 1 and self._marks[1]["place"] <= first:
            self._marks.popleft()

    def _bounded(self, seen: Lengths) -> Lengths:
        """The lengths of the first rows, or the limits where these are set."""
        limits = self._encoding.limits
        prompt = limits.max_prompt_length or seen.prompt
        reference = limits.max_reference_length or seen.reference
        return Lengths(prompt, reference, prompt + reference)


class _Cursor:
    """A place in a streaming dataset that goes from one epoch to the next."""

    def __init__(self, dataset: IterableDataset) -> None:
        self._source = dataset
        # datasets 4 and 5 have no public way to ask; without an answer, epochs are read again
        iterable = getattr(dataset, "_ex_iterable", None)
        self._is_exact = iterable is not None and not _has_buffer(iterable)
        self.begin(0)

    def begin(self, epoch: int, rows: int = 0, state: dict[str, Any] | None = None) -> None:
        """Go to the start of an epoch, or to a state within, after so many rows."""
        self._dataset = self._source.with_format(None)  # another object, which is at its start
        self._dataset.set_epoch(epoch)
        if state is not None:
            self._dataset.load_state_dict(state)
        self._iterator: Iterator[dict[str, Any]] = iter(self._dataset)
        self._ahead: dict[str, Any] | None = None
        self.epoch, self.rows = epoch, rows

    def state(self) -> dict[str, Any]:
        """The place, as data for JSON; of the dataset's own state only what is such data."""
        assert self._ahead is None, "the state would be behind the row that was read ahead"
        state = None
        if self._is_exact:
            with suppress(TypeError):  # of a state that is not data for JSON
                state = json.loads(json.dumps(self._dataset.state_dict()))
        return {"epoch": self.epoch, "rows": self.rows, "dataset": state}

    def ahead(self) -> dict[str, Any]:
        """The next row, which `take` will return."""
        if self._ahead is None:
            try:
                self._ahead = next(self._iterator)
            except StopIteration:
                if self.rows == 0:
                    raise UserError(f"{_NAME} has no rows in epoch {self.epoch}") from None
                self.begin(self.epoch + 1)
                return self.ahead()
        return self._ahead

    def take(self) -> tuple[int, dict[str, Any]]:
        """The next row and its number in the epoch."""
        row, self._ahead = self.ahead(), None
        self.rows += 1
        return self.rows - 1, row


def _has_buffer(iterable: Any) -> bool:
    """Whether rows pass through a shuffle buffer on their way out of an iterable of `datasets`."""
    if "BufferShuffled" in type(iterable).__name__:
        return True
    inner = [getattr(iterable, "ex_iterable", None), *getattr(iterable, "ex_iterables", ())]
    return any(_has_buffer(each) for each in inner if each is not None)
