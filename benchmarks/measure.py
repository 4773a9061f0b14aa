"""Measures time beside a floor, memory and correctness of contenders that take turns.

Shapes: T rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from batches import Batch, exact_weights, one_group
from peers import Peer
from torch import Tensor

PACKAGES = ("triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def quartiles(seconds: list[float]) -> dict[str, float | int]:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"rounds": len(seconds), "median": median, "q1": q1, "q3": q3}


class Measured(NamedTuple):
    """Seconds of a contender and of the three bare GEMMs in each round, and its peak memory."""

    seconds: list[float]
    floor_seconds: list[float]
    peak_extra_mib: float | None

    def summary(self) -> dict[str, float | int | None]:
        """Return median and quartiles, and the median ratio to the floor of the same round."""
        ratios = [own / gemm for own, gemm in zip(self.seconds, self.floor_seconds, strict=True)]
        return quartiles(self.seconds) | {
            "gemm_seconds": statistics.median(self.floor_seconds),
            "gemm_ratio": statistics.median(ratios),
            "peak_extra_mib": self.peak_extra_mib,
        }


class Outputs(NamedTuple):
    loss: Tensor
    dhidden_TD: Tensor
    dhead_VD: Tensor


Truths = dict[bool, Outputs]  # by whether a loss is weighted


def measure(
    runs: Mapping[str, tuple[Peer, Batch]], *, rounds: int
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Check the results of every run, then time all in turns beside the first batch's floor.

    Returns:
        Measurements, and the reasons why other runs have none: `absence`, or out of memory.

    Raises:
        AssertionError: a peer's results are wrong.
    """
    torch._dynamo.reset()  # it stops compiling, without a word, after a few shapes
    absences = {
        key: reason for key, (peer, batch) in runs.items() if (reason := peer.absence(batch))
    }
    present = {key: run for key, run in runs.items() if key not in absences}
    batches = {id(batch): batch for _, batch in runs.values()}
    for batch in batches.values():
        gate([peer for peer, own in present.values() if own is batch], batch)

    functions = {}
    for key, (peer, batch) in present.items():
        function = _forward_and_backward(peer, batch)
        try:
            function()
            functions[key] = function
        except torch.OutOfMemoryError:
            absences[key] = f"out of memory at {batch.hidden_TD.shape[0]} tokens"
    return interleave(functions, next(iter(batches.values())), rounds), absences


def _forward_and_backward(peer: Peer, batch: Batch) -> Callable[[], Outputs]:
    return lambda: outputs(peer, batch)


def outputs(peer: Peer, batch: Batch) -> Outputs:
    """Run one forward and backward pass."""
    loss = peer.loss(batch)
    return Outputs(loss.detach(), *torch.autograd.grad(loss, (batch.hidden_TD, batch.head_VD)))


# Time


def interleave(
    functions: Mapping[str, Callable[[], object]],
    batch: Batch,
    rounds: int,
    *,
    goes_on: Callable[[int], bool] = lambda turn: True,
) -> dict[str, Measured]:
    """Time every function in every round, and before them the three GEMMs of `batch`.

    Each round starts with another function, so that none always follows the same neighbour.
    Rounds end early once `goes_on(turn)`, called before each with its number, is false.
    """
    device = batch.hidden_TD.device
    names = list(functions)
    own: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float | None]] = {name: [] for name in names}
    floor = []
    for turn in range(rounds):
        if not goes_on(turn):
            break
        gemms = three_gemms(batch)  # anew: buffers must not stay for the others
        if turn == 0:
            gemms()
        floor.append(seconds(gemms, device))
        del gemms
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            peaks[name].append(
                peak_extra_mib(
                    lambda name=name: own[name].append(seconds(functions[name], device)), device
                )
            )
    return {
        name: Measured(
            own[name], floor, max((p for p in peaks[name] if p is not None), default=None)
        )
        for name in names
    }


def three_gemms(batch: Batch) -> Callable[[], None]:
    """Return a function that runs the three GEMMs (6 T D V operations) into existing buffers."""
    hidden_TD, head_VD = batch.hidden_TD.detach(), batch.head_VD.detach()
    # Filled, so that page faults happen now and are not timed.
    logits_TV = hidden_TD.new_ones(hidden_TD.shape[0], head_VD.shape[0])
    dhidden_TD, dhead_VD = torch.ones_like(hidden_TD), torch.ones_like(head_VD)

    def run() -> None:
        torch.mm(hidden_TD, head_VD.T, out=logits_TV)
        torch.mm(logits_TV, head_VD, out=dhidden_TD)
        torch.mm(logits_TV.T, hidden_TD, out=dhead_VD)

    return run


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call; on CUDA, between two events on an idle stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    function()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


