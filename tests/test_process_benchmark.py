"""The benchmark of several processes times the same step in each, and counts what it sends."""

from __future__ import annotations

from collections import Counter

import datasets  # noqa: F401, before the forks, as the next one is
import numpy as np
import pytest
import torch.distributed.fsdp  # noqa: F401
from process_race import check_steps, race, sent
from process_sides import Contender, Proof
from step_problem import Case

CASE = Case(prompts=2, samples=2, prompt_tokens=6, response_tokens=6)
ALONE, FULL, NONE = (
    Contender("ours", "full", 1),
    Contender("ours", "full", 2),
    Contender("ours", "none", 2),
)
TRL = Contender("trl", "full", 2)


@pytest.mark.slow
def test_sharded_steps_are_one_processs_and_send_what_is_planned() -> None:
    found = race([ALONE, FULL, NONE], "cpu", CASE, rounds=1)
    alone, full, none = (found[each.name] for each in (ALONE, FULL, NONE))
    assert full["held_mib"] == pytest.approx(alone["held_mib"] / 2, rel=1e-3)
    assert none["held_mib"] == alone["held_mib"]
    assert alone["sent_mib"] == 0 < none["sent_mib"] < full["sent_mib"]
    assert all(min(each["seconds"]) > 0 for each in found.values())


TRUTH = [np.array([3.0, 4.0], np.float32)]


def proof(loss: float, grad_norm: float, gradient: list[np.ndarray] = TRUTH) -> Proof:
    return Proof(gradient, loss, grad_norm, Counter(), 0.0)


def test_other_losses_and_gradients_are_refused() -> None:
    """TRL's loss is its own, and the mean of its processes'."""
    good = {ALONE: [proof(1.0, 2.0)], FULL: [proof(1.0, 2.0)] * 2}
    trl = [proof(3.0, 2.0), proof(4.0, 2.0)]
    check_steps(good | {Contender("trl", "full", 1): [proof(3.5, 2.0)], TRL: trl}, TRUTH)
    for wrong in (proof(1.0, 2.001), proof(1.001, 2.0), proof(1.0, 2.0, [TRUTH[0] * 1.0001])):
        with pytest.raises(AssertionError):
            check_steps(good | {NONE: [wrong, proof(1.0, 2.0)]}, TRUTH)
    with pytest.raises(AssertionError):
        check_steps(good | {Contender("trl", "full", 1): [proof(3.6, 2.0)], TRL: trl}, TRUTH)


def test_bytes_sent() -> None:
    """A process's half of what two gather or scatter; of what they reduce, all."""
    assert sent(Counter({"_allgather_base_": 8, "_reduce_scatter_base_": 4}), 2) == 6
    assert sent(Counter({"allreduce_": 8}), 2) == 8
    assert sent(Counter({"allgather_": 4}), 4) == 12
