"""Forms of a row's own log-prob: ratios and shapings, as functions and in linear_policy_loss."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from calls import row_functions
from problem import make_problem
from tolerance import assert_accurate
from torch import Tensor

from grao_fast.kernels import OffPolicy, Shaping, linear_policy_loss, reference
from grao_fast.kernels.checks import logit_constants
from grao_fast.kernels.rows.contract import RowInputs, RowOutputs
from grao_fast.kernels.rows.forms import (
    RATIOS,
    SHAPINGS,
    FormRows,
    row_coefficient,
    row_value,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = [(ratio, None) for ratio in RATIOS] + list(product(RATIOS, SHAPINGS))
IS_MULTIPLIED = pytest.mark.parametrize("multiplied", [False, True], ids=["kl", "rho_kl"])
LOW, HIGH, CAP = 0.8, 1.2, 2.0


def form_rows(ratio: str, shaping: str | None, multiplied: bool, logprob_R: Tensor) -> FormRows:
    """Ratios on both sides of the bounds. multiplied: the KL too is multiplied by them."""
    constants_PR = logprob_R + torch.tensor([[0.1], [-0.3], [0.6]]).to(logprob_R)
    constants_PR[0, ::3] = logprob_R[::3] - 0.9
    constants_PR[0, ::5] = math.nan
    if shaping is not None:
        shaped_R = (torch.arange(len(logprob_R)) % 2 == 0).to(logprob_R)
        constants_PR = torch.cat([constants_PR, shaped_R[None]])
    kl_coef_R = torch.linspace(-0.1, 0.2, len(logprob_R)).to(logprob_R)
    return FormRows(ratio, shaping, constants_PR.detach(), kl_coef_R, LOW, HIGH, CAP, multiplied)


def specified(weight_R: Tensor, logprob_R: Tensor, rows: FormRows) -> Tensor:
    """Each row's part of the objective, by the specification."""
    old_R, sampler_R, ref_R = rows.constants_PR[:3]
    value_R = reference.surrogate(
        logprob_R, old_R, sampler_R, weight_R, clip=(0.2, 0.2), sampler_cap=CAP, ratio=rows.ratio
    )
    if rows.shaping is not None:
        shaped_R = reference.shaped(logprob_R, rows.shaping)
        value_R = torch.where(rows.constants_PR[3] != 0, shaped_R, value_R)
        old_R = old_R.masked_fill(rows.constants_PR[3] != 0, math.nan)
    kl_R = reference.k3(logprob_R, ref_R, old_R if rows.kl_times_ratio else None)
    return weight_R * value_R - rows.kl_coef_R * kl_R


@IS_MULTIPLIED
@pytest.mark.parametrize("ratio, shaping", FORMS)
def test_value_and_coefficient_are_those_of_the_specification(ratio, shaping, multiplied) -> None:
    logprob_R = torch.linspace(-5, -0.01, 60, dtype=torch.float64).requires_grad_()
    weight_R = torch.linspace(-1, 2, 60, dtype=torch.float64)
    rows = form_rows(ratio, shaping, multiplied, logprob_R)
    expected_R = specified(weight_R, logprob_R, rows)
    value_R, kl_R = row_value(weight_R, logprob_R, rows)
    torch.testing.assert_close(weight_R * value_R - rows.kl_coef_R * kl_R, expected_R)
    (slope_R,) = torch.autograd.grad(expected_R.sum(), logprob_R)
    torch.testing.assert_close(row_coefficient(weight_R, logprob_R.detach(), rows), slope_R)


def potential(name: str, logprob_R: Tensor, old_R: Tensor, weight_R: Tensor) -> Tensor:
    """What has the form's coefficient as its derivative; without a constant, unlike the value."""
    p_R, rho_R = logprob_R.exp(), (logprob_R - old_R).exp()
    if name == "clipped":
        return torch.where(weight_R > 0, rho_R.clamp(max=HIGH), rho_R.clamp(min=LOW))
    if name == "truncated":  # beyond a bound, the bound times logp
        inside_R = rho_R.clamp(LOW, HIGH)
        return inside_R + inside_R * (logprob_R - old_R - inside_R.log())
    return {
        "dft": p_R,
        "chord": p_R - p_R.square() / 2,
        "luffy": p_R / (p_R + 0.1),
    }[name]


