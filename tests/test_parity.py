"""Several processes train as one does: the same samples, and weights equal to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import FAMILY, VARIANTS, differences, run_all

# Of float32 losses and weights of order 1, over a few steps of 1e-3.
ROUNDING = 5e-5

FEW = ["KL, two updates", "nine tenths dead", "mixture, odd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity")
    for size in (1, 2):
        run_all(FEW, folder, size, steps=3)
    return folder


@pytest.mark.parametrize("name", FEW)
def test_two_processes_train_as_one(folder: Path, name: str) -> None:
    check(folder / f"{name} 1", folder / f"{name} 2")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_and_four_processes_train_as_one_for_many_steps(tmp_path: Path, name: str) -> None:
    sizes = (1, 4) if name == "hybrid" else (1, 2, 4)
    for size in sizes:
        replaced = {"sharding": "none", "replicas": None} if (name, size) == ("hybrid", 1) else {}
        run_all([name], tmp_path, size, options=replaced)
    for size in sizes[1:]:
        check(tmp_path / f"{name} 1", tmp_path / f"{name} {size}")


@pytest.mark.slow
def test_families_take_the_same_step_in_two_processes(tmp_path: Path) -> None:
    for size in (1, 2):
        run_all(list(FAMILY), tmp_path, size, steps=1)
    for name in FAMILY:
        check(tmp_path / f"{name} 1", tmp_path / f"{name} 2")


def check(one: Path, other: Path) -> None:
    off = differences(one, other)
    assert off["samples"] == 0
    assert off["reward"] == 0
    assert off["loss"] <= ROUNDING
    assert off["grad_norm"] <= ROUNDING
    assert off["weights"] <= ROUNDING
