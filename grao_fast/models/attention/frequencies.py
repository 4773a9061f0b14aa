"""Rotary frequencies that depend on the longest position of a batch, fixed for a whole run.

LongRoPE changes its factors, and dynamic NTK its base, once a batch exceeds the context that the
model was first trained on. A sequence's gradient would then depend on the sequences beside it, and
the sampler's log-probs would differ from the policy's.

Every call of such a layer is therefore given one more position, the last of the longest context of
the run, whose output is dropped. The layer's own code then chooses the same frequencies for all
batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grao_fast.config import SamplingOptions
from grao_fast.data.prompts import lengths_of
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from grao_fast.data.encoding import Encoded

logger = get_logger(__name__)

_FOLLOWING = ("longrope", "dynamic")  # in the names of rope types
# Restores each model.
_held: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


def hold_frequencies(model: nn.Module, tokens: int | None) -> None:
    """Fix the frequencies to those of a context of `tokens` until `release_frequencies`.

    A model whose frequencies are fixed is left unchanged. A later call replaces an earlier one.
    """
    release_frequencies(model)
    layers = [module for module in model.modules() if _rope_types(module)]
    if not layers or tokens is None:
        return
    _held[model] = ExitStack()
    for layer in layers:
        _hold(layer, tokens - 1, _held[model])
    logger.info(
        "%s uses rotary frequencies (%s) of a context of %d tokens in every batch",
        type(model).__name__,
        ", ".join(sorted({kind for layer in layers for kind in _rope_types(layer)})),
        tokens,
    )


def hold_frequencies_of(
    model: nn.Module,
    prompts: Sequence[Encoded],
    held_out: Sequence[Encoded],
    sampling: SamplingOptions,
) -> None:
    """`hold_frequencies` of the longest context of a run, or of an evaluation without prompts.

    It is the longest prompt with its completion, sampled or stored, or with its reference; of those
    held out, with its completion. If the model depends on it, all prompts are encoded once to find
    it.
    """
    release_frequencies(model)
    if not any(_rope_types(module) for module in model.modules()):
        return
    trained, asked = lengths_of(prompts, exact=True), lengths_of(held_out)
    new = sampling.max_new_tokens
    completion = new if sampling.samples_drawn else trained.completion
    answer = asked.prompt + new if held_out else 0
    hold_frequencies(model, max(trained.prompt + completion, trained.together, answer))


def release_frequencies(model: nn.Module) -> None:
    """Restore frequencies that depend on the batch."""
    if model in _held:
        _held.pop(model).close()


def _rope_types(module: nn.Module) -> list[str]:
    """The rope types of a rotary layer that depend on the batch."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return [k for k in kinds if isinstance(k, str) and any(name in k for name in _FOLLOWING)]


def _hold(layer: nn.Module, last: int, until: ExitStack) -> None:
    """Give a layer the position `last` in every call, until `until` is closed."""

    def with_the_last(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": _append(kwargs["position_ids"], last)}
        x, position_ids, *rest = args
        return (x, _append(position_ids, last), *rest), kwargs

    def without_the_last(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output[..., :-1, :]
        return tuple(part[..., :-1, :] for part in output)

    # Transformers 5.0 keeps the frequencies of the longest batch for later ones.
    buffers = [(name, buffer.clone()) for name, buffer in layer.named_buffers(recurse=False)]
    until.callback(_put_back, layer, buffers, getattr(layer, "max_seq_len_cached", None))
    until.callback(layer.register_forward_pre_hook(with_the_last, with_kwargs=True).remove)
    until.callback(layer.register_forward_hook(without_the_last, with_kwargs=True).remove)


def _put_back(layer: Any, buffers: list[tuple[str, Tensor]], longest: Any) -> None:
    for name, buffer in buffers:
        setattr(layer, name, buffer.to(getattr(layer, name).device))
    if longest is not None:
        layer.max_seq_len_cached = longest


def _append(position_ids: Tensor, last: int) -> Tensor:
    """Append one position, giving (..., L + 1)."""
    return torch.cat([position_ids, torch.full_like(position_ids[..., :1], last)], dim=-1)
