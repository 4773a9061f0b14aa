"""Memory outside of a matrix, in a slab's padding or around a view, affects no result.

A run whose surroundings hold NaN, or the largest number, must agree to the bit with one where they
hold 0. Products on a CPU with AMX read past the end of a row; `ReadingOn` makes them do so on every
CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import OneProcess, backward, row_functions
from reading_on import ReadingOn
from torch import Tensor

from grao_fast.kernels import VocabParallel
from grao_fast.kernels.checks import logit_constants
from grao_fast.kernels.one_pass import gemm
from grao_fast.kernels.one_pass import loop as one_pass
from grao_fast.kernels.one_pass.chunks import padded
from grao_fast.kernels.rows.contract import RowInputs, RowOutputs
from grao_fast.kernels.rows.sharded import sharded_policy_rows
from grao_fast.kernels.vocab_parallel import Shard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Rows, width and vocabulary: odd, and 1, 2 and 3 beyond a multiple of 16.
SHAPES = [(1, 7, 33), (2, 17, 7), (17, 33, 50), (31, 18, 97), (40, 51, 113), (33, 64, 64)]
LONG = [(300, 19, 131), (257, 50, 65), (128, 5, 1009)]
FEW = [(2, 17, 50), (2, 33, 97)]  # few enough for Triton's interpreter
LAYOUTS: dict[str, dict[str, Any]] = {
    "gaps": {},
    "transposed": {"transposed": True},
    "rows_of_more": {"gaps": False},
}
FUNCTIONS = ("grao", "weighted", "logprobs")
POISONS = ("nan", "huge")


class Surroundings:
    """Fills new memory, and the surroundings of views, with `poison`."""

    def __init__(self, dtype: torch.dtype, poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.value = {"nan": math.nan, "huge": torch.finfo(dtype).max, "zero": 0.0}[poison]
        self.views: list[tuple[Tensor, tuple[slice, slice]]] = []
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, self.filled(getattr(owner, name)))

    def filled(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            new = make(*args, **kwargs)
            return new.fill_(self.value) if new.is_floating_point() else new

        return made

    def view(self, tensor: Tensor, *, transposed: bool = False, gaps: bool = True) -> Tensor:
        """A view equal to `tensor`, with rows around it and, if `gaps`, columns."""
        if transposed:
            return self.view(tensor.T, gaps=gaps).T
        rows, columns = tensor.shape
        whole = tensor.new_full((rows + 3, columns + 35 * gaps), self.value)
        place = slice(2, 2 + rows), slice(3 * gaps, 3 * gaps + columns)
        whole[place] = tensor
        self.views.append((whole, place))
        return whole[place]

    def every_third(self, vector: Tensor) -> Tensor:
        """`vector` as a column of a matrix, whose other columns hold another index for an index."""
        other = self.value if vector.is_floating_point() else int(self.value != 0)
        whole = vector.new_full((len(vector), 3), other)
        whole[:, 1] = vector
        return whole[:, 1]

    def assert_untouched(self) -> None:
        for whole, place in self.views:
            expected = torch.full_like(whole, self.value)
            expected[place] = whole[place]
            assert_same(whole, expected, "around a view")


def outputs(
    function: str,
    shape: tuple[int, int, int],
    layout: str,
    dtype: torch.dtype,
    surroundings: Surroundings,
    backend: str,
    device: str,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs of one of the public functions, and the gradients of its operands."""
    T, D, V = shape
    generator = torch.Generator().manual_seed(T)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    operands = {
        "hidden_TD": surroundings.view(randn(T, D) / D**0.5, **LAYOUTS[layout]),
        "head_VD": surroundings.view(randn(V, D), **LAYOUTS[layout]),
        "bias_V": surroundings.every_third(randn(1, V)[0]),
    }
    sequence_T, weight_T = torch.arange(T) % 6, torch.linspace(1, 2, T)
    if layout == "gaps" and T > 2:  # a dead row, so that the others are gathered
        sequence_T[T // 2], weight_T[T // 2] = -1, 0.0
    target_T = torch.randint(0, V, (T,), generator=generator)
    rows = T if T < 100 else T // 3  # of a chunk
    case = {
        "function": function,
        "target_T": surroundings.every_third(target_T.to(device)),
        "sequence_T": surroundings.every_third(sequence_T),
        "rewards_NK": surroundings.view(torch.tensor([[0.0, 1.0, 3.0], [2.0, 5.0, 4.0]])),
        "weight_T": surroundings.every_third(weight_T),
        "options": {
            "workspace_mib": rows * (6 * padded(V) + 16 * D) / 2**20,
            "backend": backend,
            **options,
        },
    }
    return backward(case, {name: x.detach().requires_grad_() for name, x in operands.items()})


def assert_same(one: Tensor, two: Tensor, *what: object) -> None:
    assert torch.equal(one.isnan(), two.isnan()), what
    assert torch.equal(one.nan_to_num(7), two.nan_to_num(7)), what


def assert_nothing_else_is_read(
    shapes: list[tuple[int, int, int]], dtype: torch.dtype, backend: str, device: str
) -> None:
    """Results agree to the bit whatever the surroundings hold; the functions take turns."""
    for turn, (shape, layout) in enumerate(product(shapes, LAYOUTS)):
        function = FUNCTIONS[(turn + turn // len(LAYOUTS)) % len(FUNCTIONS)]
        results = []
        for poison in ("zero", *POISONS):
            with pytest.MonkeyPatch.context() as patch:
                surroundings = Surroundings(dtype, poison, patch)
                results.append(
                    outputs(function, shape, layout, dtype, surroundings, backend, device)
                )
                surroundings.assert_untouched()
        clean, *poisoned = results
        assert clean["dhead_VD"].any() and clean["dhidden_TD"].isfinite().all()
        for result, poison in zip(poisoned, POISONS, strict=True):
            for name, value in clean.items():
                assert_same(result[name], value, function, shape, layout, poison, name)


@pytest.fixture(params=["as_they_are", "reading_on"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CPU's own matrix products, or ones that read past the end of rows."""
    if request.param == "reading_on":
        ReadingOn(monkeypatch)
        monkeypatch.setattr(gemm, "cpu_has_bfloat16", lambda: True)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_else_is_read(dtype: torch.dtype, products: str, backend: str, device: str) -> None:
    as_they_are = products == "as_they_are"
    shapes = SHAPES + (LONG if as_they_are else LONG[:1])
    if backend == "triton" and device == "cpu":
        shapes = FEW[:1] if as_they_are else FEW
    assert_nothing_else_is_read(shapes, dtype, backend, device)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_padding_that_is_left_as_it_was_found_is_seen(dtype, monkeypatch) -> None:
    """The test above fails on any CPU if a slab's padding is left uninitialised."""
    slab = one_pass._slab

    def as_found(rows: int, V: int, dtype: torch.dtype, device: torch.device):
        return torch.empty_like(slab(rows, V, dtype, device))

    monkeypatch.setattr(one_pass, "_slab", as_found)
    seen = ReadingOn(monkeypatch)
    with pytest.raises(AssertionError, match=r"dhidden_TD"):
        assert_nothing_else_is_read(FEW, dtype, "torch", "cpu")
    assert seen.products > 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_else_is_written(dtype, products, backend, device) -> None:
    """A buffer for the head's gradient may be some rows of a larger one."""
    results = []
    for poison in ("zero", *POISONS):
        with pytest.MonkeyPatch.context() as patch:
            surroundings = Surroundings(dtype, poison, patch)
            buffer = surroundings.view(torch.ones(97, 33, device=device, dtype=dtype), gaps=False)
            options = {"head_grad_VD": buffer}
            result = outputs(
                "weighted", (2, 33, 97), "gaps", dtype, surroundings, backend, device, **options
            )
            surroundings.assert_untouched()
        assert "dhead_VD" not in result and (buffer != 1).any()
        results.append(result["dhidden_TD"])
        results.append(buffer)
    for one, two in zip(results[2:], results[:2] * len(POISONS), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_of_a_part_of_a_vocabulary_nothing_else_is_read(dtype, backend, device, monkeypatch):
    """As the first of two processes that share a head."""
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 2, group_name="two")
    monkeypatch.setattr(Shard, "group", group)
    for name in ("sum_", "max_"):
        monkeypatch.setattr(Shard, name, lambda shard, tensor: tensor)
    ReadingOn(monkeypatch)
    results = []
    for poison in ("zero", *POISONS):
        with pytest.MonkeyPatch.context() as patch:
            surroundings = Surroundings(dtype, poison, patch)
            options = {"vocab_parallel": VocabParallel(group, 194)}
            results.append(
                outputs(
                    "logprobs", (2, 17, 97), "gaps", dtype, surroundings, backend, device, **options
                )
            )
    for result in results[1:]:
        for name, value in results[0].items():
            assert_same(result[name], value, name)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("V", [7, 50, 8200], ids=["tiny", "one_block", "three_blocks"])
def test_row_functions_keep_zeros_behind_a_row(V, in_place, backend, device) -> None:
    """Whatever the padding of the bias holds and, if gradients lie apart, that of the logits."""
    rows = row_functions(backend)
    x_RV = torch.linspace(-3, 3, 2 * V, device=device).view(2, V)
    target_R = torch.tensor([1, 5], device=device)
    weight_R = torch.tensor([2.0, 0.0], device=device)
    halves = sharded_policy_rows(OneProcess("", V), rows.row_statistics, rows.row_gradient)
    for function in (rows.policy_rows, halves):
        results = []
        for poison in (0.0, math.nan, -torch.finfo(torch.float32).max):
            bias_S = torch.full((padded(V),), poison, device=device)
            bias_S[:V] = 0.5
            logits_RS = bias_S.repeat(2, 1)
            if in_place:
                logits_RS[:, V:] = 0
            logits_RS[:, :V] = x_RV
            dlogits_RS = logits_RS if in_place else torch.zeros_like(logits_RS)
            written = torch.empty(2, 2, device=device).unbind()
            function(
                logits_RS[:, :V],
                dlogits_RS[:, :V],
                bias_S[:V],
                RowInputs(target_R, weight_R),
                RowOutputs(written[1], target_grad_R=written[0]),
                logit_constants(1.0, 1.0, None),
            )
            assert dlogits_RS[0, :V].any() and not dlogits_RS[:, V:].any()
            results.append((dlogits_RS, *written))
        for result in results[1:]:
            for one, two in zip(result, results[0], strict=True):
                assert_same(one, two)
