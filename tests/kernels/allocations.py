"""What the pass does inside its operator, where a dispatch mode outside of it sees nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grao_fast.kernels import ops
from grao_fast.kernels.one_pass import one_pass


class Allocations(TorchDispatchMode):
    """Shapes and bytes of the tensors that the pass allocates, inside its operator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(ops, "one_pass", self.watched)
        self.shapes: set[torch.Size] = set()
        self.bytes: list[int] = []

    def watched(self, *arguments, **options):
        with self:
            return one_pass(*arguments, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (isinstance(result, Tensor) and "empty" in str(function)) or "zeros" in str(function):
            self.shapes.add(result.shape)
            self.bytes.append(result.untyped_storage().nbytes())
        return result
