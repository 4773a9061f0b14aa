"""Records the allocations inside the operator of the pass, which outer dispatch modes miss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grao_fast.kernels.one_pass import ops
from grao_fast.kernels.one_pass.loop import one_pass


class Allocations(TorchDispatchMode):
    """Shapes and bytes of all tensors with memory of their own that the pass creates."""

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
        given = {each.untyped_storage()._cdata for each in _tensors((args, kwargs))}
        for each in _tensors(result):
            if each.untyped_storage()._cdata not in given:
                self.shapes.add(each.shape)
                self.bytes.append(each.untyped_storage().nbytes())
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
