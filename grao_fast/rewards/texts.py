"""The texts that reward functions score, their names in errors, and the functions' arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grao_fast.config import RewardType
from grao_fast.data.examples import Example


@dataclass(frozen=True)
class GroupTexts:
    """What a group is scored by.

    name: of its prompt, for errors.
    offered: the arguments that functions can take, by name; lists of one item for each text.
    labels: names of the texts for errors.
    """

    name: str
    offered: Mapping[str, Any]
    labels: Sequence[str]


def group_texts(
    examples: Sequence[Example],
    columns: Sequence[str],
    reward_type: RewardType,
    place: int,
    completions: Sequence[str],
) -> GroupTexts | None:
    """What the group at a place of `examples` is scored by; None if it is not scored."""
    example = examples[place]
    texts = scored_texts(example, completions, reward_type)
    if not texts:
        return None
    count, name = len(texts), prompt_name(place, example)
    offered = arguments([example] * count, texts, [example.reference] * count, columns)
    return GroupTexts(name, offered, labels_of(name, count, len(completions)))


def arguments(
    examples: Sequence[Example],
    completions: Sequence[str],
    references: Sequence[str | None],
    columns: Sequence[str],
) -> dict[str, list[Any]]:
    """The arguments that functions can take, by name: lists of one item for each text."""

    def as_prompt(example: Example, text: str | None) -> Any:
        if text is None or isinstance(example.prompt, str):
            return text
        return [{"role": "assistant", "content": text}]

    return {
        "prompts": [example.prompt for example in examples],
        "completions": [as_prompt(*pair) for pair in zip(examples, completions, strict=True)],
        "references": [as_prompt(*pair) for pair in zip(examples, references, strict=True)],
        **{name: [example.columns.get(name) for example in examples] for name in columns},
    }


def scored_texts(
    example: Example, completions: Sequence[str], reward_type: RewardType
) -> list[str]:
    """The texts of a group that functions score; none for a pairwise one without a reference."""
    if example.reference is None:
        return [*completions] if reward_type == "pointwise" else []
    return [*completions, example.reference] if reward_type == "pointwise" else [*completions]


def labels_of(prompt: str, texts: int, samples: int) -> list[str]:
    """Names of the texts of a group for errors."""
    names = [f"completion {k} of {prompt}" for k in range(samples)]
    return [*names, f"the reference of {prompt}"][:texts]


def prompt_name(place: int, example: Example) -> str:
    """A prompt in errors: its place in the step, and its row in the dataset."""
    return f"prompt {place}" + ("" if example.row is None else f" (row {example.row})")


def column_names(examples: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(name for example in examples for name in example.columns))
