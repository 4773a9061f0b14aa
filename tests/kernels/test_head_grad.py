"""head_grad_VD: the head's gradient is added to a buffer, without another of its size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import Allocations
from problem import make_problem
from tolerance import assert_accurate
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from grao_fast.kernels import linear_grao_loss, linear_weighted_cross_entropy, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
K = 4


def micro_batches(dtype: torch.dtype, device: str):
    """The prompts of one problem one by one, with the divisor of the whole batch."""
    problem = make_problem(T=30, V=97, D=24)
    for n in range(3):
        rows = (problem.sequence_T // K == n).nonzero().squeeze(1)
        yield replace(
            problem,
            hidden_TD=problem.hidden_TD[rows].to(device, dtype),
            target_T=problem.target_T[rows].to(device),
            sequence_T=problem.sequence_T[rows] - n * K,
            rewards_NK=problem.rewards_NK[n : n + 1],
            options={"num_prompts": 3, "workspace_mib": 0.002},
        )


def sum_of_gradients(head_VD: Tensor, device: str, backend: str, buffer: Tensor | None):
    """Gradients over all micro-batches: the head's, in `buffer` if given, and hidden's."""
    head_VD = head_VD.detach().requires_grad_()
    hidden_gradients = []
    for part in micro_batches(head_VD.dtype, device):
        hidden_TD = part.hidden_TD.requires_grad_()
        args = (hidden_TD, head_VD, part.target_T, part.sequence_T, part.rewards_NK)
        result = linear_grao_loss(*args, backend=backend, head_grad_VD=buffer, **part.options)
        result.loss.backward()
        hidden_gradients.append(hidden_TD.grad)
    assert (head_VD.grad is None) == (buffer is not None)
    return (head_VD.grad if buffer is None else buffer), hidden_gradients


def head(dtype: torch.dtype, device: str) -> Tensor:
    return make_problem(V=97, D=24).head_VD.to(device, dtype)


@pytest.mark.parametrize("kept", ["float32", "own"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_micro_batches_add_up(dtype: torch.dtype, kept: str, backend: str, device: str) -> None:
    head_VD = head(dtype, device)
    truth, _ = sum_of_gradients(head_VD.float(), device, backend, None)
    naive, expected = sum_of_gradients(head_VD, device, backend, None)
    buffer = torch.zeros_like(head_VD, dtype=torch.float32 if kept == "float32" else dtype)
    ours, hidden_gradients = sum_of_gradients(head_VD, device, backend, buffer)
    assert ours.dtype == buffer.dtype and truth.any()
    assert_accurate("dhead", ours, naive, truth, dtype)
    for one, two in zip(hidden_gradients, expected, strict=True):
        assert torch.equal(one, two)


def test_adds_to_what_is_there(backend: str, device: str) -> None:
    head_VD = head(torch.float32, device)
    expected, _ = sum_of_gradients(head_VD, device, backend, None)
    ours, _ = sum_of_gradients(head_VD, device, backend, torch.ones_like(head_VD))
    torch.testing.assert_close(ours, expected + 1, rtol=1e-5, atol=1e-5)


def test_small_weights_survive_float16(backend: str, device: str) -> None:
    """1e-9 underflows in float16, but not in the float32 buffer."""
    hidden_TD, head_VD, target_T, weight_T = inputs(torch.float16, device)
    buffer = torch.zeros_like(head_VD, dtype=torch.float32)
    one = torch.zeros_like(buffer)
    for scale, each in ((1.0, one), (2.0**-30, buffer)):
        linear_weighted_cross_entropy(
            hidden_TD, head_VD, target_T, scale * weight_T, head_grad_VD=each, backend=backend
        )
    assert one.any()
    assert torch.equal(buffer, one * 2.0**-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_targets_are_not_rounded_to_16_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    """The target's element dominates its row; rounded, it would be off by 1e-3."""
    hidden_TD, head_VD, target_T, weight_T = inputs(dtype, device)
    head_VD = head_VD.detach()[:, :8].div(4).repeat(40, 1).contiguous()  # flat, 3880 tokens
    hidden_TD = hidden_TD.detach()[:, :8].contiguous()
    buffer = torch.zeros_like(head_VD, dtype=torch.float32)
    linear_weighted_cross_entropy(
        hidden_TD,
        head_VD.requires_grad_(),
        target_T,
        weight_T,
        head_grad_VD=buffer,
        backend=backend,
    )
    exact_VD = head_VD.detach().double().requires_grad_()
    logprob_T = reference.token_logprobs(hidden_TD.double(), exact_VD, target_T)
    loss = -(weight_T.to(device).double() * logprob_T).sum()
    (truth,) = torch.autograd.grad(loss, exact_VD)
    assert (buffer.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def inputs(dtype: torch.dtype, device: str):
    part = next(micro_batches(dtype, device))
    hidden_TD = part.hidden_TD.requires_grad_()
    head_VD = head(dtype, device).requires_grad_()
    return hidden_TD, head_VD, part.target_T, torch.linspace(-1, 1, part.target_T.numel())


def test_no_second_buffer_of_the_head_s_size(backend, device, monkeypatch) -> None:
    """With a head far larger than hidden and the slabs, only its buffer has its size."""
    hidden_TD = torch.randn(4, 2048, device=device)
    head_VD = torch.randn(64, 2048, device=device).requires_grad_()
    target_T, weight_T = torch.arange(4, device=device), torch.ones(4)
    buffer = torch.zeros_like(head_VD).detach()
    seen = Allocations(monkeypatch)
    for options, largest in (({}, 4 * head_VD.numel()), ({"head_grad_VD": buffer}, 0)):
        seen.bytes.clear()
        linear_weighted_cross_entropy(
            hidden_TD, head_VD, target_T, weight_T, backend=backend, **options
        )
        assert seen.bytes and max(largest, 40_000) >= max(seen.bytes) >= largest
    assert buffer.any()


def test_nothing_is_added_without_grad_mode(backend: str, device: str) -> None:
    buffer = torch.zeros_like(head(torch.float32, device))
    with torch.no_grad():
        linear_weighted_cross_entropy(
            *inputs(torch.float32, device), head_grad_VD=buffer, backend=backend
        )
    assert not buffer.any()


@pytest.mark.parametrize("factor", [0.5, 0.0])
def test_a_factor_that_comes_too_late(factor: float, backend: str, device: str) -> None:
    tensors = inputs(torch.float32, device)
    buffer = torch.zeros_like(tensors[1]).detach()
    loss = linear_weighted_cross_entropy(*tensors, head_grad_VD=buffer, backend=backend).loss
    if device == "cpu":
        with pytest.raises(ValueError, match=f"a gradient of {factor:g} for it, not 1"):
            (factor * loss).backward()
    else:
        (factor * loss).backward()
        assert tensors[0].grad.isnan().all()


def test_a_frequent_token_does_not_stand_still(backend: str, device: str) -> None:
    """256 + 1 is 256 in bfloat16, so rows of one token are summed before they are added."""
    T = 288
    hidden_TD = torch.ones(T, 8, device=device, dtype=torch.bfloat16)
    head_VD = torch.zeros(16, 8, device=device, dtype=torch.bfloat16).requires_grad_()
    buffer = torch.zeros_like(head_VD).detach()
    target_T = torch.full((T,), 3, device=device)
    weight_T = torch.full((T,), 1 / 64)
    linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, head_grad_VD=buffer, backend=backend
    )
    expected = -(T / 64) * (1 - 1 / 16)
    assert (buffer[3] - expected).abs().max() < 0.01 * abs(expected)


