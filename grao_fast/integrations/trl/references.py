"""The references of a generation batch: reading, encoding, and attaching them to rows.

A generation batch is B rows in each process. Groups of G rows follow one another over all
processes, so a group may begin in one process and end in the next. A reference is attached to the
first row of its group, its carrier, and is scored by the process that has that row.

Suffixes: N prompts of all processes, K = G + 1 sequences of each, 3 terms of the objective, 2 for
a row's sample and its attached reference; P processes, at most C carriers in each, R of which have
a reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grao_fast.data.encoder import Encoder
from grao_fast.data.encoding import check_tokens
from grao_fast.data.examples import REFERENCE_COLUMNS
from grao_fast.data.fields import Messages, read_prompt, read_reference
from grao_fast.system.visible import visible_errors


class References(NamedTuple):
    """The references of some rows. An absent one has `present` False and no token ids.

    completions: in the form in which TRL calls rewards.
    """

    present: list[bool]
    completions: list[Any]
    token_ids: list[list[int]]


def reference_column(columns: Iterable[str]) -> str | None:
    """The first of `reference`, `completion` and `chosen` among a dataset's columns."""
    columns = set(columns)
    return next((name for name in REFERENCE_COLUMNS if name in columns), None)


def read_row(row: Mapping[str, Any], where: str) -> tuple[str | Messages, str | Messages | None]:
    """A row's prompt and its reference, None if absent; UserError if they cannot be read."""
    column = reference_column(row)
    prompt = read_prompt(row["prompt"], f"{where}, `prompt`")
    value = None if column is None else row[column]
    return prompt, read_reference(value, f"{where}, `{column}`", prompt)


@visible_errors()
def read_references(
    rows: Sequence[Mapping[str, Any]], encoder: Encoder, embedding_rows: int
) -> References:
    """Read and encode the references of rows, each with an end-of-sequence token.

    Their texts are decoded from tokens without special tokens, as TRL decodes samples. UserError if
    the model does not embed a token of a prompt or reference.
    """
    read = [read_row(row, "a row") for row in rows]
    prompts, given = [prompt for prompt, _ in read], [reference for _, reference in read]
    encoded = encoder.encode(prompts, given)
    encoder.report()
    check_tokens(encoded, encoder.tokenizer, embedding_rows, references=True)
    token_ids = [row.reference for row in encoded]
    said = encoder.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(said, prompts, strict=True)
    ]
    return References([bool(ids) for ids in token_ids], completions, token_ids)


def carriers(process: int, B: int, G: int) -> range:
    """The rows of a process that begin a group."""
    return range(-process * B % G, B, G)


def most_carriers(B: int, G: int) -> int:
    """The most rows of a process that can begin a group."""
    return -(-B // G)


def to_score(
    rows: list[Mapping[str, Any]], references: References, samples: Sequence[list], most: int
) -> list[list]:
    """The rows, prompts, completions and token ids of the references, for rewards to score.

    To be gathered, they are padded to `most`, the same number in every process: with the first
    reference or, without any, with a sample, which rewards accept.
    """
    given = [rows, [row["prompt"] for row in rows], references.completions, references.token_ids]
    present = [list(compress(column, references.present)) for column in given]
    fill = present if any(references.present) else samples
    return [[*one, *other[:1] * most][:most] for one, other in zip(present, fill, strict=True)]


def in_order(present_PC: Tensor, rewards_PR: Tensor, B: int, G: int) -> Tensor:
    """rewards_N of all groups' references, NaN where absent.

    Args:
        present_PC: which carriers of each process have a reference, padded with False.
        rewards_PR: the rewards of these in order, followed by those of padding.
    """
    rewards_PC = rewards_PR.new_full(present_PC.shape, torch.nan)
    place_PC = (present_PC.cumsum(1) - 1).clamp(min=0)
    if rewards_PR.shape[1]:
        rewards_PC = rewards_PR.gather(1, place_PC).where(present_PC, torch.nan)
    return torch.cat(
        [row[: len(carriers(process, B, G))] for process, row in enumerate(rewards_PC)]
    )


def ride(
    terms_3NK: Tensor, token_ids: Sequence[Sequence[int]], process: int, B: int
) -> tuple[Tensor, list[Tensor]]:
    """The coefficients of a process's B rows in the objective, and their attached references.

    Args:
        terms_3NK: coefficients of all processes' sequences, the references last.
        token_ids: of the references of this process's carriers; further ones are ignored.

    Returns:
        terms_B23 of each row's sample and attached reference, 0 without one; and the token ids of
        the latter, empty without one.
    """
    G = terms_3NK.shape[2] - 1
    own_B = torch.arange(B) + process * B  # indices of the rows among those of all processes
    riding = list(carriers(process, B, G))
    terms_B23 = terms_3NK.new_zeros(B, 2, 3)
    terms_B23[:, 0] = terms_3NK[:, :, :-1].flatten(1)[:, own_B].T
    terms_B23[riding, 1] = terms_3NK[:, own_B[riding] // G, -1].T
    ids_B = [torch.zeros(0, dtype=torch.int64) for _ in range(B)]
    for b, ids in zip(riding, token_ids, strict=False):
        ids_B[b] = torch.tensor(ids, dtype=torch.int64)
    return terms_B23, ids_B
