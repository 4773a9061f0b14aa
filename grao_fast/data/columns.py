"""How the columns of a dataset make an example; `grao_fast.data.examples` lists them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grao_fast.data.fields import (
    TEMPLATE_COLUMNS,
    Messages,
    check_text,
    is_hh_transcript,
    parse_hh_transcript,
    read_messages,
    read_prompt,
    read_reference,
    read_template_options,
    shared_prefix,
)
from grao_fast.data.sources import SourceRows
from grao_fast.data.stored import (
    COMPLETIONS,
    STORED_COLUMNS,
    TOKENS,
    Stored,
    read_stored,
    stores_completions,
)
from grao_fast.system.errors import UserError

REFERENCE_COLUMNS = ("reference", "completion", "chosen")
RESERVED_COLUMNS = ("prompts", "completions", "references")  # arguments of every reward
_NUMBERS = ("completion_ids", "rewards", "logprobs")  # columns that hold no text


@dataclass(frozen=True)
class Example:
    """A prompt, its reference answer (None without one), and the other columns of its row.

    row: its number in the dataset, for messages; None if it is of no dataset.
    stored: its completions, of a dataset that is read with them.
    """

    prompt: str | Messages
    reference: str | Messages | None
    columns: dict[str, Any]
    row: int | None = field(default=None, compare=False)
    stored: Stored | None = None

    @property
    def template_options(self) -> dict[str, Any]:
        """The arguments that the row gives the chat template; none where no template is used."""
        if isinstance(self.prompt, str):
            return {}
        where = "an example" if self.row is None else f"row {self.row}"
        return read_template_options(self.columns, where)


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset that hold its prompts and references.

    stored: whether its completions are read too.
    """

    prompt: str | None
    reference: str | None
    transcripts: bool  # whether `chosen` holds HH transcripts
    stored: bool = False

    @classmethod
    def of(cls, rows: SourceRows, *, stored: bool = False) -> Columns:
        present = rows.columns
        stored = stored and stores_completions(present)
        _refuse_reserved(present, rows.name, stored=stored)
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
        return cls(prompt, reference, transcripts, stored)

    def rendered(self, present: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
        """The columns that a chat template writes into a prompt; also into a reference; and all
        that hold a part of a group."""
        prompt = [self.prompt or "chosen"]
        prompt += [name for name in TEMPLATE_COLUMNS if name in present]
        whole = list(dict.fromkeys([*prompt, self.reference or prompt[0]]))
        stored = [name for name in (COMPLETIONS, TOKENS) if self.stored and name in present]
        return prompt, whole, [*whole, *stored]

    def example(self, index: int, row: Mapping[str, Any]) -> Example:
        where = f"row {index}"
        _refuse_reserved(row, where, stored=self.stored)
        for name, value in row.items():
            if not (self.stored and name in _NUMBERS):
                check_text(value, f"{where}, `{name}`")
        used = {self.prompt, self.reference, *(STORED_COLUMNS if self.stored else ())}
        columns = {name: value for name, value in row.items() if name not in used}
        if self.prompt is not None:
            prompt = read_prompt(row.get(self.prompt), f"{where}, `{self.prompt}`")
            value = row.get(self.reference) if self.reference else None
            reference = read_reference(value, f"{where}, `{self.reference}`", prompt)
        else:
            prompt, reference = self._implicit(row, f"{where}, `chosen`")
        stored = read_stored(row, where, prompt) if self.stored else None
        example = Example(prompt, reference, columns, index, stored)
        _ = example.template_options  # are read, so that errors are raised here
        return example

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


def _refuse_reserved(columns: Container[str], where: str, *, stored: bool) -> None:
    for name in RESERVED_COLUMNS:
        if name in columns and not (stored and name in STORED_COLUMNS):
            raise UserError(
                f"{where} has a column `{name}`, which is an argument of every reward: rename the "
                "column"
            )