class Potential(torch.autograd.Function):
    """A form's potential, whose derivative is said to be the form's coefficient."""

    @staticmethod
    def forward(ctx, logprob_R, name, old_R, weight_R):
        ctx.save_for_backward(logprob_R, old_R, weight_R)
        ctx.name = name
        return weight_R * potential(name, logprob_R, old_R, weight_R)

    @staticmethod
    def backward(ctx, grad_R):
        logprob_R, old_R, weight_R = ctx.saved_tensors
        shaping = ctx.name if ctx.name in SHAPINGS else None
        constants_PR = torch.stack([old_R, *[torch.full_like(old_R, math.nan)] * 2])
        if shaping:
            constants_PR = torch.cat([constants_PR, torch.ones_like(old_R)[None]])
        ratio = "clipped" if shaping else ctx.name
        rows = FormRows(ratio, shaping, constants_PR, torch.zeros_like(old_R), LOW, HIGH, math.inf)
        return grad_R * row_coefficient(weight_R, logprob_R, rows), None, None, None


@pytest.mark.parametrize("name", [*RATIOS, *SHAPINGS])
def test_gradcheck_of_each_form(name: str) -> None:
    logprob_R = torch.linspace(-7, -0.01, 29, dtype=torch.float64).requires_grad_()
    steps_R = torch.tensor([0.5, 0.03, -0.6], dtype=torch.float64).repeat(10)[:29]
    weight_R = torch.linspace(-1, 2, 29, dtype=torch.float64)
    old_R = (logprob_R - steps_R).detach()
    assert torch.autograd.gradcheck(Potential.apply, (logprob_R, name, old_R, weight_R))


@IS_MULTIPLIED
@pytest.mark.parametrize("ratio, shaping", FORMS)
def test_row_functions_apply_each_form(
    ratio, shaping, multiplied, backend: str, device: str
) -> None:
    """dlogits is proportional to the coefficient, which the kernel computes by itself."""
    R, V = 12, 64
    logits_RV = 3 * torch.randn(R, V, generator=torch.Generator().manual_seed(0))
    target_R, weight_R = torch.arange(R), torch.linspace(-1, 2, R)
    logprob_R = logits_RV.log_softmax(1)[target_R, target_R]
    rows = form_rows(ratio, shaping, multiplied, logprob_R)
    expected_RV = row_coefficient(weight_R, logprob_R, rows)[:, None] * logits_RV.softmax(1)
    rows = rows._replace(
        constants_PR=rows.constants_PR.to(device), kl_coef_R=rows.kl_coef_R.to(device)
    )
    inputs = RowInputs(target_R.to(device), weight_R.to(device), forms=rows)
    logprob_R, target_grad_R = torch.empty(2, R, device=device)
    slab, outputs = logits_RV.to(device), RowOutputs(logprob_R, target_grad_R=target_grad_R)
    constants = logit_constants(1.0, 1.0, None)
    row_functions(backend).policy_rows(slab, slab, None, inputs, outputs, constants)
    slab[target_R, target_R] = expected_RV[target_R, target_R].to(device)  # see TargetGradient
    torch.testing.assert_close(slab.cpu(), expected_RV, rtol=1e-5, atol=1e-6)


# A row's logits reach 200: targets have p from 1 - 1e-7 down to what underflows, even to 0.
T, V = 24, 257
PROBLEM = make_problem(T=T, V=V, bias=True)
BIAS = PROBLEM.bias_V.clone()
BIAS[:3] = torch.tensor([20.0, -60.0, -200.0])
TARGET = PROBLEM.target_T.clone()
TARGET[1:13] = torch.arange(12) % 3
WEIGHT = torch.linspace(-1, 1, T, dtype=torch.float64).where(torch.arange(T) % 6 > 0, 0)
SHAPED = torch.arange(T) % 4 != 2


def inputs_of(dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in (PROBLEM.hidden_TD, PROBLEM.head_VD, BIAS)]


