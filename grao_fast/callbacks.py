"""Defines callbacks, the hooks into a run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grao_fast.system.errors import UserError

if TYPE_CHECKING:  # a module of callbacks need not wait for torch and transformers
    from grao_fast.config import GRAOConfig
    from grao_fast.evaluation.result import EvaluationResult
    from grao_fast.sampling.loaded import LoadedPolicy


class Callback:
    """Base class of callbacks: override the hooks you need, and pass instances as `callbacks=`.

    With several processes, hooks are called in each of them, with the same arguments; a run ends if
    one process's `on_step_end` asks for it. What is to happen once belongs under
    `policy.policy.world.is_main`; `policy.answer` must be called in all.
    """

    def on_train_begin(self, policy: LoadedPolicy, config: GRAOConfig) -> None:
        """Called before the first step.

        policy: has `model`, `tokenizer` and `sampler`, and greedily completes prompts by `answer`,
            in this hook and later ones, with the weights that it has then. Call its `sync`, in all
            processes, before you sample from `sampler` directly.
        """

    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Called after every step, counted from 1; return True to end the run."""

    def on_evaluate(self, step: int, result: EvaluationResult) -> None:
        """Called after every evaluation."""

    def on_save(self, step: int, path: Path) -> None:
        """Called when a checkpoint is whole: with `async_save`, at the next save or the end."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise ValueError if a callback is a class, or lacks a hook that a run calls."""
    if not isinstance(callbacks, Sequence):
        raise UserError(f"callbacks must be a list of callbacks, got {callbacks!r}")
    for callback in callbacks:
        if isinstance(callback, type):
            name = callback.__name__
            raise UserError(f"callbacks holds the class {name}: pass an instance, {name}()")
        for hook in (name for name in vars(Callback) if name.startswith("on_")):
            _check_hook(callback, hook)


def _check_hook(callback: Callback, hook: str) -> None:
    base = "derive its class from grao_fast.callbacks.Callback"
    if not callable(getattr(callback, hook, None)):
        raise UserError(f"callback {callback!r} has no {hook}: {base}")
    taken = list(inspect.signature(getattr(Callback, hook)).parameters)[1:]
    try:
        inspect.signature(getattr(callback, hook)).bind(*taken)
    except TypeError as error:
        takes = f"{hook}({', '.join(taken)})"
        raise UserError(f"callback {callback!r} cannot be called as {takes}: {base}") from error
