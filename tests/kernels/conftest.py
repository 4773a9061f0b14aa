"""Triton kernels run on a GPU if there is one, else under Triton's interpreter.

The interpreter must be requested before Triton is first imported. If another test imported Triton
first, test_own_process.py runs these tests in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreter import interpreter_fault

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


COMPILER = Path(__file__).with_name("compile_kernels.py")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of compiled code last, since it is compiled meanwhile on another core.

    In the interpreter, float16 repeats bfloat16, and opcheck repeats what it asks of PyTorch's
    backend: both are slow there.
    """
    items.sort(key=is_of_compiled_code)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("backend") == "triton" and not torch.cuda.is_available():
            name = item.name.partition("[")[0]
            if params.get("dtype") == torch.float16 or name.startswith("test_opcheck"):
                item.add_marker(pytest.mark.slow)


def is_of_compiled_code(item: pytest.Item) -> bool:
    return item.path.name == "test_compile.py"


@pytest.fixture(scope="session", autouse=True)
def compile_meanwhile(request: pytest.FixtureRequest) -> None:
    """Start to compile at the first test of this folder, unless pytest-xdist's processes, of which
    one has test_compile.py, occupy the other cores."""
    compiles = any(is_of_compiled_code(item) for item in request.session.items)
    if compiles and not hasattr(request.config, "workerinput"):
        request.getfixturevalue("compiler")


@pytest.fixture(scope="session")
def compiler(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """The process that compiles for test_compile.py.

    Triton keeps what it compiled, by the kernels' source and its own version, in pytest's cache.
    """
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        cache = request.config.cache.mkdir("triton")
    else:
        cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    devices = dict.fromkeys(
        item.callspec.params["target"]
        for item in request.session.items
        if is_of_compiled_code(item)
    )
    command = [sys.executable, "-W", "ignore", str(COMPILER), *devices]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield process
        process.kill()


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.cuda)])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        triton_rows = pytest.importorskip("grao_fast.kernels.rows.triton_rows")
        if not triton_rows.runs_on(torch.device(device_for("triton"))):
            pytest.skip("Triton was imported without its interpreter; see test_own_process.py")
        if not torch.cuda.is_available() and (fault := interpreter_fault()):
            pytest.skip(fault)
    return request.param


def device_for(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def device(backend: str) -> str:
    return device_for(backend)


@pytest.fixture(autouse=True)
def quiet_padding() -> Iterator[None]:
    """Silence numpy's warnings: interpreted kernels compute on padding, which may hold anything."""
    with np.errstate(all="ignore"):
        yield