def given_for(
    ratio: str, shaping: str | None, multiplied: bool = True
) -> tuple[OffPolicy, Shaping | None]:
    logprob_T = reference.token_logprobs(
        PROBLEM.hidden_TD, PROBLEM.head_VD, TARGET, bias_V=BIAS
    ).float()
    steps_T = torch.tensor([0.1, -0.5, 0.5, math.nan]).repeat(T // 4)
    off_policy = OffPolicy(
        old_logprob_T=logprob_T + steps_T.roll(1),
        sampler_logprob_T=logprob_T + steps_T,
        ref_logprob_T=logprob_T + steps_T.roll(2),
        kl_coef_T=torch.linspace(0, 0.2, T).where(torch.arange(T) % 3 > 0, 0),
        clip=(0.2, 0.3),
        sampler_cap=1.2,
        ratio=ratio,
        kl_times_ratio=multiplied,
    )
    return off_policy, None if shaping is None else Shaping(shaping, SHAPED)


def results(function, dtype: torch.dtype, device: str, **options) -> dict[str, Tensor]:
    hidden_TD, head_VD, bias_V = (x.to(device).requires_grad_() for x in inputs_of(dtype))
    loss, terms_C, kl, logprob_T = function(hidden_TD, head_VD, bias_V, **options)
    loss.backward()
    return {
        # The loss may be far smaller than its terms, so all are compared as one vector.
        "sums": torch.stack([loss, *terms_C, kl]).detach(),
        "logprob": logprob_T.detach(),
        "dhidden": hidden_TD.grad,
        "dhead": head_VD.grad,
        "dbias": bias_V.grad,
    }


def terms() -> Tensor:
    return torch.stack([0.25 * WEIGHT, 0.75 * WEIGHT])


def formula(hidden_TD, head_VD, bias_V, off_policy: OffPolicy, shaping: Shaping | None):
    """linear_policy_loss as documented, in the operands' dtype; dead rows are not computed."""
    live_T = (WEIGHT != 0) | (off_policy.kl_coef_T != 0)
    dtype, weight_T = hidden_TD.dtype, WEIGHT[live_T].to(hidden_TD.dtype)
    old_T, sampler_T, ref_T, kl_coef_T = (x[live_T].to(dtype) for x in off_policy[:4])
    logprob_T = reference.token_logprobs(hidden_TD[live_T], head_VD, TARGET[live_T], bias_V=bias_V)
    weighs_T = weight_T != 0
    value_T = reference.surrogate(
        logprob_T,
        old_T,
        sampler_T,
        torch.where(weighs_T, weight_T, 1),
        clip=off_policy.clip,
        sampler_cap=off_policy.sampler_cap,
        ratio=off_policy.ratio,
    )
    if shaping is not None:
        shaped_T = reference.shaped(logprob_T, shaping.form)
        value_T = torch.where(shaping.rows_T[live_T], shaped_T, value_T)
        old_T = old_T.masked_fill(shaping.rows_T[live_T], math.nan)
    terms_C = (terms()[:, live_T].to(dtype) * torch.where(weighs_T, value_T, 0)).sum(1)
    kl_T = reference.k3(logprob_T, ref_T, old_T if off_policy.kl_times_ratio else None)
    kl = (kl_coef_T * kl_T).sum()
    all_T = torch.full_like(WEIGHT, math.nan, dtype=dtype)
    all_T[live_T] = logprob_T.detach()
    return kl - terms_C.sum(), terms_C, kl, all_T


def ours(hidden_TD, head_VD, bias_V, off_policy, shaping, backend, **options):
    result = linear_policy_loss(
        hidden_TD,
        head_VD,
        TARGET.to(hidden_TD.device),
        terms().float(),
        off_policy=off_policy,
        shaping=shaping,
        bias_V=bias_V,
        backend=backend,
        workspace_mib=0.02,
        **options,
    )
    return result[:4]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "ratio, shaping, multiplied",
    [
        ("clipped", None, True),
        ("truncated", None, False),
        *product(["truncated"], SHAPINGS, [True]),
    ],
)
def test_matches_specification(ratio, shaping, multiplied, dtype, backend, device) -> None:
    """Ratios, shaped rows and dead ones together; from the same operands in `dtype`."""
    off_policy, shape = given_for(ratio, shaping, multiplied)
    options = {"off_policy": off_policy, "shaping": shape}
    truth = results(
        lambda *args, **kw: formula(*(x.double() for x in args), **kw), dtype, "cpu", **options
    )
    naive = results(formula, dtype, "cpu", **options)
    actual = results(ours, dtype, device, backend=backend, **options)
    for name, expected in truth.items():
        assert_accurate(name, actual[name], naive[name], expected, dtype)


