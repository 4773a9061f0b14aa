"""A slab of more than 2^31 logits: rows beyond that are where they should be.

Shapes: T rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import torch

from grao_fast.kernels import linear_weighted_cross_entropy, reference
from suite.runner import Run, Skipped, free_memory
from suite.widths import assert_accurate

T, D, V = 15000, 64, 151936
# The first rows, those around element 2^31 of the slab, the last ones.
ROWS = [0, 1, 2**31 // V - 1, 2**31 // V, 2**31 // V + 1, T - 2, T - 1]
WORKSPACE_MIB = 16 * 1024


def addressing(run: Run) -> str:
    """All rows in one chunk, in 16 bits with a slab beside the logits', and in float32 in place."""
    if run.device.type != "cuda":
        raise Skipped("needs CUDA")
    checked = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        if run.in_time(name):
            run.report[name] = _check(run.device, dtype)
            checked.append(name)
        free_memory()
    return f"{T} rows x {V} = {T * V / 2**31:.2f} x 2^31 logits in one slab: {', '.join(checked)}"


def _check(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    generator = torch.Generator(device).manual_seed(0)
    hidden_TD = torch.randn(T, D, device=device, generator=generator).to(dtype).requires_grad_()
    head_VD = torch.randn(V, D, device=device, generator=generator).div_(D**0.5).to(dtype)
    target_T = torch.randint(0, V, (T,), device=device, generator=generator)
    weight_T = torch.linspace(0.5, 1.5, T)
    torch.cuda.reset_peak_memory_stats(device)
    result = linear_weighted_cross_entropy(
        hidden_TD, head_VD, target_T, weight_T, workspace_mib=WORKSPACE_MIB
    )
    (dhidden_TD,) = torch.autograd.grad(result.loss, hidden_TD)
    peak = torch.cuda.max_memory_allocated(device)
    assert peak > 4 * T * V, "the rows did not make one slab: nothing was shown"

    def rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_RD = hidden_TD.detach()[ROWS].to(dtype).requires_grad_()
        logprob_R = reference.token_logprobs(hidden_RD, head_VD.to(dtype), target_T[ROWS])
        loss = -(weight_T[ROWS].to(logprob_R) * logprob_R).sum()
        return logprob_R, torch.autograd.grad(loss, hidden_RD)[0]

    truth, naive = rows(torch.float64), rows(dtype)
    assert_accurate("logprob", result.logprob_T[ROWS], naive[0], truth[0], dtype)
    assert_accurate("dhidden", dhidden_TD[ROWS], naive[1], truth[1], dtype)
    return {"peak_gib": peak / 2**30}
