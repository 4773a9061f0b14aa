"""Times a step of 1, 2 and 4 processes on this machine's CPU beside TRL under accelerate's FSDP2.

    pytest benchmarks/bench_processes.py --benchmark-only

The same sequences, rewards and settings on both sides, as in bench_step.py; each process has its
share of the groups, TRL's in micro-batches of one group, which are its better ones there. Nothing
is timed unless losses and gradients agree and collectives carry what `grao-fast plan` says, ours to
the byte. More processes than cores cannot be faster: they show what sharding saves in memory and
costs in traffic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from batches import SIZE
from measure import quartiles
from process_race import CASES, CONTENDERS, MODEL
from process_sides import Contender
from replay import clock, report
from step_problem import make_model

PROGRAM = Path(__file__).parent / "process_race.py"
CASE_NAME = "tiny" if SIZE == "tiny" else "cpu"  # also where there is a GPU
CASE = CASES[CASE_NAME]

pytestmark = pytest.mark.benchmark(timer=clock)


class Measured(NamedTuple):
    """Seconds of each round, and whatever else was measured."""

    seconds: list[float]
    facts: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        return quartiles(self.seconds) | self.facts


@pytest.fixture(scope="module")
def process_race(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("race") / "race.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(out), CASE_NAME]
    subprocess.run(command, check=True, timeout=600, env=environment)
    found = json.loads(out.read_text())
    measured = {
        name: Measured(facts.pop("seconds"), facts) for name, facts in found["measured"].items()
    }
    absence = found["absence"]
    return measured, {c.name: absence for c in CONTENDERS if c.name not in measured}


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    model, _ = make_model(MODEL, "cpu")
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "title": f"Qwen3 of {millions:.1f} M parameters, V={model.config.vocab_size}, float32",
        "case": f"{CASE.prompts} prompts of {CASE.prompt_tokens} tokens, G={CASE.samples}, "
        f"{CASE.response_tokens} new",
        "shape": vars(CASE),
        "cores": os.cpu_count(),
    }


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_processes(benchmark, process_race, facts, contender: Contender) -> None:
    report(benchmark, process_race, contender.name, contender, facts)
