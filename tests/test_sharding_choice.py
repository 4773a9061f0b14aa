"""The sharding that "auto" stands for, at the borders between its answers."""

from __future__ import annotations

import pytest

from grao_fast.distributed.choice import choose_sharding, reduces_once

GIB = 2**30
FITS = 80 * GIB // 2 // 16  # parameters whose 16 bytes each fill half of 80 GiB


def choice(trained: int, frozen_bytes: int = 0, processes: int = 8, per_node: int = 8) -> str:
    return choose_sharding(
        trained,
        frozen_bytes,
        device_memory=80 * GIB,
        processes=processes,
        processes_per_node=per_node,
    )


def test_what_fits_half_a_device_is_not_sharded() -> None:
    assert choice(FITS) == "none"
    assert choice(FITS + 1) == "full"
    assert choice(FITS - 1, frozen_bytes=16) == "none"
    assert choice(FITS - 1, frozen_bytes=17) == "full"


def test_what_fits_half_a_node_is_sharded_within_nodes() -> None:
    assert choice(FITS + 1, processes=16) == "hybrid"
    assert choice(8 * FITS, processes=16) == "hybrid"
    assert choice(8 * FITS + 1, processes=16) == "full"
    assert choice(8 * FITS - 1, frozen_bytes=17, processes=16) == "full"


@pytest.mark.parametrize(
    ("processes", "per_node"), [(8, 8), (4, 8), (12, 8), (2, 8), (16, 16)], ids=str
)
def test_hybrid_needs_several_whole_nodes(processes: int, per_node: int) -> None:
    assert choice(FITS + 1, processes=processes, per_node=per_node) == "full"


def test_nodes_of_one_process_hold_no_more_than_it() -> None:
    assert choice(FITS, processes=4, per_node=1) == "none"
    assert choice(FITS + 1, processes=4, per_node=1) == "full"


def test_one_process_has_nothing_to_share() -> None:
    assert choice(100 * FITS, processes=1, per_node=1) == "none"


def test_gradients_stay_whole_in_a_tenth_of_a_device() -> None:
    most = 80 * GIB // 10 // 4
    assert reduces_once("full", most, device_memory=80 * GIB)
    assert not reduces_once("full", most + 1, device_memory=80 * GIB)
    assert not reduces_once("hybrid", most + 1, device_memory=80 * GIB)
    assert reduces_once("none", most + 1, device_memory=80 * GIB)
