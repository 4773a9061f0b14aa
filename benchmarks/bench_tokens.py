"""Measures how time and memory grow with the tokens of a batch, every row live.

    pytest benchmarks/bench_tokens.py --benchmark-only

A contender that runs out of memory says so and at how many tokens.
"""

from __future__ import annotations

import pytest
from batches import DEVICE, DTYPES, SHAPES, SIZE, batch_facts, make_batch
from measure import measure
from peers import PEERS
from replay import clock, report

TOKENS = {
    "cuda": [2**power for power in range(10, 17)],
    "cpu": [256, 512, 1024, 2048],
    "tiny": [256, 512],
}[SIZE]
VARIANTS = {
    "cuda": tuple(PEERS),
    "cpu": ("grao", "grao_64_mib", "naive", "liger_grpo"),
}[DEVICE]
ROUNDS = {"cuda": 5, "cpu": 3, "tiny": 2}[SIZE]

pytestmark = pytest.mark.benchmark(timer=clock, group="LM head over tokens")


@pytest.fixture(scope="module", params=TOKENS)
def race(request):
    _, D, V = SHAPES[SIZE][0]
    batch = make_batch((request.param, D, V), DTYPES[DEVICE], DEVICE)
    runs = {name: (PEERS[name], batch) for name in VARIANTS}
    return measure(runs, rounds=ROUNDS), batch_facts(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_backward(benchmark, race, variant: str) -> None:
    measured, facts = race
    report(benchmark, measured, variant, PEERS[variant], facts)
