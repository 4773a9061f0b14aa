"""From a dataset to token ids: rows become `Example`s, examples become `Encoded` ones.

What counts as a prompt and as a reference:

    prompt                   text, or messages [{"role": ..., "content": ...}, ...]
    reference                the first of the columns `reference`, `completion`, `chosen`; text, or
                             messages that end in an assistant's turn: all turns that follow the
                             prompt, with their tool calls and reasoning
    chosen without prompt    holds its prompt: messages before the last turn; an HH transcript
                             ("\\n\\nHuman: ...\\n\\nAssistant: ..."); or text, of which the prompt
                             is what `chosen` and `rejected` share
    anything else            goes to the reward function by name

A blank reference is an absent one; an HH transcript that ends in a blank answer is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grao_fast.data.encoding import Encoder, TokenIds
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
from grao_fast.data.sources import Rows, read_rows
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger, visible_errors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

REFERENCE_COLUMNS = ("reference", "completion", "chosen")
RESERVED_COLUMNS = ("prompts", "completions", "references")  # names the reward is called with


@dataclass(frozen=True)
class Example:
    """A prompt, its reference answer (None: absent) and the columns that rewards may ask for."""

    prompt: str | Messages
    reference: str | Messages | None
    columns: dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """An example as token ids.

    reference_ids: empty where the reference is absent.
    reference_text: what they say, read as a sample's tokens are; None where it is absent.
    """

    example: Example
    prompt_ids: list[int]
    reference_ids: list[int]
    reference_text: str | None

    @property
    def scored(self) -> Example:
        """The example for rewards: its reference is the text that `reference_ids` say."""
        return replace(self.example, reference=self.reference_text)


@visible_errors()
def load_examples(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]],
    *,
    split: str = "train",
    require_references: bool = False,
) -> list[Example]:
    """Read a dataset into examples; see the top of this file for the columns.

    Args:
        dataset: a file (json, jsonl, csv, parquet or arrow, compressed or not), a folder of such
            files or one written by `Dataset.save_to_disk`, a hub id, a `datasets.Dataset` or
            `DatasetDict`, or a list of dicts.
        split: which one, where the dataset has several.
        require_references: refuse a dataset in which no row has one.

    Raises:
        ValueError: the dataset cannot be found or read, is empty, or lacks a column; or a row's
            prompt or reference is of the wrong type. The message names row and column.
    """
    rows = read_rows(dataset, split=split)
    columns = _Columns.of(rows)
    if require_references and columns.reference is None:
        raise UserError(
            f"{rows.name} has no reference answers: it has {', '.join(rows.columns)}, and a "
            f"reference is taken from {', '.join(REFERENCE_COLUMNS)}; rename the column that "
            "holds the answers"
        )
    examples = [columns.example(index, row) for index, row in enumerate(rows.rows)]
    blank = sum(example.reference is None for example in examples)
    if columns.transcripts and blank:
        logger.warning(
            "left out %d of %d transcripts of %s, which end in a blank answer",
            blank, len(examples), rows.name,
        )  # fmt: skip
        examples = [example for example in examples if example.reference is not None]
        if not examples:
            raise UserError(f"every transcript of {rows.name} ends in a blank answer")
    elif require_references and blank == len(examples):
        raise UserError(f"every row of {rows.name} has a blank reference in `{columns.reference}`")
    elif columns.reference is not None and blank:
        logger.warning(
            "%d of %d rows of %s have a blank reference in `%s`: they count as having none",
            blank, len(examples), rows.name, columns.reference,
        )  # fmt: skip
    return examples


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what, decided once for the whole dataset."""

    prompt: str | None
    reference: str | None
    transcripts: bool  # `chosen` holds HH transcripts

    @classmethod
    def of(cls, rows: Rows) -> _Columns:
        present = rows.columns
        for name in RESERVED_COLUMNS:
            if name in present:
                raise UserError(
                    f"{rows.name} has a column `{name}`, a name that rewards are called with: "
                    f"rename the column"
                )
        prompt = "prompt" if "prompt" in present else None
        reference = next((name for name in REFERENCE_COLUMNS if name in present), None)
        if prompt is None and reference != "chosen":
            raise UserError(
                f"{rows.name} has no column `prompt`; it has {', '.join(present)}. Needed: "
                "`prompt` with `reference`, `completion` or `chosen`, or a `chosen` that holds "
                "its prompt"
            )
        first = rows.rows[0].get("chosen")
        transcripts = prompt is None and isinstance(first, str) and is_hh_transcript(first)
        plain = prompt is None and isinstance(first, str) and not transcripts
        if plain and "rejected" not in present:
            raise UserError(
                f"{rows.name} has `chosen` as text, and neither `prompt` nor `rejected` to tell "
                f"where its prompt ends; it has {', '.join(present)}"
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
        return Example(prompt, reference, columns)

    def _implicit(
        self, row: Mapping[str, Any], where: str
    ) -> tuple[str | Messages, str | Messages | None]:
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
                raise UserError(
                    f"{where} and `rejected` share no prompt: give it in a column `prompt`"
                )
            return text, read_reference(chosen[len(text) :], where)
        messages = read_messages(chosen, where)
        if len(messages) == 1:
            raise UserError(f"{where} holds an answer and no prompt before it")
        return messages[:-1], read_reference(messages[-1:], where)


def check_templates(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse examples that the tokenizer's chat template cannot write, before a model is loaded."""
    Encoder(tokenizer).check(
        [example.prompt for example in examples], [example.reference for example in examples]
    )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    max_new_tokens: int,
    max_prompt_length: int | None = None,
    max_reference_length: int | None = None,
    eos_token_ids: Collection[int] = (),
    embedding_rows: int | None = None,
    trained: bool = True,
) -> list[Encoded]:
    """Tokenise examples and check that they fit the model.

    Messages go through the tokenizer's chat template, with the generation prompt, or open where
    they end in an assistant's turn; text is encoded as it is. See `Encoder` for references.

    Args:
        context_length: tokens the model can hold, a prompt and its continuation; None: no limit.
        max_new_tokens: tokens to sample after a prompt.
        max_prompt_length: longer prompts are dropped, with a warning that counts them.
        max_reference_length: longer references are cut.
        eos_token_ids: all tokens that end a completion of the model.
        embedding_rows: of the model; no token may be beyond them. None: not checked.
        trained: False where no model reads the references: they are neither cut nor checked.

    Raises:
        ValueError: no EOS or chat template; a prompt or reference that the template refuses or that
            does not fit the model (the message says which example, counted from 0, by how much, and
            what to set); nothing left.
    """
    if not examples:
        raise UserError("there are no examples to encode")
    if context_length is not None and max_new_tokens >= context_length:
        raise UserError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's "
            f"{context_length} tokens: lower it"
        )
    encoder = Encoder(
        tokenizer, eos_token_ids, max_reference_length=max_reference_length if trained else None
    )
    ids = encoder.encode(
        [example.prompt for example in examples], [example.reference for example in examples]
    )
    encoder.report()
    if embedding_rows is not None:
        check_tokens(ids, tokenizer, embedding_rows, references=trained)
    encoded, dropped = [], 0
    for row, (example, (prompt_ids, reference_ids, text)) in enumerate(
        zip(examples, ids, strict=True)
    ):
        if max_prompt_length is not None and len(prompt_ids) > max_prompt_length:
            dropped += 1
            continue
        reference = len(reference_ids) if trained else 0
        _check_fit(row, len(prompt_ids), reference, context_length, max_new_tokens)
        encoded.append(Encoded(example, prompt_ids, reference_ids, text if reference_ids else None))
    if dropped:
        logger.warning(
            "dropped %d of %d prompts of more than max_prompt_length=%d tokens",
            dropped, len(examples), max_prompt_length,
        )  # fmt: skip
    if not encoded:
        raise UserError(
            f"none of {len(examples)} prompts has at most max_prompt_length={max_prompt_length} "
            f"tokens; the shortest has {min(len(row.prompt) for row in ids)}"
        )
    return encoded


