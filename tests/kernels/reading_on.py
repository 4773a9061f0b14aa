"""Matrix products that read past the end of an operand's rows, as oneDNN's for AMX do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grao_fast.kernels.one_pass import logprob_ops, ops
from grao_fast.kernels.one_pass.loop import one_pass

_TILE = 32  # columns; values read past a row are multiplied by 0
_PLACES = {torch.ops.aten.mm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.addmm_: 1}


class ReadingOn(TorchDispatchMode):
    """Makes every product of the pass read all rows but the last up to a multiple of a tile.

    oneDNN does so with the left operand in bfloat16. Here it is done in any dtype, and to both
    operands along the summed dimension if that is contiguous, as a library might swap them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for module in (ops, logprob_ops):
            monkeypatch.setattr(module, "one_pass", self.watched)
        self.products = 0

    def watched(self, *arguments, **options):
        with self:
            return one_pass(*arguments, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet in _PLACES:
            self.products += 1
            place = _PLACES[packet]
            args = (*args[:place], *_read_on(*args[place : place + 2]), *args[place + 2 :])
        else:
            name = str(packet)
            assert not any(each in name for each in ("mm", "mv", "dot", "linear")), name
        return function(*args, **(kwargs or {}))


def _read_on(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    K = a.shape[1]
    more = -K % (_TILE if K > _TILE else 2)
    a_behind, b_behind = _behind(a, more), _behind(b.T, more)
    if a_behind is not None:
        a, b = torch.cat([a, a_behind], 1), torch.cat([b, b.new_zeros(more, b.shape[1])])
    if b_behind is not None:
        a, b = torch.cat([a, a.new_zeros(len(a), more)], 1), torch.cat([b, b_behind.T])
    return a, b


def _behind(rows: Tensor, more: int) -> Tensor | None:
    """The memory behind each row but the last; None where rows are not contiguous."""
    if rows.stride(1) != 1 or len(rows) < 2 or more == 0:
        return None
    start = rows.storage_offset() + rows.shape[1]
    behind = rows.new_zeros(len(rows), more)
    behind[:-1] = rows.as_strided((len(rows) - 1, more), rows.stride(), start)
    return behind
