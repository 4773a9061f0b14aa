"""Turns the rows of a dataset into examples: a prompt, its reference, and columns for rewards.

How columns are read:

    prompt                   text, or messages [{"role": ..., "content": ...}, ...]
    reference                the first of the columns `reference`, `completion`, `chosen`: text, or
                             messages that end in an assistant's turn, namely all turns after the
                             prompt, with their tool calls and reasoning
    chosen without prompt    contains its prompt: the messages before the last turn; an HH
                             transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."); or text, whose
                             prompt is the beginning that it shares with `rejected`
    tools                    the tools that the chat template shows: JSON schemas, or one text of
                             JSON that holds them
    chat_template_kwargs     further arguments of the chat template, such as enable_thinking
    any other column         passed to the reward function by name, as the last two are too
    completions, rewards...  where completions are stored: see `grao_fast.data.stored`

A blank reference counts as none. HH transcripts that end in a blank answer are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from grao_fast.data.columns import REFERENCE_COLUMNS, Columns, Example
from grao_fast.data.rows import chunks, paced
from grao_fast.data.sizes import Sizes
from grao_fast.data.sources import SourceRows, read_rows
from grao_fast.data.stored import check_columns
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger, visible_errors

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)


class Examples(Sequence[Example]):
    """The examples of a dataset, each read from its row when it is asked for.

    places: the rows that are examples; None: all.
    compared: whether every example needs a reference, with which a pairwise reward compares.

    Raises UserError, when an example is asked for, if its row cannot be read.
    """

    def __init__(
        self,
        source: SourceRows,
        columns: Columns,
        places: np.ndarray | None = None,
        *,
        compared: bool = False,
    ) -> None:
        self._source, self._columns, self._places = source, columns, places
        self.compared = compared

    def __len__(self) -> int:
        return len(self._source.rows) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return self.take(range(len(self))[place])
        return self.take([range(len(self))[place]])[0]

    def __iter__(self) -> Iterator[Example]:
        for places in chunks(range(len(self))):
            yield from self.take(places)

    def take(self, places: Sequence[int]) -> list[Example]:
        """Read some examples."""
        rows = list(places) if self._places is None else self._places[list(places)].tolist()
        read = self._source.rows.take(rows)
        examples = [self._columns.example(*each) for each in zip(rows, read, strict=True)]
        if self.compared:
            check_references(self._source.name, examples)
        return examples

    def among(self, places: Sequence[int]) -> Examples:
        """Return some of these examples, of which none is read yet."""
        rows = np.asarray(places, np.int64)
        if self._places is not None:
            rows = self._places[rows]
        return Examples(self._source, self._columns, rows, compared=self.compared)

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes of the text of every example, or more; see `Rows.sizes`."""
        rows, columns = self._source.rows, self._columns.rendered(self._source.columns)
        sizes = Sizes(*(rows.sizes(names) for names in columns))
        if self._places is None:
            return sizes
        return Sizes(*(each[self._places] for each in sizes))

    def sample(self) -> Examples:
        """Examples at even distances, as many as are soon tokenised; all of a small dataset."""
        return self.among(self.sizes.sample())

    def digest(self) -> str:
        """Return a digest of the dataset's content."""
        return self._source.rows.digest()


def check_references(name: str, examples: Sequence[Example]) -> None:
    """Raise UserError if an example lacks the reference that a pairwise reward compares with."""
    absent = [example.row for example in examples if example.reference is None]
    if absent:
        raise UserError(
            f"{name}: no reference in row {first_of(absent)}, which a pairwise reward compares "
            'with; leave such rows out or set reward_type="pointwise"'
        )


@visible_errors()
def load_examples(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    require_references: bool = False,
    stored: bool = False,
) -> list[Example]:
    """Read a dataset as examples; see `grao_fast.data.examples` for the columns.

    Args:
        dataset: a file (json, jsonl, csv, parquet or arrow, compressed or not), a folder of such
            files or one written by `Dataset.save_to_disk`, a hub id, a `datasets.Dataset` or
            `DatasetDict`, or a list of dicts.
        split: which split to read, if the dataset has several.
        require_references: raise ValueError if no row has a reference.
        stored: read completions too, if there are any; see `grao_fast.data.stored`.

    Raises:
        ValueError: the dataset cannot be found or read, is empty, or lacks a column; or the prompt
            or reference of a row has the wrong type. The message names row and column.
    """
    source = read_rows(dataset, split=split)
    columns = Columns.of(source, stored=stored)
    return _checked(source, columns, require_references, whole=True)[1]


def open_examples(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    require_references: bool = False,
    stored: bool = False,
) -> Examples:
    """Open a dataset whose examples are read as they are drawn.

    Arguments and errors are those of `load_examples`, but of a large dataset only a sample is read
    and checked here.
    """
    source = read_rows(dataset, split=split)
    return examples_of(source, require_references=require_references, stored=stored)[0]


def examples_of(
    source: SourceRows, *, require_references: bool, stored: bool = False
) -> tuple[Examples, Columns]:
    """The examples of rows, a sample of which is checked, and how the columns are read."""
    columns = Columns.of(source, stored=stored)
    if stored:
        check_columns(source.columns, source.name)
    return _checked(source, columns, require_references, whole=False)[0], columns


def _checked(
    source: SourceRows, columns: Columns, require_references: bool, *, whole: bool
) -> tuple[Examples, list[Example]]:
    """The examples of a dataset; and those read to check it, all or a sample."""
    if require_references and columns.reference is None:
        raise UserError(
            f"{source.name} has no reference answers: it has {', '.join(source.columns)}, and "
            f"references are taken from {', '.join(REFERENCE_COLUMNS)}; rename the column that "
            "holds the answers"
        )
    examples = Examples(source, columns)
    if columns.transcripts:
        return _without_blank(examples, source.name, whole=whole)
    read = list(examples if whole else examples.sample())
    blank = sum(example.reference is None for example in read)
    if require_references and blank == len(read):
        raise UserError(
            f"every row of {source.name} has a blank reference in `{columns.reference}`"
        )
    if columns.reference is not None and blank:
        logger.warning(
            "%d of %d rows%s of %s have a blank reference in `%s`, which counts as none",
            blank, len(read), " read" * (len(read) < len(examples)), source.name, columns.reference,
        )  # fmt: skip
    return examples, read


def _without_blank(
    transcripts: Examples, name: str, *, whole: bool
) -> tuple[Examples, list[Example]]:
    """Leave out transcripts that end in a blank answer, for which all are read."""
    kept, read = [], []
    for place, example in enumerate(paced(transcripts, len(transcripts), f"reading {name}")):
        if example.reference is not None:
            kept.append(place)
            read += [example] if whole else []
    if not kept:
        raise UserError(f"every transcript of {name} ends in a blank answer")
    if len(kept) < len(transcripts):
        logger.warning(
            "left out %d of %d transcripts of %s that end in a blank answer",
            len(transcripts) - len(kept), len(transcripts), name,
        )  # fmt: skip
    return transcripts.among(kept), read
