"""The package of the kernels for a hub, loaded by Hugging Face's `kernels`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "hub_kernel.py"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout")

# Loads the package beside the installed kernels, and compares them.
COMPARE = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
from grao_fast import kernels as installed

loaded = get_local_kernel(Path(sys.argv[1]))
assert Path(loaded.__file__).is_relative_to(sys.argv[1]), loaded.__file__
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(6, 8, generator=generator)
head = torch.randn(11, 8, generator=generator)
target = torch.arange(6)
sequence = torch.tensor([0, 0, 1, 1, 2, 2])
rewards = torch.tensor([[0.2, 0.9, 0.5]])
values = []
for module in (loaded, installed):
    operands = [each.clone().requires_grad_() for each in (hidden, head)]
    loss = module.linear_grao_loss(*operands, target, sequence, rewards).loss
    values.append([loss, *torch.autograd.grad(loss, operands)])
for one, other in zip(*values, strict=True):
    assert torch.equal(one, other)
namespace = loaded.__name__
assert getattr(torch.ops, namespace).policy_loss is not torch.ops.grao_fast.policy_loss
print(namespace)
"""


def write(folder: Path) -> Path:
    spec = importlib.util.spec_from_file_location("hub_kernel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_package(folder)


def test_the_package_is_written_from_the_kernels(tmp_path: Path) -> None:
    variant = write(tmp_path / "package")
    of_package = {p.relative_to(variant) for p in variant.rglob("*.py")}
    assert of_package == {p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("*.py")}
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["id"].isidentifier()
    again = write(tmp_path / "again")
    assert (again / "metadata.json").read_text() == (variant / "metadata.json").read_text()
    assert "linear_grao_loss" in (tmp_path / "package" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(FileExistsError, match="is not empty: name a new folder"):
        write(tmp_path / "package")


def test_the_kernels_library_loads_it_beside_the_installed_one(tmp_path: Path) -> None:
    # By a process of its own, since a checkout's `kernels/` may stand in for the library here.
    if importlib.util.find_spec("kernels._rust") is None:
        pytest.skip("needs Hugging Face's kernels")
    write(tmp_path / "package")
    run = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path / "package")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("_grao_fast_")


def test_operators_are_named_after_the_package() -> None:
    from grao_fast.kernels.one_pass import ops

    assert ops.NAMESPACE == "grao_fast"
    assert torch.ops.grao_fast.policy_loss.default is ops.policy_loss