@pytest.mark.parametrize(
    "buffer, message",
    [
        (torch.zeros(96, 24), r"must be \(97, 24\) on cpu, as head_VD is; got \(96, 24\)"),
        (torch.zeros(97, 24).double(), "float32 or torch.float32, got torch.float64"),
        (torch.zeros(97, 24).requires_grad_(), r"head_grad_VD requires grad.*detach\(\)"),
        (torch.zeros(97, 24, device="meta"), "on meta"),
        (torch.zeros(24, 97).T, "must be contiguous"),
    ],
    ids=["shape", "dtype", "grad", "device", "layout"],
)
def test_refused_by_name(buffer: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_weighted_cross_entropy(*inputs(torch.float32, "cpu"), head_grad_VD=buffer)


@pytest.mark.parametrize("hidden_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_gives_the_same_sums(dtype, hidden_frozen, backend, device) -> None:
    """In a float32 buffer, even with 16-bit operands."""
    hidden_TD, head_VD, target_T, weight_T = inputs(dtype, device)
    hidden_TD.requires_grad_(not hidden_frozen)

    def loss(hidden_TD, buffer):
        return linear_weighted_cross_entropy(
            hidden_TD, head_VD, target_T, weight_T, head_grad_VD=buffer, backend=backend
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        buffer = torch.ones_like(head_VD, dtype=torch.float32).detach()
        hidden_TD.grad = None
        function(hidden_TD, buffer).backward()
        results.append((hidden_TD.grad, buffer))
    assert (results[0][1] != 1).any()
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)
    if hidden_frozen:
        assert results[0][0] is None and results[1][0] is None
    else:
        assert torch.equal(results[0][0], results[1][0])


def loss_in_a_region(hidden_TD: Tensor, buffer: Tensor, args: tuple, backend: str) -> Tensor:
    """A loss among other operations, whose saved tensors a checkpoint must recompute."""
    result = linear_weighted_cross_entropy(
        hidden_TD.tanh(), *args, head_grad_VD=buffer, backend=backend
    )
    return result.loss + 0 * hidden_TD.sin().sum()


def inside(*arguments):
    return checkpoint(loss_in_a_region, *arguments, use_reentrant=False)


def reentrant(*arguments):
    return checkpoint(loss_in_a_region, *arguments, use_reentrant=True)


def twice_inside(*arguments):
    return checkpoint(inside, *arguments, use_reentrant=False)


def inside_reentrant(*arguments):
    return checkpoint(inside, *arguments, use_reentrant=True)


def reentrant_inside(*arguments):
    return checkpoint(reentrant, *arguments, use_reentrant=False)


def saved_on_cpu(*arguments):
    def region(*arguments):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_in_a_region(*arguments)
        return loss + 0 * arguments[0].cos().sum()

    return checkpoint(region, *arguments, use_reentrant=False)


def compiled_inside(hidden_TD, buffer, args, backend):
    def region(hidden_TD):
        return loss_in_a_region(hidden_TD, buffer, args, backend)

    torch._dynamo.reset()
    compiled = torch.compile(region, fullgraph=True, backend="aot_eager")
    return checkpoint(compiled, hidden_TD, use_reentrant=False)


def inside_compiled(*arguments):
    torch._dynamo.reset()
    return torch.compile(inside, fullgraph=True, backend="aot_eager")(*arguments)


CHECKPOINTS = [
    inside,
    reentrant,
    twice_inside,
    inside_reentrant,
    reentrant_inside,
    saved_on_cpu,
    compiled_inside,
    inside_compiled,
]


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad.*:UserWarning")
@pytest.mark.parametrize("whole", [False, True], ids=["what_is_saved", "whole"])
@pytest.mark.parametrize("function", CHECKPOINTS, ids=lambda function: function.__name__)
def test_a_forward_pass_that_is_run_again_adds_nothing(function, whole: bool) -> None:
    """Both gradients equal those without a checkpoint; a compiler sums in another order."""
    hidden_TD, *args = inputs(torch.float32, "cpu")
    results = []
    for each in (loss_in_a_region, function):
        buffer = torch.ones_like(args[0]).detach()
        hidden_TD.grad = None
        with set_checkpoint_early_stop(not whole):
            each(hidden_TD, buffer, tuple(args), "torch").backward()
        results.append((buffer, hidden_TD.grad))
    assert (results[0][0] != 1).any() and results[0][1].any()
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=1e-6)
    assert torch.equal(results[1][1], results[0][1])


def test_two_backward_passes_through_a_region_add_nothing_more() -> None:
    hidden_TD, *args = inputs(torch.float32, "cpu")
    buffers = [torch.zeros_like(args[0]).detach() for _ in range(2)]
    loss_in_a_region(hidden_TD, buffers[0], tuple(args), "torch")

    def region(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_in_a_region(hidden_TD, buffers[1], tuple(args), "torch")
        return loss, hidden_TD.exp().sum()

    with set_checkpoint_early_stop(False):
        loss, other = checkpoint(region, hidden_TD, use_reentrant=False)
    other.backward(retain_graph=True)
    loss.backward()
    assert buffers[0].any() and torch.equal(*buffers)


def test_opcheck_of_the_sum() -> None:
    arguments = (torch.ones(5, 3), torch.randn(5, 3), torch.tensor(2.0))
    torch.library.opcheck(torch.ops.grao_fast.add_head_grad.default, arguments)
