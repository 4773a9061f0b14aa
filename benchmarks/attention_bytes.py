"""Bytes that attention over a shared prefix moves in a layer, on paper: no device runs.

    python benchmarks/attention_bytes.py      # the table of docs/memory-and-speed.md

Counted are reads and writes of whole tensors, forward and backward; what a kernel reads again, such
as keys for each of its tiles of queries, is left to the cache.

Shapes: H query heads, J key/value heads, L packed tokens, K gathered tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grao_fast.data.packing import Segment
from grao_fast.models.attention import flex, varlen
from grao_fast.training.flops import group_work


@dataclass(frozen=True)
class Shape:
    """Attention of one layer: heads, and the window of its queries.

    itemsize: bytes of a number.
    """

    heads: int
    kv_heads: int
    width: int
    window: int | None = None
    itemsize: int = 2


@dataclass(frozen=True)
class Bytes:
    """What one layer moves for a packed row, forward and backward.

    attention: queries, keys, values and outputs, where keys are not copied.
    mask: the vectors and tables of FlexAttention's mask.
    copied_keys: what a kernel moves more since keys and values are copied.
    gather: what copying them moves, and summing their gradients.
    kept: gathered keys and values, in memory until the backward pass.
    """

    attention: int
    mask: int
    copied_keys: int
    gather: int
    kept: int

    @property
    def flex(self) -> int:
        return self.attention + self.mask

    @property
    def varlen(self) -> int:
        return self.attention + self.copied_keys + self.gather


def bytes_of(segments: tuple[Segment, ...], shape: Shape) -> Bytes:
    """Return the bytes of a layer of `shape` over a packed row."""
    L = segments[-1].stop
    plan = varlen.plan_of(segments, shape.window, torch.device("cpu"))
    K = len(plan.place_K)
    query_row = shape.heads * shape.width  # numbers of a token's queries
    key_row = shape.kv_heads * shape.width  # of its keys, and of its values
    # Forward reads queries, keys and values, and writes outputs; backward reads all four and the
    # outputs' gradients, and writes the gradients of the first three.
    attention = 6 * shape.itemsize * (query_row + key_row) * L
    blocks = -(-L // flex.BLOCK)
    # Four int64 vectors, read by the forward kernel and by two backward ones; two int32 tables of
    # blocks read forward and four backward, with the counts of their rows.
    mask = 3 * 4 * 8 * L + 6 * 4 * blocks * (blocks + 1)
    return Bytes(
        attention=attention,
        mask=mask,
        copied_keys=6 * shape.itemsize * key_row * (K - L),
        gather=2 * key_row * shape.itemsize * gathered_numbers(plan),
        kept=2 * key_row * shape.itemsize * K,
    )


def gathered_numbers(plan: varlen.Plan) -> int:
    """Return the numbers that `varlen.gather` reads and writes for one of a token's keys."""
    L, K = len(plan.turn_L), len(plan.place_K)
    forward = 2 * K
    backward = 2 * L  # the selection in the order of tokens
    for places in plan.copies:
        backward += 2 * places.numel()  # selected
        if places.shape[1] > 1:
            backward += places.numel() + len(places)  # summed
    return forward + backward


def attention_flops(segments: tuple[Segment, ...], shape: Shape) -> int:
    """Return the FLOPs of a layer's attention: 14 d a pair and query head, backward included."""
    pairs = sum(
        group_work(s.prefix_length, s.suffix_lengths, [shape.window], share_prefix=True).pairs[
            shape.window
        ]
        for s in segments
    )
    return 14 * shape.width * shape.heads * pairs


def row_of(groups: int, prompt: int, responses: tuple[int, ...]) -> tuple[Segment, ...]:
    """Return the segments of equal groups in one packed row."""
    tokens = prompt + sum(responses)
    return tuple(Segment(n * tokens, prompt, responses) for n in range(groups))


# Of 4 groups with 8 samples and a reference each.
WIDE = Shape(heads=32, kv_heads=8, width=128)
CASES = {
    "prompt 128, responses 1024": (row_of(4, 128, (1024,) * 9), WIDE),
    "prompt 512, responses 512": (row_of(4, 512, (512,) * 9), WIDE),
    "the same, H=16": (row_of(4, 512, (512,) * 9), Shape(16, 8, 128)),
    "the same, J=32": (row_of(4, 512, (512,) * 9), Shape(32, 32, 128)),
    "prompt 4096, responses 256": (row_of(4, 4096, (256,) * 9), WIDE),
    "the same, a window of 1024": (row_of(4, 4096, (256,) * 9), Shape(32, 8, 128, window=1024)),
    "prompt 16384, responses 128": (row_of(4, 16384, (128,) * 9), WIDE),
}


def table() -> str:
    """Return the table of `CASES` in Markdown."""
    lines = [
        "| H=32 J=8 d=128, 16 bits | tokens | keys over tokens | FlexAttention, MiB "
        "| variable-length, MiB | of it the gather | over FlexAttention "
        "| kept keys and values, MiB | attention's FLOPs a byte of difference |",
        "| --- " * 9 + "|",
    ]
    for name, (segments, shape) in CASES.items():
        found = bytes_of(segments, shape)
        L = segments[-1].stop
        keys = found.kept / (2 * shape.kv_heads * shape.width * shape.itemsize)
        flops = attention_flops(segments, shape) / (found.varlen - found.flex)
        lines.append(
            f"| {name} | {L} | {keys / L:.2f} | {mib(found.flex)} | {mib(found.varlen)} "
            f"| {mib(found.gather)} | {found.varlen / found.flex:.2f} | {mib(found.kept)} "
            f"| {flops:.0f} |"
        )
    return "\n".join(lines)


def mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


if __name__ == "__main__":
    print(table())
