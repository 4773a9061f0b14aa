"""Measures the largest error of every contender against float64 on the same inputs.

    pytest benchmarks/bench_accuracy.py --benchmark-only

An error is relative to the largest true value of its output, that of the loss to the sum of its
terms' sizes. "flat" logits have unit variance, as at random initialisation; "peaked" ones give the
target a probability of about 0.999, as a trained model does: 1 - p is then what counts. Times in
these rows are of one cold call, and no measurement.
"""

from __future__ import annotations

import pytest
import torch
from batches import DEVICE, DTYPES, SHAPES, SIZE, Batch, batch_facts, make_batch
from measure import errors, outputs, truth
from peers import PEERS
from replay import PRESENT, names, skip

TOKENS = 512
TARGET_LOGIT = 18.0  # over 49,152 others of about unit variance: p = 0.999

pytestmark = pytest.mark.benchmark(group="accuracy: the times are no measurement")


@pytest.fixture(scope="module", params=["flat", "peaked"])
def problem(request):
    torch._dynamo.reset()
    _, D, V = SHAPES[SIZE][0]
    batch = make_batch((TOKENS, D, V), DTYPES[DEVICE], DEVICE)
    if request.param == "peaked":
        batch = peaked(batch)
    return (
        request.param,
        batch,
        {weighted: truth(batch, weighted=weighted) for weighted in (True, False)},
    )


def peaked(batch: Batch) -> Batch:
    """Move hidden states along the target's row of the head until its logit is about 18."""
    with torch.no_grad():
        row_TD = batch.head_VD[batch.target_T].float()
        away_TD = TARGET_LOGIT * row_TD / row_TD.square().sum(1, keepdim=True)
        hidden_TD = (batch.hidden_TD + away_TD).to(batch.hidden_TD.dtype)
    return batch._replace(hidden_TD=hidden_TD.requires_grad_())


@pytest.mark.parametrize("variant", PEERS)
def test_largest_errors(benchmark, problem, variant: str) -> None:
    logits, batch, true_outputs = problem
    peer = PEERS[variant]
    if reason := peer.absence(batch):
        skip(peer, reason)
    PRESENT.add(peer.label)
    found = benchmark.pedantic(outputs, args=(peer, batch), rounds=1)
    benchmark.extra_info.update(
        names(peer)
        | batch_facts(batch)
        | {"logits": logits, "errors": errors(found, true_outputs[peer.weighted])}
    )
