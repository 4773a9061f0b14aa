"""The bytes of benchmarks/attention_bytes.py are those that operators move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_bytes import Shape, attention_flops, bytes_of, row_of, table
from packed_attention import SEGMENTS, seen_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grao_fast.models.attention import varlen

PAGE = Path(__file__).parents[1] / "docs/memory-and-speed.md"
SHAPE = Shape(heads=6, kv_heads=2, width=8, window=None, itemsize=4)


class Moved(TorchDispatchMode):
    """The bytes that operators read and write, of those that move any."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == "index_select":  # reads what it writes
            self.bytes += 2 * _size(result)
        elif name == "sum":
            self.bytes += _size(args[0]) + _size(result)
        else:  # these move nothing
            assert name in ("new_empty", "split_with_sizes", "view", "_unsafe_view", "select",
                            "detach", "split", "empty_like", "alias", "reshape"), name  # fmt: skip
        return result


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("window", [None, 33])
def test_the_gather_moves_what_is_counted(window: int | None) -> None:
    shape = Shape(6, 2, 8, window=window, itemsize=4)
    plan = varlen.plan_of(SEGMENTS, window, torch.device("cpu"))
    x_LJd = torch.zeros(SEGMENTS[-1].stop, 2, 8, requires_grad=True)
    grad = torch.ones(len(plan.place_K), 2, 8)
    with Moved() as moved:
        gathered = varlen.gather(x_LJd, plan)
        torch.autograd.grad(gathered, x_LJd, grad)
    found = bytes_of(SEGMENTS, shape)
    assert found.gather == 2 * moved.bytes  # of keys, and of values
    assert found.kept == 2 * _size(gathered)


def test_attention_moves_its_tensors() -> None:
    L, K = SEGMENTS[-1].stop, (150 + 290 + 157) + (3 + 4 + 133 + 67) + (1 + 3)
    q, k = (L * heads * 8 * 4 for heads in (6, 2))
    # Forward: q, k, v, out. Backward: these, the gradient of out, and those of q, k and v.
    assert bytes_of(SEGMENTS, SHAPE).attention == 6 * q + 6 * k
    copied = bytes_of(SEGMENTS, SHAPE).copied_keys
    assert copied == 6 * (K - L) * 2 * 8 * 4
    assert copied > bytes_of(SEGMENTS, Shape(6, 2, 8, window=5, itemsize=4)).copied_keys > 0


@pytest.mark.parametrize("window", [None, 33])
def test_flops_count_the_pairs_that_are_seen(window: int | None) -> None:
    shape = Shape(6, 2, 8, window=window)
    assert attention_flops(SEGMENTS, shape) == 14 * 8 * 6 * int(seen_pairs(window).sum())


def test_rows_are_of_whole_groups() -> None:
    first, second = row_of(2, 5, (3, 4))
    assert (first.stop, second.start, second.stop) == (12, 12, 24)


def test_the_document_has_the_table() -> None:
    assert table() in PAGE.read_text("utf-8")
