"""linear_weighted_cross_entropy under autograd, memory layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from problem import assert_matches_specification, make_problem
from tolerance import assert_accurate

from grao_fast.kernels import linear_weighted_cross_entropy, reference
from grao_fast.kernels.one_pass import autograd, gemm
from grao_fast.kernels.one_pass.scale import scaled_gradient


def inputs(T: int = 20, D: int = 24, V: int = 97, device: str = "cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(T, D, generator=generator).to(device, dtype)
    head_VD = (torch.randn(V, D, generator=generator) / 3).to(device, dtype)
    target_T = torch.randint(0, V, (T,), generator=generator).to(device)
    weight_T = torch.randn(T, generator=generator)
    weight_T[::5] = 0
    return hidden_TD, head_VD, target_T, weight_T


def gradients(hidden_TD, head_VD, target_T, weight_T, **options):
    hidden_TD, head_VD = (x.detach().requires_grad_() for x in (hidden_TD, head_VD))
    result = linear_weighted_cross_entropy(hidden_TD, head_VD, target_T, weight_T, **options)
    return result, torch.autograd.grad(result.loss, (hidden_TD, head_VD))


def naive(hidden_TD, head_VD, target_T, weight_T, dtype):
    hidden_TD, head_VD = (x.to(dtype, copy=True).requires_grad_() for x in (hidden_TD, head_VD))
    live_T = weight_T != 0
    logprob = reference.token_logprobs(hidden_TD[live_T], head_VD, target_T[live_T])
    loss = -(weight_T[live_T].to(dtype) * logprob).sum()
    return loss, torch.autograd.grad(loss, (hidden_TD, head_VD))


def test_is_the_weighted_sum_of_cross_entropies(backend: str, device: str) -> None:
    tensors = inputs(device=device)
    result, ours = gradients(*tensors, backend=backend)
    on_cpu = [x.cpu() for x in tensors]
    truth_loss, truth = naive(*on_cpu, torch.float64)
    naive_loss, plain = naive(*on_cpu, torch.float32)
    assert_accurate("loss", result.loss, naive_loss, truth_loss, torch.float32)
    for name, one, two, three in zip(("dhidden", "dhead"), ours, plain, truth, strict=True):
        assert_accurate(name, one, two, three, torch.float32)
    assert torch.equal(result.logprob_T.isnan().cpu(), tensors[3] == 0)


def test_layout_of_memory_does_not_matter(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(device=device)
    wide_head = torch.full((head_VD.shape[0], 2 * head_VD.shape[1]), torch.nan, device=device)
    wide_head[:, ::2] = head_VD
    wide_hidden = torch.full((3 * hidden_TD.shape[0], hidden_TD.shape[1]), 7.0, device=device)
    wide_hidden[::3] = hidden_TD
    layouts = [
        (hidden_TD.T.contiguous().T, head_VD.T.contiguous().T, target_T, weight_T),
        (wide_hidden[::3], wide_head[:, ::2], target_T.repeat(2).reshape(2, -1)[1], weight_T),
        (hidden_TD, head_VD, target_T.int(), weight_T.double()),
    ]
    expected, (dhidden, dhead) = gradients(hidden_TD, head_VD, target_T, weight_T, backend=backend)
    for layout in layouts:
        result, ours = gradients(*layout, backend=backend)
        torch.testing.assert_close(result.loss, expected.loss)
        torch.testing.assert_close(ours[0], dhidden, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], dhead, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["hidden", "head", "both"])
def test_frozen_operands_cost_no_gradient(frozen, backend, device, monkeypatch) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(device=device)
    _, (dhidden, dhead) = gradients(hidden_TD, head_VD, target_T, weight_T, backend=backend)
    hidden_TD.requires_grad_(frozen == "head")
    head_VD.requires_grad_(frozen == "hidden")
    seen = Allocations(monkeypatch)
    result = linear_weighted_cross_entropy(hidden_TD, head_VD, target_T, weight_T, backend=backend)
    assert (head_VD.shape in seen.shapes) == (frozen == "hidden")
    assert (hidden_TD.shape in seen.shapes) == (frozen == "head")
    assert result.loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    result.loss.backward()
    if frozen == "head":
        assert torch.equal(hidden_TD.grad, dhidden) and head_VD.grad is None
    else:
        assert torch.equal(head_VD.grad, dhead) and hidden_TD.grad is None


def test_no_gradient_work_without_grad_mode(backend, device, monkeypatch) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(device=device)
    head_VD.requires_grad_()
    expected = linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, backend=backend
    )
    seen = Allocations(monkeypatch)
    with torch.no_grad():
        result = linear_weighted_cross_entropy(
            hidden_TD, head_VD, target_T, weight_T, backend=backend
        )
    assert not result.loss.requires_grad and head_VD.shape not in seen.shapes
    assert torch.equal(result.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_a_scaled_loss(dtype: torch.dtype, backend: str, device: str) -> None:
    problem = make_problem(bias=True)
    assert_matches_specification(problem, dtype, backend, device, scale=-0.3)


def test_small_weights_survive_float16(backend: str, device: str) -> None:
    """1e-7 is below float16's least normal number; a gradient scaler's 2^16 must recover it."""
    problem = make_problem(num_prompts=10**6)
    ours = assert_matches_specification(problem, torch.float16, backend, device, scale=2.0**16)
    assert ours["dhead_VD"].any() and ours["dhidden_TD"].any()


def test_backward_scales_on_the_backend_of_the_pass(backend, device, monkeypatch) -> None:
    seen = []

    def watched(gradient, scale, dtype, backend):
        seen.append(backend)
        return scaled_gradient(gradient, scale, dtype, backend)

    monkeypatch.setattr(autograd, "scaled_gradient", watched)
    gradients(*inputs(device=device), backend=backend)
    assert seen == [backend, backend]


def test_second_backward_is_refused(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(device=device)
    head_VD.requires_grad_()
    loss = linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, backend=backend
    ).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        loss.backward()


def test_tied_head_sums_both_gradients() -> None:
    _, head_VD, target_T, weight_T = inputs()
    head_VD.requires_grad_()
    tokens_T = (target_T + 1) % head_VD.shape[0]
    loss = linear_weighted_cross_entropy(head_VD[tokens_T], head_VD, target_T, weight_T).loss
    (ours,) = torch.autograd.grad(loss, head_VD)
    logprob = reference.token_logprobs(head_VD[tokens_T], head_VD, target_T)
    (expected,) = torch.autograd.grad(-(weight_T * logprob).sum(), head_VD)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_autocast_rounds_operands_and_not_gradients(backend: str, device: str) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(device=device)
    rounded = (hidden_TD.bfloat16(), head_VD.bfloat16())
    expected, plain = gradients(*rounded, target_T, weight_T, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        result, ours = gradients(hidden_TD.bfloat16(), head_VD, target_T, weight_T, backend=backend)
    assert torch.equal(result.loss, expected.loss)
    assert ours[0].dtype == torch.bfloat16 and ours[1].dtype == torch.float32
    _, (_, truth) = naive(*(x.cpu() for x in (*rounded, target_T, weight_T)), torch.float64)
    errors = [(each.cpu().double() - truth).abs().max() for each in (ours[1], plain[1])]
    assert errors[0] < errors[1] and not torch.equal(ours[1], ours[1].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [0.02, 0.06])
def test_slabs_fit_the_workspace(workspace_mib, dtype, backend, device, monkeypatch) -> None:
    hidden_TD, head_VD, target_T, weight_T = inputs(T=100, D=4, V=257, device=device, dtype=dtype)
    head_VD.requires_grad_()
    seen = Allocations(monkeypatch)
    # On a CPU without bfloat16 units, the interpreter's gradients would be widened.
    monkeypatch.setattr(gemm, "cpu_has_bfloat16", lambda: True)
    linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, workspace_mib=workspace_mib, backend=backend
    )
    slabs = [size for size in seen.bytes if size > 5000]
    assert 0.5 * workspace_mib * 2**20 < sum(slabs) <= workspace_mib * 2**20
