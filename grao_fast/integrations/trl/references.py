"""The references of a generation batch: found, encoded, and given a row of their group to ride on.

A generation batch is B rows in each process, groups of G one after another over all processes, so
that a group may begin in one process and end in the next. Its reference rides on the row that
begins it, its carrier, and is scored by the process that holds that row.

Suffixes: N prompts of all processes, K = G + 1 sequences of each, 3 terms of the objective, 2 for
a row's sample and the reference that rides on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grao_fast.data import REFERENCE_COLUMNS
from grao_fast.encoding import Encoder
from grao_fast.fields import read_prompt, read_reference


class References(NamedTuple):
    """Of some rows. texts: None where absent; completions: as TRL's rewards are called with."""

    texts: list[str | None]
    completions: list[Any]
    token_ids: list[list[int]]


def reference_column(columns: Iterable[str]) -> str:
    """The first of `reference`, `completion` and `chosen` among a dataset's columns."""
    columns = list(columns)
    for name in REFERENCE_COLUMNS:
        if name in columns:
            return name
    raise ValueError(
        f"the dataset has no reference answers: its columns are {', '.join(columns)}; add "
        f"{', '.join(REFERENCE_COLUMNS[:-1])} or {REFERENCE_COLUMNS[-1]}"
    )


def read_references(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> References:
    """References of rows with `prompt`, each with an end-of-sequence token.

    Their texts are read from their tokens as TRL reads samples: without special tokens.
    """
    column = reference_column(rows[0])
    prompts = [read_prompt(row["prompt"], "column `prompt`") for row in rows]
    given = [
        read_reference(row[column], f"column `{column}`", prompt)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    token_ids = [row.reference for row in encoder.encode(prompts, given)]
    encoder.report()
    said = encoder.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    texts = [text if ids else None for text, ids in zip(said, token_ids, strict=True)]
    completions = [
        text or "" if isinstance(prompt, str) else [{"role": "assistant", "content": text or ""}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    return References(texts, completions, token_ids)


def carriers(process: int, B: int, G: int) -> range:
    """The rows of a process that begin a group."""
    return range(-process * B % G, B, G)


def scored_rows(process: int, B: int, G: int) -> list[int]:
    """The carriers of a process, filled up with row 0: as many in every process, to gather."""
    most = -(-B // G)
    return [*carriers(process, B, G), *[0] * most][:most]


def places_of_groups(processes: int, B: int, G: int) -> list[int]:
    """Where, in what all processes gathered of their scored rows, each group's reference is."""
    most = -(-B // G)
    return [
        process * most + place
        for process in range(processes)
        for place in range(len(carriers(process, B, G)))
    ]


def ride(
    terms_3NK: Tensor, token_ids: Sequence[Sequence[int]], process: int, B: int
) -> tuple[Tensor, list[Tensor]]:
    """What each of a process's B rows adds to the objective, and the reference that rides on it.

    Args:
        terms_3NK: coefficients of all processes' sequences, the references last.
        token_ids: of the references of this process's carriers; what comes behind is not read.

    Returns:
        terms_B23 of the row's sample and of the reference that rides on it, 0 where none does; and
        the token ids of the latter, empty where none does.
    """
    G = terms_3NK.shape[2] - 1
    own_B = torch.arange(B) + process * B  # places of the rows among all processes'
    riding = list(carriers(process, B, G))
    terms_B23 = terms_3NK.new_zeros(B, 2, 3)
    terms_B23[:, 0] = terms_3NK[:, :, :-1].flatten(1)[:, own_B].T
    terms_B23[riding, 1] = terms_3NK[:, own_B[riding] // G, -1].T
    ids_B = [torch.zeros(0, dtype=torch.int64) for _ in range(B)]
    for b, ids in zip(riding, token_ids, strict=False):
        ids_B[b] = torch.tensor(ids, dtype=torch.int64)
    return terms_B23, ids_B
