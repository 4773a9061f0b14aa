"""Tells whether Triton's interpreter can run the kernels."""

from __future__ import annotations

import numpy as np
from packaging.version import Version


def interpreter_fault() -> str | None:
    """Why it cannot, or None. Before Triton 3.9 its loops fail with NumPy 2.4 and later."""
    import triton

    if Version(triton.__version__) >= Version("3.9") or Version(np.__version__) < Version("2.4"):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} cannot loop with NumPy {np.__version__}: "
        "pip install 'numpy<2.4'"
    )
