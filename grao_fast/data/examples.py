"""Turns the rows of a dataset into examples: a prompt, its reference, and columns for rewards.

How columns are read:

    prompt                   text, or messages [{"role": ..., "content": ...}, ...]
    reference                the first of the columns `reference`, `completion`, `chosen`: text, or
                             messages that end in an assistant's turn, namely all turns after the
                             prompt, with their tool calls and reasoning
    chosen without prompt    contains its prompt: the messages before the last turn; an HH
                             transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."); or text, whose
                             prompt is the beginning that it shares with `rejected`
    any other column         passed to the reward function by name

A blank reference counts as none. HH transcripts that end in a blank answer are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grao_fast.data.fields import (
    Messages,
    check_text,
    is_hh_transcript,
    parse_hh_transcript,
    read_messages,
    read_prompt,
    read_reference,
    shared_prefix,
)
from grao_fast.data.sources import SourceRows, read_rows
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger, visible_errors

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

REFERENCE_COLUMNS = ("reference", "completion", "chosen")
RESERVED_COLUMNS = ("prompts", "completions", "references")  # arguments of every reward


@dataclass(frozen=True)
class Example:
    """A prompt, its reference answer (None without one), and the other columns of its row.

    row: its number in the dataset, for messages; None if it is of no dataset.
    """

    prompt: str | Messages
    reference: str | Messages | None
    columns: dict[str, Any]
    row: int | None = field(default=None, compare=False)


@visible_errors()
def load_examples(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    require_references: bool = False,
) -> list[Example]:
    """Read a dataset as examples; see `grao_fast.data.examples` for the columns.

    Args:
        dataset: a file (json, jsonl, csv, parquet or arrow, compressed or not), a folder of such
            files or one written by `Dataset.save_to_disk`, a hub id, a `datasets.Dataset` or
            `DatasetDict`, or a list of dicts.
        split: which split to read, if the dataset has several.
        require_references: raise ValueError if no row has a reference.

    Raises:
        ValueError: the dataset cannot be found or read, is empty, or lacks a column; or the prompt
            or reference of a row has the wrong type. The message names row and column.
    """
    rows = read_rows(dataset, split=split)
    columns = _Columns.of(rows)
    if require_references and columns.reference is None:
        raise UserError(
            f"{rows.name} has no reference answers: it has {', '.join(rows.columns)}, and "
            f"references are taken from {', '.join(REFERENCE_COLUMNS)}; rename the column that "
            "holds the answers"
        )
    examples = [columns.example(index, row) for index, row in enumerate(rows.rows)]
    blank = sum(example.reference is None for example in examples)
    if columns.transcripts and blank:
        logger.warning(
            "left out %d of %d transcripts of %s that end in a blank answer",
            blank, len(examples), rows.name,
        )  # fmt: skip
        examples = [example for example in examples if example.reference is not None]
        if not examples:
            raise UserError(f"every transcript of {rows.name} ends in a blank answer")
    elif require_references and blank == len(examples):
        raise UserError(f"every row of {rows.name} has a blank reference in `{columns.reference}`")
    elif columns.reference is not None and blank:
        logger.warning(
            "%d of %d rows of %s have a blank reference in `%s`, which counts as none",
            blank, len(examples), rows.name, columns.reference,
        )  # fmt: skip
    return examples


@dataclass(frozen=True)
class _Columns:
    """The columns of a dataset that hold its prompts and references."""

    prompt: str | None
    reference: str | None
    transcripts: bool  # whether `chosen` holds HH transcripts

    @classmethod
    def of(cls, rows: SourceRows) -> _Columns:
        present = rows.columns
        for name in RESERVED_COLUMNS:
            if name in present:
                raise UserError(
                    f"{rows.name} has a column `{name}`, which is an argument of every reward: "
                    f"rename the column"
                )
        prompt = "prompt" if "prompt" in present else None
        reference = next((name for name in REFERENCE_COLUMNS if name in present), None)
        if prompt is None and reference != "chosen":
            raise UserError(
                f"{rows.name} has no column `prompt`; it has {', '.join(present)}. Give `prompt` "
                "with `reference`, `completion` or `chosen`, or a `chosen` that contains its prompt"
            )
        first = rows.rows[0].get("chosen")
        transcripts = prompt is None and isinstance(first, str) and is_hh_transcript(first)
        plain = prompt is None and isinstance(first, str) and not transcripts
        if plain and "rejected" not in present:
            raise UserError(
                f"{rows.name} has `chosen` as text, and neither `prompt` nor `rejected` to show "
                f"where its prompt ends; it has {', '.join(present)}: add one of them"
            )
        return cls(prompt, reference, transcripts)

    def example(self, index: int, row: Mapping[str, Any]) -> Example:
        where = f"row {index}"
        for name, value in row.items():
            check_text(value, f"{where}, `{name}`")
        used = {self.prompt, self.reference}
        columns = {name: value for name, value in row.items() if name not in used}
        if self.prompt is not None:
            prompt = read_prompt(row.get(self.prompt), f"{where}, `{self.prompt}`")
            value = row.get(self.reference) if self.reference else None
            reference = read_reference(value, f"{where}, `{self.reference}`", prompt)
        else:
            prompt, reference = self._implicit(row, f"{where}, `chosen`")
        return Example(prompt, reference, columns, index)

    def _implicit(
        self, row: Mapping[str, Any], where: str
    ) -> tuple[str | Messages, str | Messages | None]:
        """Split a `chosen` that contains its prompt into prompt and reference."""
        chosen = row.get("chosen")
        if self.transcripts:
            if not isinstance(chosen, str):
                raise UserError(f"{where} must be a transcript, got {type(chosen).__name__}")
            return parse_hh_transcript(chosen, where)
        if isinstance(chosen, str):
            rejected = row.get("rejected")
            if not isinstance(rejected, str):
                raise UserError(
                    f"{where} is text, so `rejected` must be; got {type(rejected).__name__}"
                )
            text = shared_prefix(chosen, rejected)
            if not text.strip():
                raise UserError(f"{where} and `rejected` share no prompt: add a column `prompt`")
            return text, read_reference(chosen[len(text) :], where)
        messages = read_messages(chosen, where)
        if len(messages) == 1:
            raise UserError(f"{where} holds an answer and no prompt before it: add the prompt")
        return messages[:-1], read_reference(messages[-1:], where)
