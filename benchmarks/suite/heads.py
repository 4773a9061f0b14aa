"""Times the loss of a head beside its peers over shapes, live rows and tokens."""

from __future__ import annotations

from typing import Any

import torch
from batches import SHAPES
from peers import OURS, PEERS

from suite.contend import contend, device_batch, verdict
from suite.runner import Run, free_memory

# (D, V) of the sweeps, and their contenders: the fastest known of each kind.
SWEPT_HEAD = (4096, 151936)
TINY_HEAD = (64, 1031)
SWEPT = ("grao", "naive", "trl", "liger_scaled_ce", "cce", "quack")


def shapes(run: Run) -> str:
    """Time every contender on the benchmarks' shapes.

    Contenders that must be compiled come last, with ours and naive once more in their rounds,
    since compiling takes time that the others need.
    """
    slow = [name for name in PEERS if "compile" in name]
    contests = {"": [name for name in PEERS if name not in slow]}
    if run.tiny:
        run.leave_out(", ".join(slow), "--tiny")
    else:
        contests[", compiled"] = ["grao", "naive", *slow]
    headlines = []
    for suffix, names in contests.items():
        for shape_TDV in SHAPES["tiny" if run.tiny else "cuda"]:
            where = "T={} D={} V={}".format(*shape_TDV) + suffix
            if not run.in_time(where):
                continue
            batch = device_batch(shape_TDV, _dtype(run), run.device)
            found = contend(run, where, names, batch, 2 if run.tiny else 10)
            headlines.append(f"V={shape_TDV[2]}{suffix}: {_ratios(found)}")
            del batch
            free_memory()
    return verdict(run, "; ".join(headlines))


def occupancy(run: Run) -> str:
    """Time passes over the share of rows that count."""
    T, (D, V) = (512, TINY_HEAD) if run.tiny else (8192, SWEPT_HEAD)
    shares: dict[float, float] = {}
    head_VD = None
    for live in (1.0, 0.5, 0.25):
        where = f"{live:.0%} live"
        if not run.in_time(where):
            continue
        batch = device_batch((T, D, V), _dtype(run), run.device, live=live, head_VD=head_VD)
        head_VD = batch.head_VD
        found = contend(run, where, SWEPT, batch, 2 if run.tiny else 8)
        if "median" in found.get("grao", {}):
            shares[live] = found["grao"]["median"]
    times = (f"{live:.0%} live {1000 * time:.1f} ms" for live, time in shares.items())
    return verdict(run, ", ".join(times))


def tokens(run: Run) -> str:
    """Measure time and memory over the number of tokens."""
    D, V = TINY_HEAD if run.tiny else SWEPT_HEAD
    head_VD = None
    longest = ""
    for T in (256, 512) if run.tiny else (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        where = f"T={T}"
        if not run.in_time(where):
            continue
        batch = device_batch((T, D, V), _dtype(run), run.device, head_VD=head_VD)
        head_VD = batch.head_VD
        found = contend(run, where, SWEPT, batch, 2 if run.tiny or T > 16384 else 5)
        longest = f"T={T}: {_ratios(found)}"
        del batch
        free_memory()
    return verdict(run, longest)


def _dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.device.type == "cuda" else torch.float32


def _ratios(found: dict[str, dict[str, Any]]) -> str:
    """Return ours and the best of the others as multiples of the GEMMs."""
    ratios = {name: each["gemm_ratio"] for name, each in found.items() if "gemm_ratio" in each}
    if "grao" not in ratios:
        return "ours not measured"
    ours = ratios.pop("grao")
    for name in OURS:
        ratios.pop(name, None)
    if not ratios:
        return f"{ours:.2f}x its GEMMs"
    best = min(ratios, key=lambda name: ratios[name])
    return f"{ours:.2f}x its GEMMs ({best} {ratios[best]:.2f}x)"