def test_all_rows_shaped_and_nothing_else(backend: str, device: str) -> None:
    """Without rows_T, and without any log-prob given."""
    args = [x.to(device) for x in (*inputs_of(torch.float32)[:2], TARGET)]
    rows = {"bias_V": BIAS.float().to(device), "backend": backend}
    for form in SHAPINGS:
        every_T = torch.ones(T, dtype=torch.bool)
        one, two = (
            linear_policy_loss(*args, terms().float(), shaping=Shaping(form, rows_T), **rows)
            for rows_T in (None, every_T)
        )
        expected_T = reference.shaped(one.logprob_T.double().cpu(), form)
        expected = -(WEIGHT.float().double() * expected_T)[WEIGHT != 0].sum()
        torch.testing.assert_close(one.loss.cpu().double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(one.loss, two.loss) and one.loss != 0


def test_what_a_shaped_row_holds_for_a_ratio_has_no_effect(backend: str, device: str) -> None:
    off_policy, shaping = given_for("truncated", "dft")
    results_of = []
    for rubbish in (math.nan, math.inf, -1.0):
        changed = {
            name: torch.where(SHAPED, rubbish, getattr(off_policy, name))
            for name in ("old_logprob_T", "sampler_logprob_T")
        }
        given = {"off_policy": off_policy._replace(**changed), "shaping": shaping}
        results_of.append(results(ours, torch.float32, device, backend=backend, **given))
    for name, expected in results_of[0].items():
        for other in results_of[1:]:
            assert torch.equal(other[name].nan_to_num(7), expected.nan_to_num(7)), name


def test_an_impossible_token_is_left_alone(backend: str, device: str) -> None:
    """Its p is 0 and its log-prob -inf: neither value nor gradient is NaN."""
    bias_V = BIAS.float().to(device)
    bias_V[2] = -math.inf
    impossible_T = torch.where(TARGET == 2, WEIGHT, 0).float()
    assert impossible_T.any()
    for form in SHAPINGS:
        hidden_TD, head_VD = (x.to(device).requires_grad_() for x in inputs_of(torch.float32)[:2])
        result = linear_policy_loss(
            hidden_TD,
            head_VD,
            TARGET.to(device),
            impossible_T[None],
            shaping=Shaping(form),
            bias_V=bias_V,
            backend=backend,
        )
        result.loss.backward()
        assert result.loss == 0 and not hidden_TD.grad.any() and not head_VD.grad.any()


def test_compiled_gives_the_same_bits() -> None:
    off_policy, shaping = given_for("truncated", "luffy")
    given = {"off_policy": off_policy, "shaping": shaping, "backend": "torch"}
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, graph = (results(f, torch.float32, "cpu", **given) for f in (ours, compiled))
    for name, expected in eager.items():
        assert torch.equal(graph[name].nan_to_num(7), expected.nan_to_num(7)), name


OLD = OffPolicy(old_logprob_T=torch.zeros(T))
BAD = {
    "ratio": (OLD._replace(ratio="cispo"), None, "ratio must be one of clipped, truncated; got"),
    "form": (None, Shaping("phi"), "form must be one of dft, chord, luffy; got 'phi'"),
    "all_rows_and_old": (OLD, Shaping("dft"), "old_logprob_T has no effect where all rows are"),
    "length": (None, Shaping("dft", SHAPED[1:]), r"rows_T must be \(24,\), got \(23,\)"),
    "dtype": (OLD, Shaping("dft", WEIGHT), "rows_T must be bool, got torch.float64"),
    "device": (OLD, Shaping("dft", SHAPED.to("meta")), "rows_T must be on the CPU or beside"),
}


@pytest.mark.parametrize("off_policy, shaping, message", BAD.values(), ids=BAD)
def test_refused_by_name(off_policy, shaping, message: str) -> None:
    hidden_TD, head_VD, bias_V = inputs_of(torch.float32)
    with pytest.raises(ValueError, match=message):
        ours(hidden_TD, head_VD, bias_V, off_policy, shaping, "torch")
