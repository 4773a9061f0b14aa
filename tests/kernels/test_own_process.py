"""Tests that need a process of their own: of imports, and of Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_triton_the_torch_backend_works_and_the_other_says_why() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "sys.meta_path.insert(0, type('NoTriton', (), {'find_spec': staticmethod(\n"
        "    lambda name, *_: (_ for _ in ()).throw(ModuleNotFoundError(name))\n"
        "    if name.startswith('triton') else None)}))\n"
        "import torch\n"
        "from grao_fast.kernels import linear_weighted_cross_entropy as loss\n"
        "x = [torch.ones(2, 4), torch.ones(8, 4), torch.zeros(2).long(), torch.ones(2)]\n"
        "print(round(loss(*x).loss.item(), 4))\n"
        "try:\n"
        "    loss(*x, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    result = python("-c", code)
    value, message = result.stdout.strip().splitlines() or ["", result.stderr]
    assert value == "4.1589"  # 2 log 8
    assert "Triton, which is not installed" in message and "backend='torch'" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
def test_triton_on_cpu_tensors_names_the_remedy() -> None:
    code = (
        "import torch\n"
        "from grao_fast.kernels import linear_weighted_cross_entropy as loss\n"
        "x = [torch.ones(2, 4), torch.ones(8, 4), torch.zeros(2).long(), torch.ones(2)]\n"
        "try:\n"
        "    loss(*x, backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    pytest.importorskip("triton")
    message = python("-c", code).stdout
    assert "cannot run on cpu" in message and "TRITON_INTERPRET=1" in message


def test_interpreter_where_triton_came_too_early() -> None:
    pytest.importorskip("triton")
    from grao_fast.kernels.rows import triton_rows

    if triton_rows.runs_on(torch.device("cpu")) or torch.cuda.is_available():
        return  # this process runs the triton cases of this folder
    files = [str(path) for path in HERE.glob("test_*.py") if path.name != Path(__file__).name]
    result = python("-m", "pytest", "-q", "-k", "triton", *files, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:]
