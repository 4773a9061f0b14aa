"""Sampling: the `Sampler` protocol and what it returns.

`transformers` and `generate` sample from a model of this process, `choose` picks one of them, and
`vllm` samples from a server or an engine. `seeds` gives every prompt a seed. `proof` and
`held_weights` compare a sampler's log-probs with the policy's. `loading` loads a policy together
with its sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from grao_fast.models.policy import Policy


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    token_ids: the sampled tokens, the end-of-sequence token included when there is one.
    logprobs: log pi(token) at the sampling temperature, one for each token; greedy completions
        carry theirs at temperature 1.
    finished: True when it ended with an end-of-sequence token, False when it was cut.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


# on_group(place, completions): of the prompt at a place of the list that is sampled.
OnGroup = Callable[[int, list[Completion]], None]


class Sampler(Protocol):
    """Samples groups of completions, each prompt's from a seed of its own.

    context_length: most tokens of a prompt and its completion; None: the model's own limit.
    """

    context_length: int | None

    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights. Every process must call it.

        It is called before anything is sampled with weights that an update, or a checkpoint, has
        changed: after every update where training samples, else before evaluations and answers.
        """
        ...

    def sample(
        self,
        prompts: list[list[int]],
        *,
        num_generations: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int],
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` completions of every prompt; temperature 0 decodes greedily.

        A sampler calls `on_group` for a prompt as soon as its completions are whole, in any order
        but in the thread that called `sample`. It may leave prompts out, which are then taken from
        what it returns. An error of `on_group` ends the sampling.

        What is drawn for a prompt depends on its own seed, and not on the other prompts, their
        order or how they are batched: a rollout is the same however processes share its prompts.
        Logits, and so the odd token, can still differ by rounding.
        """
        ...


@runtime_checkable
class ConcurrentSampler(Sampler, Protocol):
    """A Sampler whose `sample` may be called in other threads, as its weights are its own."""

    def recover(self) -> None:
        """Take over the last weights again if they were lost.

        Every process must call it, before they sample together.
        """
        ...

    def abort(self) -> None:
        """Make the calls of `sample` that are in flight raise soon; their samples are lost."""
        ...
