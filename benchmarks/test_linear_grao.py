"""linear_grao_loss, forward and backward, beside naive PyTorch and its own three GEMMs.

    pytest benchmarks/test_linear_grao.py --benchmark-only

Before every round of a variant the three bare GEMMs are timed, and `gemm_ratio` in extra_info is
the median over rounds of the two neighbours' ratio, whatever else the machine does meanwhile.
Values are checked before the clock starts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grao_fast.kernels import group_advantages, linear_grao_loss, sequence_weights

CUDA = torch.cuda.is_available()
SHAPE = (8192, 4096, 131072) if CUDA else (2048, 576, 49152)
DTYPE = torch.bfloat16 if CUDA else torch.float32
DEVICE = "cuda" if CUDA else "cpu"
G = 8
ROWS_A_SEQUENCE = 64
ROUNDS = 5


class Batch(NamedTuple):
    hidden_TD: Tensor
    head_VD: Tensor
    target_T: Tensor
    sequence_T: Tensor
    rewards_NK: Tensor
    weight_T: Tensor


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Groups of G + 1 sequences of 64 rows, all of them live."""
    T, D, V = SHAPE
    generator = torch.Generator().manual_seed(0)
    sequence_T = torch.arange(T) // ROWS_A_SEQUENCE
    N = int(sequence_T[-1]) // (G + 1) + 1
    rewards_NK = torch.randn(N, G + 1, generator=generator)
    weight_S = sequence_weights(group_advantages(rewards_NK)).flatten()
    return Batch(
        torch.randn(T, D, generator=generator).to(DEVICE, DTYPE).requires_grad_(),
        (torch.randn(V, D, generator=generator) / D**0.5).to(DEVICE, DTYPE).requires_grad_(),
        torch.randint(0, V, (T,), generator=generator).to(DEVICE),
        sequence_T,
        rewards_NK,
        weight_S[sequence_T] / (ROWS_A_SEQUENCE * N),
    )


def naive(batch: Batch) -> Tensor:
    logits_TV = batch.hidden_TD @ batch.head_VD.T
    losses_T = F.cross_entropy(logits_TV.float(), batch.target_T, reduction="none")
    return (batch.weight_T.to(DEVICE) * losses_T).sum()


def ours(workspace_mib: int) -> Callable[[Batch], Tensor]:
    return lambda batch: linear_grao_loss(*batch[:5], workspace_mib=workspace_mib).loss


VARIANTS = {"naive": naive, "grao_512_mib": ours(512), "grao_64_mib": ours(64)}


def gradients(loss_function: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss_function(batch), (batch.hidden_TD, batch.head_VD))


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(benchmark, batch: Batch, variant: str) -> None:
    loss_function = VARIANTS[variant]
    check(loss_function, batch)
    gemm_seconds: list[float] = []

    def run() -> None:
        gradients(loss_function, batch)
        wait()

    run()
    peak = peak_mib(run)
    if peak is not None:
        benchmark.extra_info["peak_extra_mib"] = peak
    gemms = three_gemms(batch)
    seconds(gemms)
    benchmark.pedantic(run, setup=lambda: gemm_seconds.append(seconds(gemms)), rounds=ROUNDS)
    if benchmark.stats is not None:
        rounds = zip(benchmark.stats.stats.data, gemm_seconds, strict=True)
        benchmark.extra_info["gemm_seconds"] = statistics.median(gemm_seconds)
        benchmark.extra_info["gemm_ratio"] = statistics.median(own / gemm for own, gemm in rounds)
    benchmark.extra_info["shape_TDV"] = SHAPE
    benchmark.extra_info["dtype"] = str(DTYPE)
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()


def check(loss_function: Callable[[Batch], Tensor], batch: Batch) -> None:
    """Gradients of 64 rows against float64; the head's whole gradient is checked in tests/."""
    small = batch._replace(
        hidden_TD=batch.hidden_TD[:ROWS_A_SEQUENCE].detach().requires_grad_(),
        target_T=batch.target_T[:ROWS_A_SEQUENCE],
        sequence_T=batch.sequence_T[:ROWS_A_SEQUENCE],
        weight_T=batch.weight_T[:ROWS_A_SEQUENCE],
    )
    hidden_TD = small.hidden_TD.detach().double().requires_grad_()
    logits_TV = hidden_TD @ batch.head_VD.detach().double().T
    losses_T = F.cross_entropy(logits_TV, small.target_T, reduction="none")
    (truth,) = torch.autograd.grad((small.weight_T.to(DEVICE) * losses_T).sum(), hidden_TD)
    (result,) = torch.autograd.grad(loss_function(small), small.hidden_TD)
    error = (result.double() - truth).abs().max() / truth.abs().max()
    assert error < 32 * torch.finfo(DTYPE).eps, f"relative error {error:.2g}"


def three_gemms(batch: Batch) -> Callable[[], object]:
    """6 T D V operations into buffers that are there."""
    T, _, V = SHAPE
    hidden_TD, head_VD = batch.hidden_TD.detach(), batch.head_VD.detach()
    logits_TV = torch.empty(T, V, device=DEVICE, dtype=DTYPE)
    dhidden_TD, dhead_VD = torch.empty_like(hidden_TD), torch.empty_like(head_VD)

    def run() -> None:
        torch.mm(hidden_TD, head_VD.T, out=logits_TV)
        torch.mm(logits_TV, head_VD, out=dhidden_TD)
        torch.mm(logits_TV.T, hidden_TD, out=dhead_VD)

    return run


def seconds(function: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def peak_mib(function: Callable[[], object]) -> float | None:
    """Memory beyond what is held before the call; None where the system does not tell."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    before = resident_mib("VmRSS")
    forget.write_text("5")  # sets the peak, VmHWM, to what is resident now
    function()
    return resident_mib("VmHWM") - before


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
