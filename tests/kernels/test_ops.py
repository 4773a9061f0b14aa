"""The operators of torch.library: their fakes and gradients, and compiled code around them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from problem import Problem, make_problem
from slow_dtypes import ONE_BY_DEFAULT
from torch import Tensor, nn

from grao_fast.kernels import linear_grao_loss, linear_weighted_cross_entropy
from grao_fast.kernels.one_pass import ops
from grao_fast.kernels.one_pass.options import PassInputs, PassOptions
from grao_fast.kernels.rows.contract import LogitConstants
from grao_fast.kernels.rows.forms import FormRows


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def pass_arguments(
    dtype: torch.dtype, backend: str, device: str, wants: list[bool], off_policy: bool = False
) -> tuple:
    """Every row is live, as opcheck takes NaN, the log-prob of a dead row, to differ from NaN."""
    problem = make_problem(T=6, D=5, V=11, bias=True)
    hidden_TD, head_VD, bias_V = (
        x.to(device, dtype).requires_grad_(wanted)
        for x, wanted in zip(
            (problem.hidden_TD, problem.head_VD, problem.bias_V), wants, strict=True
        )
    )
    terms_CT = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    target_T = problem.target_T.to(device)
    options = PassOptions(
        LogitConstants(1.3, 0.5, 2.6),
        2000,
        backend,
        dtype,
        entropy=off_policy,
        top1=off_policy,
        wants=tuple(wants),
    )
    inputs = PassInputs(hidden_TD, head_VD, bias_V, target_T, terms_CT)
    if off_policy:
        constants_PT = torch.linspace(-3, -2, 24, device=device).reshape(4, 6)
        constants_PT[3, ::2] = 0  # the other rows are shaped
        kl_coef_T = torch.linspace(0, 1, 6)
        rows = FormRows("truncated", "chord", constants_PT, kl_coef_T, 0.8, 1.2, 2.0)
        inputs = inputs._replace(forms=rows)
    return *inputs.flat(), *options.flat()


@pytest.mark.parametrize("wants", [[True, True, True], [True, False, False], [False] * 3])
@pytest.mark.parametrize("dtype", ONE_BY_DEFAULT)
def test_opcheck_of_the_pass(dtype, wants, backend, device) -> None:
    arguments = pass_arguments(dtype, backend, device, wants, off_policy=wants[0])
    torch.library.opcheck(torch.ops.grao_fast.policy_loss.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_prompts", [None, 7.5])
def test_opcheck_of_the_coefficients(num_prompts: float | None, dtype: torch.dtype) -> None:
    problem = make_problem()
    rewards_NK = problem.rewards_NK.to(dtype)
    options = (0.5, 0.6, "group", "signed", num_prompts, 0.1)
    torch.library.opcheck(
        torch.ops.grao_fast.grao_terms.default, (rewards_NK, problem.sequence_T, *options)
    )


class Model(nn.Module):
    """Both losses after a layer, as a trainer would compile them."""

    def __init__(self, problem: Problem, dtype: torch.dtype, device: str, backend: str) -> None:
        super().__init__()
        self.hidden_TD = nn.Parameter(problem.hidden_TD.to(device, dtype))
        self.head_VD = nn.Parameter(problem.head_VD.to(device, dtype))
        self.bias_V = nn.Parameter(problem.bias_V.to(device, dtype))
        self.options = problem.options | {"bias_V": self.bias_V, "backend": backend}
        self.off_policy = {
            "old_logprob_T": torch.linspace(-9, -3, 24),
            "clip": (0.2, 0.3),
            "ref_logprob_T": torch.linspace(-3, -9, 24, device=device),
            "kl_coef": 0.01,
            "entropy": True,
            "top1": True,
        }
        # Triton's interpreter truncates to bfloat16 where a GPU rounds, so use exact products.
        self.scale = 2.0 if backend == "triton" and device == "cpu" else 1.7

    def forward(self, target_T: Tensor, sequence_T: Tensor, rewards_NK: Tensor, weight_T: Tensor):
        T = target_T.shape[0]
        hidden_TD = 1.5 * self.hidden_TD[:T]
        args = (hidden_TD, self.head_VD, target_T)
        cut = {k: v[:T] if isinstance(v, Tensor) else v for k, v in self.off_policy.items()}
        grao = linear_grao_loss(*args, sequence_T, rewards_NK, **cut, **self.options)
        weighted = linear_weighted_cross_entropy(*args, weight_T, **self.options)
        return (grao.loss + self.scale * weighted.loss, *grao, *weighted)


def step(model: Model, forward, problem: Problem, T: int = 24) -> list[Tensor]:
    """Outputs and gradients, with 7 for NaN, the log-prob of a dead row."""
    model.zero_grad()
    weight_T = torch.linspace(-1, 1, T).where(torch.arange(T) % 5 > 0, 0)
    target_T, sequence_T = problem.target_T[:T].clone(), problem.sequence_T[:T].clone()
    outputs = forward(target_T.to(model.head_VD.device), sequence_T, problem.rewards_NK, weight_T)
    (model.scale * outputs[0]).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return [each.detach().nan_to_num(7) for each in (*outputs, *gradients)]


def assert_same_bits(ones: list[Tensor], twos: list[Tensor]) -> None:
    for index, (one, two) in enumerate(zip(ones, twos, strict=True)):
        assert one.dtype == two.dtype and torch.equal(one, two), index


@pytest.mark.parametrize("dtype", ONE_BY_DEFAULT)
def test_compiled_module_gives_the_same_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    problem = make_problem(bias=True, temperature=0.7, softcap=5.0)
    model = Model(problem, dtype, device, backend)
    eager = step(model, model, problem)
    assert all(each.any() for each in eager)
    assert_same_bits(step(model, compiled(model), problem), eager)


@pytest.mark.slow
def test_compiled_to_code_gives_the_same_bits() -> None:
    """In float32; in 16 bits the compiler adds the two losses' gradients before rounding them."""
    problem = make_problem(bias=True)
    model = Model(problem, torch.float32, "cpu", "torch")
    eager = step(model, model, problem)
    assert_same_bits(step(model, compiled(model, backend="inductor"), problem), eager)


