"""The host never waits for a device, and rows beyond 2^31 elements are addressed correctly.

A tensor on `meta` has no values, so that code which would read one fails; code that runs there
waits for nothing. The products of `gemm.py` that only CUDA has run in test_gpu_kernels.py.
"""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from problem import make_problem
from test_rows import expected_rows, row_function
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import linear_grao_loss, linear_weighted_cross_entropy
from grao_fast.kernels.checks import logit_constants
from grao_fast.kernels.one_pass import loop as one_pass
from grao_fast.kernels.one_pass import ops
from grao_fast.kernels.one_pass.options import PassInputs, PassOptions
from grao_fast.kernels.rows.contract import RowInputs

OFF_POLICY = {
    "old_logprob_T": torch.zeros(24),
    "clip": (0.2, 0.2),
    "sampler_logprob_T": torch.zeros(24),
    "sampler_cap": 2.0,
    "ref_logprob_T": torch.zeros(24),
    "kl_coef": 0.1,
    "reference_advantage": "tapered",
    "entropy": True,
    "top1": True,
}
CONSTANTS = logit_constants(0.7, 2.0, 5.0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    problem = make_problem()
    hidden_TD = problem.hidden_TD.to("meta", dtype).requires_grad_()
    head_VD = problem.head_VD.to("meta", dtype).requires_grad_()
    return hidden_TD, head_VD, problem.target_T.to("meta")


@pytest.fixture(autouse=True)
def no_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the operator's own code, as its fake would answer for a tensor on meta."""

    def run(*arguments):
        inputs, options = PassInputs.from_flat(arguments), PassOptions.from_flat(arguments)
        return ops.run_policy_loss(inputs, options)

    monkeypatch.setattr(ops, "policy_loss", run)


@pytest.mark.parametrize("rewards_on", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, OFF_POLICY], ids=["plain", "off_policy"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_grao_loss_waits_for_nothing(dtype: torch.dtype, options: dict, rewards_on: str) -> None:
    problem = make_problem()
    group = (problem.sequence_T.to(rewards_on), problem.rewards_NK.to(rewards_on))
    hidden_TD, head_VD, target_T = operands(dtype)
    buffer = torch.zeros_like(head_VD, dtype=torch.float32)
    small = {"workspace_mib": 0.02}  # several chunks
    linear_grao_loss(hidden_TD, head_VD, target_T, *group, **small, **options).loss.backward()
    result = linear_grao_loss(
        hidden_TD, head_VD, target_T, *group, head_grad_VD=buffer, **small, **options
    )
    result.loss.backward()
    assert hidden_TD.grad is not None and head_VD.grad is not None


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights_on", ["cpu", "meta"])
def test_the_pass_waits_for_nothing(dtype: torch.dtype, weights_on: str) -> None:
    """As linear_policy_loss calls it, and as both passes of linear_logprobs do."""
    hidden_TD, head_VD, target_T = (x.detach() for x in operands(dtype))
    bias_V = torch.zeros(257, device="meta")
    weight_T = torch.linspace(-1, 1, 24).where(torch.arange(24) % 5 > 0, 0).to(weights_on)
    inputs = PassInputs(hidden_TD, head_VD, bias_V, target_T, torch.ones(1, 24))
    forward = PassOptions(CONSTANTS, 20000, "torch", dtype, entropy=True)
    result = one_pass.one_pass(inputs, forward)
    assert result.logprob_T.shape == result.entropy_T.shape == (24,)
    backward = forward._replace(wants=(True,) * 3)
    inputs = inputs._replace(terms_CT=weight_T[None], entropy_weight_T=weight_T.flip(0))
    result = one_pass.one_pass(inputs, backward)
    gradients = result.gradients
    assert gradients.hidden_TD.shape == (24, 17) and gradients.head_VD.shape == (257, 17)


def test_a_look_at_a_value_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above fail if a value is read."""
    sums = one_pass._sums

    def nosy(rows, logprob_L):
        return sums(rows, logprob_L.mul(logprob_L.amax().item()))

    monkeypatch.setattr(one_pass, "_sums", nosy)
    hidden_TD, head_VD, target_T = operands(torch.float32)
    with pytest.raises(RuntimeError, match="meta"):
        linear_weighted_cross_entropy(hidden_TD, head_VD, target_T, torch.ones(24))


@pytest.mark.skipif(sys.platform != "linux", reason="memory that is reserved and not there: Linux")
def test_slab_of_more_than_2_31_logits(backend: str, device: str) -> None:
    """Three rows, of which the last begins beyond 2^31 elements."""
    R, V, stride = 3, 300, 2**30 + 64
    elements = (R - 1) * stride + 320
    assert (R - 1) * stride > 2**31
    if device == "cpu":
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        slab = torch.frombuffer(mmap.mmap(-1, 4 * elements, flags=flags), dtype=torch.float32)
    else:
        slab = torch.empty(elements, device=device)
    logits_RV = slab.as_strided((R, V), (stride, 1))
    x_RV = torch.randn(R, V, generator=torch.Generator().manual_seed(0))
    logits_RV.copy_(x_RV)
    target_R, weight_R = torch.tensor([5, 299, 0]), torch.tensor([1.0, -2.0, 3.0])
    logprob_R = torch.full((R,), torch.nan, device=device)
    row_function(backend)(
        logits_RV,
        logits_RV,
        None,
        RowInputs(target_R.to(device), weight_R.to(device)),
        logprob_R,
    )
    truth = expected_rows(x_RV, target_R, weight_R, torch.float64)
    naive = expected_rows(x_RV, target_R, weight_R, torch.float32)
    assert_accurate("logprob", logprob_R, naive[0], truth[0], torch.float32)
    assert_accurate("dlogits", logits_RV, naive[1], truth[1], torch.float32)
