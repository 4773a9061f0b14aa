"""Several processes train as one does: the same samples, and weights equal to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import FAMILY, VARIANTS, differences, run_all

# Of float32 losses and weights of order 1, over a few steps of 1e-3.
ROUNDING = 5e-5

FEW = ["KL, two updates", "nine tenths dead", "refilled", "mixture, odd", "DPO, two updates", "SFT"]


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
def test_two_and_four_processes_train_as_one(tmp_path: Path) -> None:
    of_two = [name for name in VARIANTS if name != "hybrid"]
    of_four = ["tied", "hybrid", "nine tenths dead", "mixture"]
    for size, names in ((1, of_two), (2, of_two), (4, of_four)):
        run_all(names, tmp_path, size, steps=6)
    for size, names in ((2, of_two), (4, of_four)):
        for name in names:
            one = "tied" if name == "hybrid" else name
            check(tmp_path / f"{one} 1", tmp_path / f"{name} {size}")


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
