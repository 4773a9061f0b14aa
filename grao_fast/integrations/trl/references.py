"""The references of a generation batch: found, encoded, and given a row of their group to ride on.

A generation batch is B rows in each process, groups of G one after another over all processes, so
that a group may begin in one process and end in the next. Its reference rides on the row that
begins it, its carrier, and is scored by the process that holds that row.

Suffixes: N prompts of all processes, K = G + 1 sequences of each, 3 terms of the objective, 2 for
a row's sample and the reference that rides on it; P processes, C carriers of one at most, R of
these that have a reference.
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
    """Of some rows. Where absent, `present` is False and there are no token ids.

    completions: as TRL's rewards are called with.
    """

    present: list[bool]
    completions: list[Any]
    token_ids: list[list[int]]


def reference_column(columns: Iterable[str]) -> str | None:
    """The first of `reference`, `completion` and `chosen` among a dataset's columns."""
    columns = set(columns)
    return next((name for name in REFERENCE_COLUMNS if name in columns), None)


def read_row(row: Mapping[str, Any], where: str) -> tuple[str | Messages, str | Messages | None]:
    """Prompt and reference; None where it is absent. ValueError on what cannot be read."""
    column = reference_column(row)
    prompt = read_prompt(row["prompt"], f"{where}, `prompt`")
    value = None if column is None else row[column]
    return prompt, read_reference(value, f"{where}, `{column}`", prompt)


@visible_errors()
def read_references(
    rows: Sequence[Mapping[str, Any]], encoder: Encoder, embedding_rows: int
) -> References:
    """References of rows with `prompt`, each with an end-of-sequence token.

    Their texts are read from their tokens as TRL reads samples: without special tokens. ValueError
    where the model has no embedding of a token, of the prompt or the reference.
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
    """How many rows of a process may begin a group."""
    return -(-B // G)


def to_score(
    rows: list[Mapping[str, Any]], references: References, samples: Sequence[list], most: int
) -> list[list]:
    """Rows, prompts, completions and token ids of the references that are there, for rewards.

    They are filled up to `most`, as many in every process, to gather: with the first of them, or
    where there is none with a sample, which is something that rewards can take.
    """
    given = [rows, [row["prompt"] for row in rows], references.completions, references.token_ids]
    present = [list(compress(column, references.present)) for column in given]
    fill = present if any(references.present) else samples
    return [[*one, *other[:1] * most][:most] for one, other in zip(present, fill, strict=True)]


def in_order(present_PC: Tensor, rewards_PR: Tensor, B: int, G: int) -> Tensor:
    """rewards_N of all groups' references, NaN where absent.

    Args:
        present_PC: which carriers of each process have a reference, False behind the last one.
        rewards_PR: of these, in that order, and of whatever else a process scored behind them.
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
