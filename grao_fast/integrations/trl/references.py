"""The references of a generation batch: reading them, and attaching them to rows.

A generation batch is B rows in each process. Groups of G rows follow one another over all
processes, so a group may begin in one process and end in the next. A reference is attached to the
first row of its group, its carrier, and is scored by the process that has that row.

Suffixes: N prompts of all processes, K = G + 1 sequences of each, 3 terms of the objective, 2 for
a row's sample and its attached reference; P processes, at most C carriers in each, R of which have
a reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import compress
from math import isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grao_fast.data.columns import REFERENCE_COLUMNS
from grao_fast.data.fields import Messages, read_prompt, read_reference
from grao_fast.data.rows import without_padding
from grao_fast.integrations.trl.rewards import given_reward
from grao_fast.integrations.trl.turns import Tools, TurnEncoder
from grao_fast.system.errors import UserError
from grao_fast.system.visible import visible_errors


class References(NamedTuple):
    """The references of some rows. An absent one has `present` False and no token ids.

    learned: as in `turns.Turns`.
    completions: in the form in which TRL calls rewards.
    rewards: those that the dataset gives; NaN where the reward functions are to be called.
    """

    present: list[bool]
    prompts: list[Any]
    completions: list[Any]
    token_ids: list[list[int]]
    learned: list[list[int]]
    rewards: list[float]

    @property
    def to_score(self) -> list[bool]:
        """Which of them the reward functions score."""
        return [
            present and isnan(reward)
            for present, reward in zip(self.present, self.rewards, strict=True)
        ]


def reference_column(columns: Iterable[str]) -> str | None:
    """The first of `reference`, `completion` and `chosen` among a dataset's columns."""
    columns = set(columns)
    return next((name for name in REFERENCE_COLUMNS if name in columns), None)


def read_row(
    row: Mapping[str, Any], where: str
) -> tuple[str | Messages | None, str | Messages | None]:
    """A row's prompt and reference, None for what it lacks; UserError if they cannot be read.

    Only an environment makes up for a prompt.
    """
    row = without_padding(dict(row))
    column = reference_column(row)
    prompt = read_prompt(row["prompt"], f"{where}, `prompt`") if "prompt" in row else None
    value = None if column is None else row[column]
    reference = read_reference(value, f"{where}, `{column}`", prompt)
    if isinstance(reference, list):
        reference = [_with_arguments(turn, f"{where}, `{column}`") for turn in reference]
    return prompt, reference


def _with_arguments(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn whose calls have their arguments as dicts, as samples' have; JSON text is read."""
    calls = []
    for call in turn.get("tool_calls") or []:
        function = call.get("function") or call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function = {**function, "arguments": _from_json(arguments, where)}
            call = {**call, "function": function} if call.get("function") else function
        calls.append(call)
    return {**turn, "tool_calls": calls} if calls else turn


def _from_json(arguments: str, where: str) -> dict[str, Any]:
    read = None
    with suppress(json.JSONDecodeError):
        read = json.loads(arguments)
    if not isinstance(read, dict):
        raise UserError(
            f"{where}: `arguments` of a tool call must be a dict, or one as JSON text, "
            f"got {arguments!r}"
        )
    return read


@visible_errors()
def read_references(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[str | list],
    tools: Sequence[Tools],
    encoder: TurnEncoder,
) -> References:
    """Read and encode the references of rows.

    prompts: as the rows' samples had them; an environment may have added to the dataset's.
    tools: those of each prompt.
    """
    read = [read_row(row, "a row")[1] for row in rows]
    asked = [read_prompt(prompt, "a prompt") for prompt in prompts]
    turns = encoder.encode(asked, read, tools)
    present = [bool(each.token_ids) for each in turns]
    return References(
        present=present,
        prompts=list(prompts),
        completions=[each.completion for each in turns],
        token_ids=[each.token_ids for each in turns],
        learned=[each.learned for each in turns],
        rewards=[
            given_reward(row, "a row") if there else nan
            for row, there in zip(rows, present, strict=True)
        ],
    )


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
    given = [rows, references.prompts, references.completions, references.token_ids]
    present = [list(compress(column, references.to_score)) for column in given]
    fill = present if any(references.to_score) else samples
    return [[*one, *other[:1] * most][:most] for one, other in zip(present, fill, strict=True)]


def in_order(
    scored_PC: Tensor, rewards_PR: Tensor, B: int, G: int, given_PC: Tensor | None = None
) -> Tensor:
    """rewards_N of all groups' references, NaN where absent.

    Args:
        scored_PC: which carriers of each process have a reference that was scored, padded with
            False.
        rewards_PR: the rewards of these in order, followed by those of padding.
        given_PC: the rewards of the others; None: NaN.
    """
    rewards_PC = rewards_PR.new_full(scored_PC.shape, torch.nan) if given_PC is None else given_PC
    place_PC = (scored_PC.cumsum(1) - 1).clamp(min=0)
    if rewards_PR.shape[1]:
        rewards_PC = rewards_PR.gather(1, place_PC).where(scored_PC, rewards_PC)
    return torch.cat(
        [row[: len(carriers(process, B, G))] for process, row in enumerate(rewards_PC)]
    )


def ride(terms_3NK: Tensor, process: int, B: int) -> Tensor:
    """terms_B23 of a process's B rows: each row's sample and attached reference, 0 without one.

    terms_3NK: coefficients of all processes' sequences in the objective, the references last.
    """
    G = terms_3NK.shape[2] - 1
    own_B = torch.arange(B) + process * B  # indices of the rows among those of all processes
    riding = list(carriers(process, B, G))
    terms_B23 = terms_3NK.new_zeros(B, 2, 3)
    terms_B23[:, 0] = terms_3NK[:, :, :-1].flatten(1)[:, own_B].T
    terms_B23[riding, 1] = terms_3NK[:, own_B[riding] // G, -1].T
    return terms_B23


def attach(values: Sequence[Sequence[int]], riding: Iterable[int], B: int) -> list[Tensor]:
    """Values of references' tokens, at the rows that carry them; empty at the other rows."""
    values_B = [torch.zeros(0, dtype=torch.int64) for _ in range(B)]
    for b, one in zip(riding, values, strict=True):
        values_B[b] = torch.tensor(one, dtype=torch.int64)
    return values_B