def check_tokens(
    rows: Sequence[TokenIds],
    tokenizer: PreTrainedTokenizerBase,
    embedding_rows: int,
    *,
    references: bool,
) -> None:
    """Refuse tokens that the model has no embedding of, as a tokenizer that has grown gives."""
    last = [max([*row.prompt, *(row.reference if references else ())], default=0) for row in rows]
    beyond = [n for n, token in enumerate(last) if token >= embedding_rows]
    if beyond:
        token = last[beyond[0]]
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise UserError(
            f"example {beyond[0]}{more} of {len(rows)}: token {token}, "
            f"{tokenizer.convert_ids_to_tokens(token)!r}, is beyond the model's embedding of "
            f"{embedding_rows} rows: call model.resize_token_embeddings({len(tokenizer)}) and save "
            "the model, or use the tokenizer that belongs to it"
        )


def _check_fit(
    row: int, prompt: int, reference: int, context_length: int | None, max_new_tokens: int
) -> None:
    if prompt == 0:
        raise UserError(f"example {row}: the prompt has no tokens")
    if context_length is None:
        return
    room = context_length - prompt
    if room < max_new_tokens:
        raise UserError(
            f"example {row}: a prompt of {prompt} tokens and max_new_tokens={max_new_tokens} do "
            f"not fit the model's {context_length}: lower max_new_tokens, or set "
            f"max_prompt_length={context_length - max_new_tokens} to drop such prompts"
        )
    if room < reference:
        raise UserError(
            f"example {row}: a prompt of {prompt} tokens and a reference of {reference} do not fit "
            f"the model's {context_length}: set max_reference_length={max_new_tokens} to cut "
            f"references"
        )
