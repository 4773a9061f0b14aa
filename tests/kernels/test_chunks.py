"""Chunks of rows: what they cost, and that nothing depends on them but time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from grao_fast.kernels.one_pass.chunks import padded, plan_chunks


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    L=st.integers(0, 100_000),
    V=st.integers(1, 300_000),
    D=st.integers(1, 20_000),
    itemsize=st.sampled_from([None, 2]),
    workspace_mib=st.floats(0.001, 8192),
)
def test_chunks_fit_the_workspace(L, V, D, itemsize, workspace_mib) -> None:
    stride, budget = padded(V), int(workspace_mib * 2**20)
    rows, slab_rows = plan_chunks(L, stride, D, itemsize, budget)
    assert 1 <= slab_rows <= rows <= max(1, L)
    cost = 4 * stride * slab_rows + (16 * D + (itemsize or 0) * stride) * rows
    assert cost <= budget or rows == 1
    if itemsize is None:
        assert slab_rows == rows


def test_a_large_head_gets_long_chunks() -> None:
    """V=151936, D=4096, 8192 rows: most of the room goes to rows of gradients."""
    planned = [plan_chunks(8192, padded(151936), 4096, 2, mib * 2**20) for mib in (512, 1024, 2048)]
    assert planned == [(683, 384), (2048, 512), (4096, 512)]


def test_small_problems_are_one_chunk() -> None:
    assert plan_chunks(300, padded(32001), 512, 2, 512 * 2**20) == (300, 300)
    assert plan_chunks(300, padded(32001), 512, None, 512 * 2**20) == (300, 300)
