"""Times forward and backward of an LM head's loss with every row live: ours and every peer.

    pytest benchmarks/bench_linear_grao.py --benchmark-only

Contenders take turns. In extra_info `gemm_ratio` is the time over that of the three bare GEMMs of
the same round, and `peak_extra_mib` the memory beyond the inputs.
"""

from __future__ import annotations

import pytest
from batches import DEVICE, DTYPES, SHAPES, SIZE, batch_facts, make_batch, shape_name
from measure import measure
from peers import PEERS
from replay import clock, report

ROUNDS = {"cuda": 10, "cpu": 3, "tiny": 2}[SIZE]

pytestmark = pytest.mark.benchmark(timer=clock, group="LM head, all rows live")


@pytest.fixture(scope="module", params=SHAPES[SIZE], ids=shape_name)
def race(request):
    batch = make_batch(request.param, DTYPES[DEVICE], DEVICE)
    runs = {name: (peer, batch) for name, peer in PEERS.items()}
    return measure(runs, rounds=ROUNDS), batch_facts(batch)


@pytest.mark.parametrize("variant", PEERS)
def test_forward_and_backward(benchmark, race, variant: str) -> None:
    measured, facts = race
    report(benchmark, measured, variant, PEERS[variant], facts)
