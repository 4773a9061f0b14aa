"""Weights that DeepSpeed's ZeRO-3 has split over the processes before a trainer wraps the model.

Transformers splits them while it loads a model. The hooks that gather them in each module's forward
pass come only with the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split some of the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Gather each module's own weights for the time of its forward pass, inside the block.

    Every process must run the same passes, since each gathering waits for all of them.
    """
    import deepspeed

    entered: list[Any] = []

    def gather(module: nn.Module, _: Any) -> None:
        weights = deepspeed.zero.GatheredParameters(list(module.parameters(recurse=False)))
        entered.append(weights)
        weights.__enter__()

    def release(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.enter_context(module.register_forward_pre_hook(gather))
                hooks.enter_context(module.register_forward_hook(release, always_call=True))
        yield
