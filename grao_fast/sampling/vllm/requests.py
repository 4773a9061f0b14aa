"""vLLM's request options for samples, and the check of its answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from grao_fast.sampling import Completion
from grao_fast.system.errors import UserError

LOGPROBS_MODE = "processed_logprobs"

# Errors that vLLM raises for devices, models or options that it does not support.
FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def sampling_options(
    *, num_generations: int, max_new_tokens: int, temperature: float, eos_ids: list[int]
) -> dict[str, Any]:
    """vLLM's parameters for samples of the unmodified distribution, up to an eos token.

    All are set, since vLLM takes missing ones from the model's generation_config.json.
    """
    return {
        "n": num_generations,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,  # of the sampled token only
        "stop_token_ids": eos_ids,
        "ignore_eos": True,  # stop_token_ids has all that end a completion
    }


def scoring_options() -> dict[str, Any]:
    """vLLM's parameters for the log-probs of a prompt's tokens, at temperature 1."""
    one = sampling_options(num_generations=1, max_new_tokens=1, temperature=1.0, eos_ids=[])
    return one | {"prompt_logprobs": 0}


def checked(
    token_ids: Sequence[int] | None,
    logprobs: Sequence[float | None] | None,
    *,
    eos_ids: Iterable[int],
    max_new_tokens: int,
) -> Completion:
    """The `Completion` that vLLM returned; UserError if it is not a valid one."""
    if not token_ids:
        raise UserError("vLLM returned no token ids; version 0.22 or later is needed")
    if logprobs is None or len(logprobs) != len(token_ids):
        had = "none" if logprobs is None else len(logprobs)
        raise UserError(f"vLLM returned {len(token_ids)} tokens with {had} log-probs")
    values = [math.nan if value is None else float(value) for value in logprobs]
    if not all(map(math.isfinite, values)):
        raise UserError(f"vLLM returned a log-prob that is not finite: {values}")
    finished = token_ids[-1] in eos_ids
    if not finished and len(token_ids) != max_new_tokens:
        raise UserError(
            f"vLLM cut a completion after {len(token_ids)} of {max_new_tokens} tokens: start it "
            "with --generation-config vllm, or lower max_new_tokens"
        )
    return Completion(token_ids=list(token_ids), logprobs=values, finished=finished)
