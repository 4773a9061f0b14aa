"""Plans how many rows are processed at once in a given workspace.

There are two numbers where the logits (float32) and their gradient (16 bits) lie apart. The
gradient's GEMMs want many rows: each reads and writes the float32 sum of the whole head's gradient,
8 V D bytes against 2 R D V operations; on an H100 (3 TB/s, 700 TFLOP/s) that traffic takes as long
as the operations at R = 930. The logits' GEMM needs only `SLAB_ROWS`: reading the head, 2 V D
bytes, takes under half of the time that multiplying 512 rows does. So a small slab of logits is
reused, and the workspace goes into rows of gradients, at half the bytes.

Shapes: L rows, V vocabulary, D width.
"""

from __future__ import annotations

from typing import NamedTuple

# Rows of a slab start at multiples of 64 elements, 128 bytes or more, and the bias is padded too.
# They can then be read and written 16 bytes at a time whatever V is.
_ROW_ALIGNMENT = 64
SLAB_ROWS = 512
_TILE = 128  # rows of a GEMM's tile


class Chunks(NamedTuple):
    rows: int  # of the gradient, carried to hidden and head together
    slab_rows: int  # of the logits, at most `rows`


def padded(V: int) -> int:
    """Elements from one row of a slab to the next."""
    return -(-V // _ROW_ALIGNMENT) * _ROW_ALIGNMENT


def plan_chunks(L: int, stride: int, D: int, itemsize: int | None, workspace_bytes: int) -> Chunks:
    """Chunks of about equal size that fit the workspace; at least one row.

    itemsize: bytes of an element of the logits' gradient if that lies apart, else None. A row also
    costs up to 16 D bytes: copies of hidden, dhidden and the target's row of the head, and a
    product with the target's gradient.
    """
    if itemsize is None:
        rows = _even(L, workspace_bytes // (4 * stride + 16 * D))
        return Chunks(rows, rows)
    gradient_bytes = itemsize * stride + 16 * D
    together = _even(L, workspace_bytes // (4 * stride + gradient_bytes))
    slab_rows = min(SLAB_ROWS, max(1, L), max(1, workspace_bytes // (8 * stride)))
    if slab_rows >= together:
        return Chunks(together, together)
    rows = _even(L, (workspace_bytes - 4 * stride * slab_rows) // gradient_bytes)
    return Chunks(rows, _even(rows, slab_rows))


def _even(L: int, fits: int) -> int:
    """Rows of a chunk if `fits` fit: an equal share of L, rounded up to whole tiles if possible."""
    fits = max(1, fits)
    chunks = max(1, -(-L // fits))
    rows = max(1, -(-L // chunks))
    tiled = -(-rows // _TILE) * _TILE
    return min(tiled, max(1, L)) if tiled <= fits else rows
