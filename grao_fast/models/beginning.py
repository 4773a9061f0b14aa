"""The policy that training began with: a copy of what is trained, put back for a forward pass.

What is frozen stays as it is, so that the copy is all it takes, whatever an adapter's first weights
are and whatever is trained beside it: biases, embeddings, saved modules, layers unfrozen by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from grao_fast.system.interruption import as_outside, held

_FILE = "beginning.safetensors"


class Beginning:
    """The values that a model's trainable parameters had when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = trainable(model)
        self._values = {name: p.detach().clone() for name, p in self._parameters.items()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The values of then inside, those of now after it; nothing is copied."""
        with held():  # or a checkpoint could be written of weights that are half exchanged
            try:
                self._exchange()
                with as_outside():
                    yield
            finally:
                self._exchange()

    def save(self, folder: Path) -> None:
        """Write the values into a checkpoint."""
        save_file({name: t.cpu().contiguous() for name, t in self._values.items()}, folder / _FILE)

    def load(self, folder: Path) -> bool:
        """Take the values that `save` wrote, of the same parameters; False where it did not."""
        file = folder / _FILE
        if not file.is_file():
            return False
        saved = load_file(file)
        assert saved.keys() == self._values.keys(), "what is trained has been compared before"
        for name, value in self._values.items():
            value.copy_(saved[name])
        return True

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._values[name] = self._values[name], parameter.data
        torch.clear_autocast_cache()  # of a context around this, which knows parameters by address


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
