"""Counting the memory that operators hold, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grao_fast.models.policy import Policy


class HeldBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operators have allocated.

    peak: the most, without tensors of the shape of a trained parameter.
    gradients_peak: the most of those: gradients on their way to their parameters.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.trained = {p.shape for p in policy.model.parameters() if p.requires_grad}
        self.now = self.peak = self.gradients = self.gradients_peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.known.update(tensor.untyped_storage() for tensor in _tensors((args, kwargs)))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self.known:
                self.known.add(storage)
                add = self._add_gradient if tensor.shape in self.trained else self._add
                add(storage.nbytes())
                weakref.finalize(storage, add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _add_gradient(self, size: int) -> None:
        self.gradients += size
        self.gradients_peak = max(self.gradients_peak, self.gradients)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
