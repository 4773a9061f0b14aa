"""Dtypes for tests of operators and compilers, which take seconds each: one by default."""

from __future__ import annotations

import pytest
import torch

ONE_BY_DEFAULT = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.slow),
    pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
]
