"""Measures the row kernel by itself: bytes a second against a copy on the same device.

Shapes: R rows of a slab, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from grao_fast.kernels.checks import logit_constants
from grao_fast.kernels.rows.contract import RowInputs, RowOutputs
from suite.facts import copy_rate, median_seconds
from suite.runner import Run, free_memory

# As in the kernel's docstring: a row is read twice and its gradient written once.
BYTES_A_LOGIT = {torch.bfloat16: 10, torch.float32: 12}
# Of float32 logits; with a 16-bit gradient beside them, the default workspace.
SLAB_BYTES = 340 * 2**20


def rows(run: Run) -> str:
    """Time one launch on slabs of the default workspace, over vocabularies and dtypes."""
    copy = copy_rate(run)
    run.report["copy_gb_per_s"] = copy / 1e9
    free_memory()
    headlines = []
    for V in (257, 1031) if run.tiny else (49152, 128256, 151936, 262144):
        for dtype in BYTES_A_LOGIT:
            name = f"V={V} {str(dtype).removeprefix('torch.')}"
            if not run.in_time(name):
                continue
            figures = run.report[name] = _measure(run, V, dtype, copy)
            if dtype == torch.bfloat16:
                headlines.append(f"V={V} {figures['share_of_copy']:.2f}")
            free_memory()
    return "of the copy's rate, 16 bits: " + ", ".join(headlines)


def _measure(run: Run, V: int, dtype: torch.dtype, copy: float) -> dict[str, Any]:
    """Measure one case; in float32 the gradient overwrites the logits, as in the pass."""
    if run.device.type == "cuda":
        from grao_fast.kernels.rows.triton_rows import policy_rows
    else:
        from grao_fast.kernels.rows.torch_rows import policy_rows
    stride = -(-V // 64) * 64
    R = 8 if run.tiny else SLAB_BYTES // (4 * stride)
    logits_RS = torch.randn(R, stride, device=run.device)
    dlogits_RS = logits_RS if dtype == torch.float32 else torch.empty_like(logits_RS, dtype=dtype)
    target_R = torch.randint(0, V, (R,), device=run.device)
    weight_R = torch.randn(R, device=run.device)
    logprob_R, target_grad_R = torch.empty(2, R, device=run.device)
    inputs = RowInputs(target_R, weight_R)
    outputs = RowOutputs(logprob_R, target_grad_R=target_grad_R)
    constants = logit_constants(1.0, 1.0, None)

    def launch() -> None:
        policy_rows(logits_RS[:, :V], dlogits_RS[:, :V], None, inputs, outputs, constants)

    took = median_seconds(run, launch, calls=2 if run.tiny else 20, rounds=5)
    counted = BYTES_A_LOGIT[dtype] * R * V
    return {
        "rows": R,
        "microseconds": took * 1e6,
        "gb_per_s": counted / took / 1e9,
        "share_of_copy": counted / took / copy,
        # At the rate of a copy: less than counted where the second read hits the L2.
        "bytes_a_logit_by_time": took * copy / (R * V),
    }
