"""Tests of digests: equal for equal content, in every process, and different otherwise."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
from collections import OrderedDict, UserDict, deque

import numpy as np
import pytest
import torch

from grao_fast.system.digests import digest_rows, digest_tensors

NAN = float("nan")


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Point:
    x: float
    cache: object = dataclasses.field(default=None, compare=False)


class Opaque:
    pass


def picture(shade: int):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    return image.new("L", (2, 2), shade)


SAME = {
    "keys in another order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "kinds of mappings": (OrderedDict(a=1), UserDict({"a": 1})),
    "sets in another order": (set("abcdefgh"), set("hgfedcba")),
    "a frozen set": ({1, "a"}, frozenset(["a", 1])),
    "a tuple, a list and a deque": ((1, [2]), deque([1, (2,)])),
    "NaN": ([NAN], [float("-nan")]),
    "NumPy's numbers": (
        [3, 0.5, True, "a"],
        [np.int64(3), np.float32(0.5), np.bool_(1), np.str_("a")],
    ),
    "arrays in other memory": (np.arange(6).reshape(2, 3).T.copy(), np.arange(6).reshape(2, 3).T),
    "arrays of objects": (np.array([{1, 2}, None]), np.array([{2, 1}, None])),
    "tensors": (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
    "objects": (Opaque(), Opaque()),
    "functions": (lambda: 1, lambda: 1),
    "data classes": (Point(1.0, object()), Point(1.0, object())),
    "lone surrogates": ("\ud800", "\ud800"),
    "generators": ((i for i in "a"), (i for i in "b")),
}

DIFFERENT = {
    "texts": ("a", "b"),
    "a text and a number": ("1", 1),
    "an integer and a truth": (1, True),
    "a text and bytes": ("a", b"a"),
    "nothing and its name": (None, "None"),
    "lists cut elsewhere": ([["a"], []], [["a", []]]),
    "texts cut elsewhere": (["ab", "c"], ["a", "bc"]),
    "a list and a set": ([1], {1}),
    "keys and values exchanged": ({"a": "b"}, {"b": "a"}),
    "a key that is None": ({"a": None}, {}),
    "order": ([1, 2], [2, 1]),
    "dates": (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
    "times": (datetime.datetime(2026, 1, 1), datetime.datetime(2026, 1, 1, 1)),
    "zones": (datetime.time(1), datetime.time(1, tzinfo=datetime.timezone.utc)),
    "a date and its text": (datetime.date(2026, 1, 1), "2026-01-01"),
    "decimals": (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
    "fractions": (fractions.Fraction(1, 3), fractions.Fraction(1, 4)),
    "UUIDs": (uuid.UUID(int=1), uuid.UUID(int=2)),
    "paths": (pathlib.Path("a"), pathlib.Path("b")),
    "members of an enumeration": (Colour.RED, Colour.BLUE),
    "arrays": (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "shapes": (np.zeros((2, 3)), np.zeros((3, 2))),
    "types of arrays": (np.zeros(2, np.float32), np.zeros(2, np.float64)),
    "tensors": (torch.tensor([1, 2]), torch.tensor([1, 3])),
    "data classes": (Point(1.0), Point(2.0)),
    "long numbers": (10**5000, 10**5000 + 1),
    "small differences": (0.1, 0.1 + 1e-17 + 2**-55),
    "infinities": (float("inf"), -float("inf")),
    "complex numbers": (1 + 2j, 2 + 1j),
    "nested": ({"a": [{"b": {1, 2}}]}, {"a": [{"b": {1, 3}}]}),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_the_same_content_has_the_same_digest(what: str):
    first, second = SAME[what]
    assert digest_rows([first]) == digest_rows([second])


@pytest.mark.parametrize("what", DIFFERENT)
def test_other_content_has_another_digest(what: str):
    first, second = DIFFERENT[what]
    assert digest_rows([first]) != digest_rows([second])


def test_images_are_compared_by_their_pixels():
    assert digest_rows([picture(3)]) == digest_rows([picture(3)])
    assert digest_rows([picture(3)]) != digest_rows([picture(4)])


def test_the_order_of_rows_matters():
    assert digest_rows(["a", "b"]) != digest_rows(["b", "a"])
    assert digest_rows(["a", "b"]) != digest_rows([["a", "b"]])


def test_data_that_contains_itself_has_a_digest():
    ring: list = [1]
    ring.append(ring)
    other: list = [1]
    other.append(other)
    assert digest_rows([ring]) == digest_rows([other])


def test_a_digest_is_the_same_in_every_process():
    """Hashes of texts, hence the order of sets, and addresses differ between processes."""
    row = {"s": set("abcdefghij"), "f": frozenset(map(str, range(9))), "o": object(), "c": int}
    assert digest_rows([row, {"b": 1, "a": NAN}]) == "4a25a61cf5c5de01"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]
)
def test_every_element_and_its_place_count(dtype: torch.dtype):
    size = (1 << 19) + 3  # more than one chunk
    tensor = torch.zeros(size, dtype=dtype)
    tensor[0] = 1
    digests = {digest_tensors({"a": tensor}), digest_tensors({"b": tensor})}
    for place in (1, (1 << 19) - 1, 1 << 19, size - 1):
        tensor.zero_()
        tensor[place] = 1
        digests.add(digest_tensors({"a": tensor}))
    assert len(digests) == 6
    assert digest_tensors({"a": tensor}) == digest_tensors({"a": tensor.clone()})


def test_weights_have_the_same_digest_in_16_and_in_32_bits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 65, generator=generator)
    near = weight.clone()
    near[3, 4] *= 1.01
    digest = digest_tensors({"a": weight})
    assert digest_tensors({"a": weight.bfloat16()}) == digest
    assert digest_tensors({"a": near}) != digest
    assert digest_tensors({"a": weight.reshape(65, 64)}) != digest
    square = weight[:, :64]
    assert digest_tensors({"a": square}) != digest_tensors({"a": square.T})
    both = {"a": square, "b": square.T}
    assert digest_tensors(both) == digest_tensors({k: t.clone() for k, t in both.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_exact_digest_depends_on_the_last_bit(dtype: torch.dtype):
    near = torch.ones(3, dtype=dtype)
    near[1] += torch.finfo(dtype).eps
    near = {"a": near}
    one = {"a": torch.ones(3, dtype=dtype)}
    assert digest_tensors(one, exact=True) != digest_tensors(near, exact=True)
    assert digest_tensors(one, exact=True) == digest_tensors({"a": one["a"].clone()}, exact=True)
    assert (digest_tensors(one) == digest_tensors(near)) == (dtype != torch.bfloat16)
    assert digest_tensors(one) == digest_tensors({"a": torch.ones(3)})
    of_32_bits = digest_tensors({"a": torch.ones(3)}, exact=True)
    assert (digest_tensors(one, exact=True) == of_32_bits) == (dtype == torch.float32)


def test_empty_and_complex_tensors_have_digests():
    assert digest_tensors({"a": torch.empty(0)}) == digest_tensors({"a": torch.empty(0)})
    assert digest_tensors({"a": torch.tensor([1j])}) != digest_tensors(
        {"a": torch.tensor([1.0 + 0j])}
    )