# Memory


def peak_extra_mib(function: Callable[[], object], device: torch.device) -> float | None:
    """Return peak memory beyond that before the call; None where the system does not report it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    before = _resident_mib("VmRSS")
    forget.write_text("5")  # sets the peak, VmHWM, to what is resident now
    function()
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# Correctness


def gate(peers: Iterable[Peer], batch: Batch) -> None:
    """Check loss and gradients of a batch's first live group against float64.

    Raises:
        AssertionError: as `checked_errors` does.
    """
    small, truths = one_group(batch), {}
    for peer in peers:
        checked_errors(peer, small, truths)


def checked_errors(peer: Peer, batch: Batch, truths: Truths) -> dict[str, float]:
    """Return a peer's errors on a small batch; `truths` keeps what is computed in float64.

    Raises:
        AssertionError: fewer than half of the dtype's digits are right: an error above sqrt(eps)
            of the largest true value. How accurate each is, bench_accuracy.py tells.
    """
    if peer.weighted not in truths:
        truths[peer.weighted] = truth(batch, weighted=peer.weighted)
    found = errors(outputs(peer, batch), truths[peer.weighted])
    allowed = torch.finfo(batch.hidden_TD.dtype).eps ** 0.5
    for name, error in found.items():
        assert error <= allowed, (
            f"{peer.name}: {name} is off by {error:.2g} of its size, {allowed:.2g} passes"
        )
    return found


def truth(batch: Batch, *, weighted: bool = True, chunk_rows: int = 512) -> Outputs:
    """Return loss and gradients in float64 from rewards in float64, a few rows at a time.

    `weighted=False`: the mean of -log p over the rows that count. The true loss comes with a
    second figure, the sum of its terms' sizes, which is what its error is measured by: terms of
    both signs cancel.
    """
    device = batch.hidden_TD.device
    # A batch may hold part of the rows for which the rewards were made, in whole sequences.
    weight_T = exact_weights(batch.sequence_T, batch.rewards_NK).to(device)
    if not weighted:
        live_T = weight_T != 0
        weight_T = live_T.double() / live_T.sum()
    head_VD = batch.head_VD.detach().double().requires_grad_()
    dhidden_TD = torch.zeros_like(batch.hidden_TD, dtype=torch.float64)
    dhead_VD = torch.zeros_like(head_VD)
    loss_2 = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, weight_T.numel(), chunk_rows):
        rows = slice(start, start + chunk_rows)
        hidden_RD = batch.hidden_TD[rows].detach().double().requires_grad_()
        logprob_RV = torch.log_softmax(hidden_RD @ head_VD.T, 1)
        terms_R = -weight_T[rows] * logprob_RV.gather(1, batch.target_T[rows, None]).squeeze(1)
        dhidden_TD[rows], chunk_VD = torch.autograd.grad(terms_R.sum(), (hidden_RD, head_VD))
        dhead_VD += chunk_VD
        loss_2 += torch.stack([terms_R.detach().sum(), terms_R.detach().abs().sum()])
    return Outputs(loss_2, dhidden_TD, dhead_VD)


def errors(actual: Outputs, true: Outputs) -> dict[str, float]:
    """Return the largest error of each output over its largest true value; NaN is infinite."""
    loss, size = true.loss
    pairs = {
        "loss": (actual.loss, loss, size),
        "dhidden": (actual.dhidden_TD, true.dhidden_TD, true.dhidden_TD.abs().amax()),
        "dhead": (actual.dhead_VD, true.dhead_VD, true.dhead_VD.abs().amax()),
    }
    return {
        name: ((found.double() - expected).abs().amax() / scale).nan_to_num(torch.inf).item()
        for name, (found, expected, scale) in pairs.items()
    }


# The machine


def load_average() -> float | None:
    """Return the load average of the last minute; None where the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine_facts(device: str) -> dict[str, str | int]:
    """Return hardware and package versions, without the name of the host."""
    facts: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        facts["cuda"] = torch.version.cuda or torch.version.hip or "unknown"
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
