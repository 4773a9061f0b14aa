"""The row functions by themselves: what they write, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from calls import OneProcess, row_functions
from tolerance import assert_accurate

from grao_fast.kernels.checks import logit_constants
from grao_fast.kernels.rows.contract import RowInputs, RowOutputs
from grao_fast.kernels.rows.forms import FormRows
from grao_fast.kernels.rows.sharded import sharded_policy_rows

STRIDE = 320
PLAIN = logit_constants(1.0, 1.0, None)


def row_function(backend: str):
    """The backend's row function, with the target's gradient put back among the others."""
    policy_rows = row_functions(backend).policy_rows

    def run(logits_RV, dlogits_RV, bias_V, inputs, logprob_R, constants=PLAIN):
        target_grad_R = torch.full_like(inputs.weight_R, torch.nan)
        outputs = RowOutputs(logprob_R, target_grad_R=target_grad_R)
        policy_rows(logits_RV, dlogits_RV, bias_V, inputs, outputs, constants)
        place_R1 = inputs.target_R.clamp(min=0)[:, None]
        dlogits_RV.scatter_add_(1, place_R1, target_grad_R[:, None].to(dlogits_RV.dtype))

    return run


def row_inputs(device: str, R: int = 6, V: int = 257):
    generator = torch.Generator().manual_seed(1)
    slab = torch.full((R, STRIDE), torch.nan)
    slab[:, :V] = 3 * torch.randn(R, V, generator=generator)
    target_R = torch.randint(0, V, (R,), generator=generator)
    weight_R = torch.randn(R, generator=generator)
    return slab.to(device), target_R.to(device), weight_R.to(device)


def expected_rows(x_RV, target_R, weight_R, dtype):
    x_RV = x_RV.cpu().to(dtype).requires_grad_()
    logprob_R = torch.log_softmax(x_RV, 1).gather(1, target_R.cpu()[:, None])[:, 0]
    (dx_RV,) = torch.autograd.grad(-(weight_R.cpu().to(dtype) * logprob_R).sum(), x_RV)
    return logprob_R, dx_RV


@pytest.mark.parametrize("in_place", [True, False])
def test_rows_and_nothing_else_are_written(in_place: bool, backend: str, device: str) -> None:
    """Padding starts as NaN, so that any sum that reads it becomes NaN."""
    V = 257
    slab, target_R, weight_R = row_inputs(device)
    x_RV = slab[:, :V].clone()
    truth = expected_rows(x_RV, target_R, weight_R, torch.float64)
    naive = expected_rows(x_RV, target_R, weight_R, torch.float32)
    out = slab if in_place else torch.full_like(slab, torch.nan)
    logprob_R = torch.full((8,), torch.nan, device=device)
    row_function(backend)(
        slab[:, :V],
        out[:, :V],
        None,
        RowInputs(target_R, weight_R),
        logprob_R[1:7],
    )
    assert logprob_R[[0, 7]].isnan().all()
    assert_accurate("logprob", logprob_R[1:7], naive[0], truth[0], torch.float32)
    assert_accurate("dlogits", out[:, :V], naive[1], truth[1], torch.float32)


def test_row_of_weight_0_is_not_read(backend: str, device: str) -> None:
    V = 257
    slab, target_R, weight_R = row_inputs(device)
    weight_R[2] = 0
    if backend == "triton":
        slab[2], target_R[2] = torch.nan, -100
    logprob_R = torch.zeros(6, device=device)
    inputs = RowInputs(target_R, weight_R)
    row_function(backend)(slab[:, :V], slab[:, :V], None, inputs, logprob_R)
    assert logprob_R.isnan().nonzero().flatten().tolist() == [2]
    assert not slab[2, :V].any() and slab[3, :V].all()


def test_vocabulary_masked_by_the_bias(backend: str, device: str) -> None:
    """A bias of -inf removes tokens, even a whole block of them at the start of a row."""
    V, masked = 20000, 9000
    x_RV = torch.randn(2, V, generator=torch.Generator().manual_seed(0), device="cpu")
    slab = torch.zeros(2, 20032, device=device)
    slab[:, :V] = x_RV
    bias_S = torch.zeros(20032, device=device)
    bias_S[:masked] = -math.inf
    target_R = torch.tensor([masked, V - 1], device=device)
    weight_R = torch.ones(2, device=device)
    logprob_R = torch.zeros(2, device=device)
    inputs = RowInputs(target_R, weight_R)
    row_function(backend)(slab[:, :V], slab[:, :V], bias_S[:V], inputs, logprob_R)
    truth = expected_rows(x_RV[:, masked:], target_R - masked, weight_R, torch.float64)
    naive = expected_rows(x_RV[:, masked:], target_R - masked, weight_R, torch.float32)
    assert not slab[:, :masked].any()
    assert_accurate("logprob", logprob_R, naive[0], truth[0], torch.float32)
    assert_accurate("dlogits", slab[:, masked:V], naive[1], truth[1], torch.float32)


def test_softcap_near_0_and_far_from_it(backend: str, device: str) -> None:
    """tanh and its derivative keep their precision for logits from 1e-6 to 1e3 caps."""
    cap, V = 2.0, 64
    x_RV = torch.logspace(-6, 3, V, dtype=torch.float64).float()[None] * cap
    x_RV[:, ::2] *= -1
    slab = x_RV.clone().to(device)
    target_R, weight_R = torch.tensor([5], device=device), torch.ones(1, device=device)
    logprob_R = torch.zeros(1, device=device)

    def plain(dtype):
        x = x_RV.to(dtype).requires_grad_()
        logprob = torch.log_softmax(cap * torch.tanh(x / cap), 1)[0, 5]
        return logprob[None], torch.autograd.grad(-logprob, x)[0]

    inputs, constants = RowInputs(target_R, weight_R), logit_constants(1.0, 1.0, cap)
    row_function(backend)(slab, slab, None, inputs, logprob_R, constants)
    truth, naive = plain(torch.float64), plain(torch.float32)
    assert_accurate("logprob", logprob_R, naive[0], truth[0], torch.float32)
    assert_accurate("dlogits", slab, naive[1], truth[1], torch.float32)


@pytest.mark.parametrize("transform", [(1.0, 1.0, None), (0.7, 2.0, 5.0)], ids=["plain", "all"])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_halves_do_what_the_whole_does(gradient, transform, backend, device) -> None:
    """Statistics, then gradient, as with a sharded head; on a GPU these kernels run here."""
    rows = row_functions(backend)
    V = 257
    slab, target_R, weight_R = row_inputs(device)
    weight_R[2] = 0
    pull_R = torch.linspace(-1, 1, 6, device=device).where(weight_R != 0, 0)
    bias_S = torch.linspace(-2, 2, STRIDE, device=device)
    constants_PR = torch.linspace(-9, -2, 24, device=device).reshape(4, 6)
    constants_PR[3, ::2] = 0  # the other rows are shaped
    forms = FormRows(
        "clipped",
        "luffy",
        constants_PR,
        torch.full((6,), 0.1, device=device).where(weight_R != 0, 0),
        *(0.8, 1.2, 2.0),
    )
    inputs = RowInputs(target_R, weight_R, pull_R, forms)
    halves = sharded_policy_rows(OneProcess("", V), rows.row_statistics, rows.row_gradient)
    results = []
    for function in (rows.policy_rows, halves):
        logits = slab.clone()
        dlogits = torch.full_like(slab, torch.nan, dtype=gradient)
        outputs = RowOutputs(*torch.full((4, 6), torch.nan, device=device))
        constants = logit_constants(*transform)
        function(logits[:, :V], dlogits[:, :V], bias_S[:V], inputs, outputs, constants)
        results.append([dlogits[:, :V], *outputs])
    for one, two in zip(*results, strict=True):
        assert one.nan_to_num(7).any()
        tolerance = 8 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_of_an_unlikely_target_the_weight_is_not_rounded(backend: str, device: str) -> None:
    """Below p = 1/1024 the target's gradient is -weight to the bit, and dlogits holds p."""
    V = 4096
    slab = torch.zeros(2, V, device=device)
    slab[1, 7] = 9.0  # p = 0.66; the other row's is 1/4096
    weight_R = torch.tensor([0.3, 0.3], device=device)
    target_R = torch.full((2,), 7, device=device)
    logprob_R, target_grad_R = torch.empty(2, device=device), torch.empty(2, device=device)
    inputs = RowInputs(target_R, weight_R)
    outputs = RowOutputs(logprob_R, target_grad_R=target_grad_R)
    row_functions(backend).policy_rows(slab, slab, None, inputs, outputs, PLAIN)
    p_R = logprob_R.exp()
    assert target_grad_R[0] == -weight_R[0]
    torch.testing.assert_close(slab[0, 7], weight_R[0] * p_R[0])
    assert slab[1, 7] == 0
    torch.testing.assert_close(target_grad_R[1], weight_R[1] * (p_R[1] - 1))
