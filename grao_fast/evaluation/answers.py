"""The texts that are evaluated: a greedy answer to every prompt and, on request, samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grao_fast.config import SamplingOptions
from grao_fast.data.encoding import Encoded
from grao_fast.sampling.loaded import LoadedPolicy


class Answers(NamedTuple):
    """A policy's completions of N prompts.

    greedy: one for each prompt.
    samples: `num_generations_eval` for each prompt, at the sampling temperature; None: none.
    """

    greedy: list[str]
    samples: list[list[str]] | None = None


def answers_of(
    loaded: LoadedPolicy, prompts: Sequence[Encoded], sampling: SamplingOptions, *, seed: int
) -> Answers:
    """The answers of a policy as it is now. Every process must call it.

    Each prompt has a seed of its own, which is the same in every evaluation of a run and for any
    number of processes.
    """
    ids = [prompt.prompt_ids for prompt in prompts]
    greedy = loaded.answer(ids, max_new_tokens=sampling.max_new_tokens, seed=seed)
    if sampling.num_generations_eval is None:
        return Answers(greedy)
    samples = loaded.complete(
        ids,
        num_generations=sampling.num_generations_eval,
        temperature=sampling.temperature,
        max_new_tokens=sampling.max_new_tokens,
        seed=seed,
    )
    return Answers(greedy, samples)
