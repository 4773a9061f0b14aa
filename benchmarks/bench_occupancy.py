"""Measures time and memory where prompt rows and groups of equal rewards do not count.

    pytest benchmarks/bench_occupancy.py --benchmark-only

All shares take turns in one race. The floor is that of all rows.
"""

from __future__ import annotations

import pytest
from batches import DEVICE, DTYPES, SHAPES, SIZE, batch_facts, make_batch
from measure import measure
from peers import PEERS
from replay import clock, report

SHARES = (1.0, 0.5, 0.25)
# On a CPU: contenders that skip dead rows, and naive. The others are too slow to run three times.
VARIANTS = {"cuda": tuple(PEERS), "cpu": ("grao", "naive", "cce_torch_compile")}[DEVICE]
ROUNDS = {"cuda": 10, "cpu": 3, "tiny": 2}[SIZE]

pytestmark = pytest.mark.benchmark(timer=clock, group="LM head, some rows live")


@pytest.fixture(scope="module")
def race():
    batches = {
        live: make_batch(SHAPES[SIZE][0], DTYPES[DEVICE], DEVICE, live=live) for live in SHARES
    }
    runs = {f"{name} {live}": (PEERS[name], batches[live]) for name in VARIANTS for live in SHARES}
    return measure(runs, rounds=ROUNDS), batch_facts(batches[1.0])


@pytest.mark.parametrize("live", SHARES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(benchmark, race, variant: str, live: float) -> None:
    measured, facts = race
    report(benchmark, measured, f"{variant} {live}", PEERS[variant], facts | {"live": live})
