"""Whether Triton's interpreter can run the kernels here."""

from __future__ import annotations

import numpy as np
from packaging.version import Version


def interpreter_fault() -> str | None:
    """Why not. Loops of the interpreter before Triton 3.9 fail with NumPy 2.4 and later."""
    import triton

    if Version(triton.__version__) >= Version("3.9") or Version(np.__version__) < Version("2.4"):
        return None
    return (
        f"the interpreter of Triton {triton.__version__} cannot loop with NumPy {np.__version__}: "
        "pip install 'numpy<2.4'"
    )
