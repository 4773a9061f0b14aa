"""Reports the device and its peak rates, to which all other figures relate."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone

import torch
from batches import SHAPES
from measure import machine_facts, seconds, three_gemms

from suite.checkout import ROOT
from suite.contend import device_batch
from suite.runner import Run, attempt, free_memory

_NVIDIA_SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def facts(run: Run) -> str:
    """Report device, versions, copy and GEMM rates, and the GEMMs of the benchmarks' shapes."""
    report = run.report
    report |= machine_facts(run.device.type)
    report["date"] = datetime.now(timezone.utc).date().isoformat()
    report["load"] = os.getloadavg()[0]
    report["commit"] = _printed("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        report |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "nvidia_smi": _printed("nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv"),
        }
    size = 256 if run.tiny else 8192
    report["copy_gb_per_s"] = copy_rate(run) / 1e9
    report[f"bf16_gemm_{size}_tflop_per_s"] = gemm = _gemm_rate(run, size) / 1e12
    free_memory()
    report["three_gemms"] = {}
    for shape_TDV in SHAPES["tiny" if run.tiny else "cuda"]:
        name = "T={} D={} V={}".format(*shape_TDV)
        if run.in_time(name):
            report["three_gemms"][name] = _head_rate(run, shape_TDV)
            free_memory()
    return f"{report['device']}: copy {report['copy_gb_per_s']:.4g} GB/s, GEMM {gemm:.3g} TFLOP/s"


def median_seconds(run: Run, function: Callable[[], object], *, calls: int, rounds: int) -> float:
    """Return the median seconds of a call over rounds of `calls`, after a warm-up round."""

    def several() -> None:
        for _ in range(calls):
            function()

    several()
    return statistics.median(seconds(several, run.device) / calls for _ in range(rounds))


def copy_rate(run: Run) -> float:
    """Return the bytes read and written a second by a copy far larger than the L2."""
    source = torch.randn((4 if run.tiny else 1024) * 2**18, device=run.device)
    target = torch.empty_like(source)
    took = median_seconds(run, lambda: target.copy_(source), calls=2 if run.tiny else 20, rounds=5)
    return 2 * source.numel() * source.element_size() / took


def _gemm_rate(run: Run, size: int) -> float:
    """Return the FLOP/s of a square product of random numbers; zeros would draw less power."""
    options = {"device": run.device, "dtype": torch.bfloat16}
    a, b = torch.randn(size, size, **options), torch.randn(size, size, **options)
    out = torch.empty_like(a)
    took = median_seconds(
        run, lambda: torch.mm(a, b, out=out), calls=2 if run.tiny else 100, rounds=5
    )
    return 2 * size**3 / took


def _head_rate(run: Run, shape_TDV: tuple[int, int, int]) -> dict[str, float]:
    T, D, V = shape_TDV
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    gemms = three_gemms(device_batch(shape_TDV, dtype, run.device))
    took = median_seconds(run, gemms, calls=2, rounds=3 if run.tiny else 7)
    return {"seconds": took, "tflop_per_s": 6 * T * D * V / took / 1e12}


def _printed(*command: str) -> str:
    def output() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    printed, reason = attempt(output)
    return printed if printed is not None else f"unknown ({reason})"