def test_one_graph_serves_every_length() -> None:
    problem = make_problem(bias=True)
    model = Model(problem, torch.float32, "cpu", "torch")
    forward = compiled(model, dynamic=True)
    step(model, forward, problem, 20)
    with torch.compiler.set_stance("fail_on_recompile"):
        for T in (23, 9, 17):
            assert_same_bits(step(model, forward, problem, T), step(model, model, problem, T))


def test_compiled_without_gradients() -> None:
    problem = make_problem(bias=True)
    model = Model(problem, torch.float32, "cpu", "torch").requires_grad_(False)
    arguments = (problem.target_T, problem.sequence_T, problem.rewards_NK, torch.ones(24))
    with torch.no_grad():
        outputs = compiled(model)(*arguments)
    assert_same_bits(
        [x.nan_to_num(7) for x in outputs], [x.nan_to_num(7) for x in model(*arguments)]
    )
    assert not outputs[0].requires_grad


def test_compiled_under_autocast() -> None:
    problem = make_problem(bias=True)
    model = Model(problem, torch.float32, "cpu", "torch")

    def forward(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(*arguments)

    eager = step(model, forward, problem)
    plain = step(model, model, problem)
    assert not torch.equal(eager[-2], plain[-2])
    assert_same_bits(step(model, compiled(forward), problem), eager)


def test_values_are_refused_when_compiled_too() -> None:
    problem = make_problem(bias=True)
    forward = compiled(Model(problem, torch.float32, "cpu", "torch"))
    sequence_T = problem.sequence_T.clone()
    sequence_T[3] = 99
    with pytest.raises(ValueError, match=r"sequence_T must be in \[-1, 12\), got 99 in row 3"):
        forward(problem.target_T, sequence_T, problem.rewards_NK, torch.ones(24))
    rewards_NK = problem.rewards_NK.clone()
    rewards_NK[1, 2] = math.inf
    with pytest.raises(ValueError, match="got inf for sequence 2 of prompt 1"):
        forward(problem.target_T, problem.sequence_T, rewards_NK, torch.ones(24))


def test_operator_may_be_differentiated_twice_over() -> None:
    """The operator writes to no buffer, so unlike the public functions it may keep its graph."""
    arguments = pass_arguments(torch.float32, "torch", "cpu", [True] * 3)
    loss, *_ = torch.ops.grao_fast.policy_loss(*arguments)
    once = torch.autograd.grad(2 * loss, arguments[:3], retain_graph=True)
    again = torch.autograd.grad(2 * loss, arguments[:3])
    assert all(torch.equal(one, two) and one.any() for one, two in zip(once, again, strict=True))


def test_backward_scales_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that arrives is the buffer that the pass filled, whatever the scale."""
    made: list[Tensor] = []
    policy_loss = ops.policy_loss

    def watched(*arguments):
        outputs = policy_loss(*arguments)
        made.extend(outputs[6:8])
        return outputs

    monkeypatch.setattr(ops, "policy_loss", watched)
    problem = make_problem()
    hidden_TD = problem.hidden_TD.float().requires_grad_()
    head_VD = problem.head_VD.float().requires_grad_()
    loss = linear_weighted_cross_entropy(hidden_TD, head_VD, problem.target_T, torch.ones(24)).loss
    gradients = torch.autograd.grad(3 * loss, (hidden_TD, head_VD))
    for gradient, buffer in zip(gradients, made, strict=True):
        assert gradient.data_ptr() == buffer.data_ptr() and gradient.any()


def test_shapes_without_values() -> None:
    """Under a fake mode, which estimates memory, nothing is computed: this head takes 2 TB."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = make_problem(T=8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        hidden_TD = torch.empty(8, 10**6, dtype=torch.bfloat16, requires_grad=True)
        head_VD = torch.empty(10**6, 10**6, dtype=torch.bfloat16, requires_grad=True)
        result = linear_grao_loss(
            hidden_TD, head_VD, problem.target_T, problem.sequence_T, problem.rewards_NK
        )
    assert result.loss.requires_grad and result.loss.shape == ()
    assert result.logprob_T.shape == (8,) and result.logprob_T.dtype == torch.float32


def test_the_first_call_does_not_import_the_compiler() -> None:
    """Importing it takes over a second; `torch.library.custom_op` would do so."""
    code = (
        "import sys, torch\n"
        "from grao_fast.kernels import linear_weighted_cross_entropy as loss\n"
        "x = [torch.ones(2, 4, requires_grad=True), torch.ones(8, 4), torch.zeros(2).long()]\n"
        "loss(*x, torch.ones(2)).loss.backward()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stdout + result.stderr
