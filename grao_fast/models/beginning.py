"""The policy that training began with: a copy of the trained parameters, swapped in on demand.

Frozen parameters do not change, so the copy suffices for any adapter and for whatever is trained
beside it: biases, embeddings, saved modules, layers unfrozen by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from grao_fast.models.sharding import fill, whole
from grao_fast.system.interruption import as_outside, held

_FILE = "beginning.safetensors"


class Beginning:
    """The values of a model's trainable parameters when this object was created."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = trainable(model)
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Swap the first values in for the block."""
        with held():  # a signal could otherwise save half-exchanged weights
            try:
                self._exchange()
                with as_outside():
                    yield
            finally:
                self._exchange()

    def hold(self) -> Callable[[Path], None]:
        """Gather an adapter's values, which do not change; every process must call it.

        Returns save(folder), which writes them into a checkpoint.
        """
        values = {name: whole(t).cpu().contiguous() for name, t in self._values.items()}
        return lambda folder: save_file(values, folder / _FILE)

    def load(self, folder: Path) -> bool:
        """Load the values that `save` wrote; returns False if the folder has none."""
        file = folder / _FILE
        if not file.is_file():
            return False
        saved = load_file(file)
        assert saved.keys() == self._values.keys(), "what is trained has been compared before"
        for name, value in self._values.items():
            fill(value, saved[name])
        return True

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            if isinstance(parameter, DTensor):  # FSDP keeps a view of the shard's memory
                shard, value = parameter.to_local(), self._values[name].to_local()
                kept = shard.clone()
                shard.copy_(value)
                value.copy_(kept)
            else:
                parameter.data, self._values[name] = self._values[name], parameter.data
        torch.clear_autocast_cache()  # an enclosing autocast caches casts by parameter


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
