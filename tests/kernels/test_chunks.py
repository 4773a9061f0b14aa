"""How many rows a chunk has."""

from __future__ import annotations

from grao_fast.kernels.one_pass.chunks import padded, plan_chunks


def test_a_large_head_gets_long_chunks() -> None:
    """With V=151936, D=4096 and 8192 rows, most of the workspace goes to rows of gradients."""
    planned = [plan_chunks(8192, padded(151936), 4096, 2, mib * 2**20) for mib in (512, 1024, 2048)]
    assert planned == [(683, 384), (2048, 512), (4096, 512)]


def test_small_problems_are_one_chunk() -> None:
    assert plan_chunks(300, padded(32001), 512, 2, 512 * 2**20) == (300, 300)
    assert plan_chunks(300, padded(32001), 512, None, 512 * 2**20) == (300, 300)
