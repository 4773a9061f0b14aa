"""What only a GPU shows: heads of real size, slabs beyond 32 bits, no waiting, compiled code.

Shapes: T rows (tokens), D width, V vocabulary, N prompts, K sequences of each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import test_linear_logprob
import torch
from problem import Problem, assert_matches_specification, run
from test_off_policy import NAMES, off_policy
from tolerance import assert_accurate
from torch import Tensor, nn

from grao_fast.kernels import (
    group_advantages,
    linear_grao_loss,
    linear_logprobs,
    linear_weighted_cross_entropy,
    reference,
    sequence_weights,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# (V, D): the heads of Qwen2.5 7B and of Llama 3 8B, and a ragged one.
QWEN, RAGGED, LLAMA = (151936, 3584), (32001, 4096), (128256, 4096)
TRANSFORM = {"temperature": 0.7, "logit_scale": 2.0, "softcap": 30.0}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ON_GPU = {"backend": "triton", "device": DEVICE, "truth_on": DEVICE, "workspace_mib": 8}  # chunks
N, K = 2, 4
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def make_wide(head: tuple[int, int], *, T: int = 24, bias: bool = False, **options) -> Problem:
    """Random tensors made on the device, in float32; every third row belongs to no sequence."""
    V, D = head
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE)

    sequence_T = torch.arange(T) % (N * K)
    sequence_T[::3] = -1
    return Problem(
        hidden_TD=randn(T, D),
        head_VD=randn(V, D).div_(D**0.5),
        target_T=torch.randint(0, V, (T,), generator=generator, device=DEVICE),
        sequence_T=sequence_T,
        rewards_NK=torch.tensor([[0.3, -1.2, 2.0, 0.5], [1.0, 0.0, 0.0, 0.2]]).double(),
        bias_V=randn(V) if bias else None,
        options=options,
    )


def make_off_policy() -> Problem:
    return off_policy(make_wide(LLAMA), *NAMES, clip=(0.2, 0.3), sampler_cap=1.2, kl_coef=0.1)


def make_beside() -> Problem:
    """Rewards and sequences on the device, so that dead rows stay in and are skipped there."""
    wide = make_wide(LLAMA)
    on_device = {name: getattr(wide, name).to(DEVICE) for name in ("sequence_T", "rewards_NK")}
    return replace(wide, **on_device)


WIDE = {
    "plain": lambda: make_wide(QWEN),
    "bias_and_transform": lambda: make_wide(RAGGED, bias=True, **TRANSFORM),
    "off_policy_and_kl": make_off_policy,
    "rewards_on_the_device": make_beside,
}


@every_dtype
@pytest.mark.parametrize("make", WIDE.values(), ids=WIDE)
def test_grao_loss_of_real_heads(make: Callable[[], Problem], dtype: torch.dtype) -> None:
    assert_matches_specification(make(), dtype, **ON_GPU)


@every_dtype
def test_logprobs_and_entropies_of_real_heads(dtype: torch.dtype) -> None:
    test_linear_logprob.assert_matches_specification(make_wide(QWEN), dtype, **ON_GPU)


@every_dtype
def test_entropies_and_top1_of_real_heads(dtype: torch.dtype) -> None:
    wide = make_wide(RAGGED)
    operands = wide.hidden_TD.to(dtype), wide.head_VD.to(dtype)
    best_T2, index_T2 = (operands[0].double() @ operands[1].double().T).topk(2)
    target_T = wide.target_T.clone()
    target_T[::2] = index_T2[::2, 0]
    result = linear_grao_loss(
        *operands, target_T, wide.sequence_T, wide.rewards_NK, entropy=True, top1=True
    )
    live_T = (wide.sequence_T >= 0).to(DEVICE)
    clear_T = live_T & (best_T2[:, 0] - best_T2[:, 1] > 1e-3)
    hit_T = index_T2[:, 0] == target_T
    assert hit_T[clear_T].any() and not hit_T[clear_T].all()
    assert torch.equal(result.top1_T[clear_T], hit_T[clear_T].float())
    truth_T, naive_T = (
        reference.token_entropies(operands[0].to(each), operands[1].to(each))[live_T]
        for each in (torch.float64, dtype)
    )
    assert_accurate("entropy", result.entropy_T[live_T], naive_T, truth_T, dtype)


@pytest.mark.parametrize("frozen", ["hidden_TD", "head_VD"])
def test_a_frozen_operand_changes_no_bit_of_the_other_gradient(frozen: str) -> None:
    wide = make_wide(LLAMA)
    expected = run(linear_grao_loss, wide, torch.bfloat16, DEVICE)

    def loss(hidden_TD: Tensor, head_VD: Tensor, *rest: Tensor, **options):
        (hidden_TD if frozen == "hidden_TD" else head_VD).requires_grad_(False)
        return linear_grao_loss(hidden_TD, head_VD, *rest, **options)

    found = run(loss, wide, torch.bfloat16, DEVICE)
    other = {"hidden_TD": "dhead_VD", "head_VD": "dhidden_TD"}[frozen]
    assert found[f"d{frozen}"] is None and expected[other].any()
    assert torch.equal(found[other], expected[other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_slab_of_more_than_2_31_logits(dtype: torch.dtype) -> None:
    """The first rows, those around element 2^31 and the last, all in one chunk."""
    T, V = 15000, 151936
    rows = [0, 1, 2**31 // V - 1, 2**31 // V, 2**31 // V + 1, T - 2, T - 1]
    wide = make_wide((V, 64), T=T)
    hidden_TD, head_VD = wide.hidden_TD.to(dtype).requires_grad_(), wide.head_VD.to(dtype)
    weight_T = torch.linspace(0.5, 1.5, T)
    torch.cuda.reset_peak_memory_stats()
    result = linear_weighted_cross_entropy(
        hidden_TD, head_VD, wide.target_T, weight_T, workspace_mib=16 * 1024
    )
    (dhidden_TD,) = torch.autograd.grad(result.loss, hidden_TD)
    assert torch.cuda.max_memory_allocated() > 4 * T * V, "the rows did not make one slab"

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden_RD = hidden_TD.detach()[rows].to(dtype).requires_grad_()
        logprob_R = reference.token_logprobs(hidden_RD, head_VD.to(dtype), wide.target_T[rows])
        loss = -(weight_T[rows].to(logprob_R) * logprob_R).sum()
        return logprob_R, torch.autograd.grad(loss, hidden_RD)[0]

    truth, naive = expected(torch.float64), expected(dtype)
    assert_accurate("logprob", result.logprob_T[rows], naive[0], truth[0], dtype)
    assert_accurate("dhidden", dhidden_TD[rows], naive[1], truth[1], dtype)


def passes(dtype: torch.dtype) -> dict[str, Callable[[], list[Tensor]]]:
    """Forward and backward of every public function: outputs and gradients."""
    wide = make_wide(QWEN, T=2048)
    operands = [each.to(dtype).requires_grad_() for each in (wide.hidden_TD, wide.head_VD)]
    on_cpu = (wide.target_T, wide.sequence_T, wide.rewards_NK)
    beside = (wide.target_T, wide.sequence_T.to(DEVICE), wide.rewards_NK.to(DEVICE))
    policy_T = torch.full((2048,), -11.0)
    policies = {
        "old_logprob_T": policy_T,
        "clip": (0.2, 0.3),
        "sampler_logprob_T": policy_T + 0.1,
        "sampler_cap": 2.0,
        "ref_logprob_T": policy_T.to(DEVICE),
        "kl_coef": 0.1,
        "entropy": True,
        "top1": True,
    }
    weight_T = torch.linspace(-1, 1, 2048).where(wide.sequence_T >= 0, 0)

    def outputs(function: Callable, *rest: Tensor, **options) -> list[Tensor]:
        result = function(*operands, *rest, **options)
        loss = result.loss if hasattr(result, "loss") else sum(each.sum() for each in result)
        kept = [each.detach() for each in result if each is not None]
        return [*kept, *torch.autograd.grad(loss, operands)]

    def weights() -> list[Tensor]:
        advantages_NK = group_advantages(beside[2])
        return [advantages_NK, sequence_weights(advantages_NK)]

    return {
        "grao": lambda: outputs(linear_grao_loss, *on_cpu),
        "grao, rewards on the device": lambda: outputs(linear_grao_loss, *beside),
        "grao, off policy": lambda: outputs(linear_grao_loss, *on_cpu, **policies),
        "weighted": lambda: outputs(linear_weighted_cross_entropy, wide.target_T, weight_T),
        "logprobs": lambda: outputs(linear_logprobs, wide.target_T, entropy=True),
        "advantages": weights,
    }


@every_dtype
def test_same_bits_from_run_to_run(dtype: torch.dtype) -> None:
    """Also where memory is handed out anew in between."""
    for name, function in passes(dtype).items():
        first = [each.nan_to_num(7) for each in function()]
        for _ in range(2):
            gc.collect()
            torch.cuda.empty_cache()
            again = [each.nan_to_num(7) for each in function()]
            assert all(map(torch.equal, first, again)), name


@every_dtype
def test_the_host_never_waits(dtype: torch.dtype) -> None:
    for name, function in passes(dtype).items():
        function()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        except RuntimeError as error:
            pytest.fail(f"{name}: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Head(nn.Module):
    """A head with its loss, as a trainer would compile it."""

    def __init__(self, wide: Problem, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_TD = nn.Parameter(wide.hidden_TD.to(dtype))
        self.head_VD = nn.Parameter(wide.head_VD.to(dtype))

    def forward(self, *rest: Tensor):
        return linear_grao_loss(self.hidden_TD, self.head_VD, *rest, entropy=True, top1=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    wide = make_wide(QWEN, T=2048)
    head = Head(wide, dtype)

    def step(forward: Callable) -> list[Tensor]:
        head.zero_grad()
        result = forward(wide.target_T, wide.sequence_T, wide.rewards_NK)
        result.loss.backward()
        kept = [each.detach() for each in result if each is not None]
        return [each.nan_to_num(7) for each in (*kept, head.hidden_TD.grad, head.head_VD.grad)]

    eager = step(head)
    torch._dynamo.reset()
    found = step(torch.compile(head, fullgraph=True, backend=backend))
    assert all(each.any() for each in eager[:1] + eager[-2:])
    assert all(map(torch.equal, found, eager))
