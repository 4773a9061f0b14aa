"""Per model family: packed groups give the gradient of repeated prompts, and compute fewer tokens.

    pytest benchmarks/test_families.py --benchmark-only
    GRAO_SMOLLM2=/tmp/smollm2 pytest benchmarks/test_families.py --benchmark-only -m real

The families, two layers with random weights each, are those of the tests. `family_race.py` says
what is compared.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from family_race import CONTENDERS, PACKED, REPEATED, race_family
from problem import DEVICE
from replay import clock, report
from step_problem import Case, make_model

# Last: what both folders have is the benchmarks'.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

from families import FAMILIES, family_model

ROUNDS = 5
CASE = Case(prompts=4, samples=4, prompt_tokens=24, response_tokens=16)
REAL = os.environ.get("GRAO_SMOLLM2", "")
REAL_ROUNDS = 3
REAL_CASE = Case(prompts=2, samples=4, prompt_tokens=32, response_tokens=32)

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.skipif(
        DEVICE != "cpu", reason="runs on CPUs: FlexAttention takes no heads of 8 dimensions"
    ),
]


def facts(family: str, case: Case) -> dict[str, object]:
    return {"family": family, "dtype": "float32", "shape": vars(case)}


@pytest.fixture(scope="module", params=FAMILIES)
def family_race(request):
    _, tokenizer = make_model("tiny", "cpu")  # its EOS and padding are all that is used
    race, found = race_family(family_model(request.param), tokenizer, CASE, rounds=ROUNDS)
    return race, facts(request.param, CASE) | found


@pytest.mark.parametrize("variant", [PACKED, REPEATED])
def test_family(benchmark, family_race, variant: str) -> None:
    race, found = family_race
    report(benchmark, race, variant, CONTENDERS[variant], found)


@pytest.fixture(scope="module")
def real_race():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    race, found = race_family(model, tokenizer, REAL_CASE, rounds=REAL_ROUNDS)
    return race, facts("SmolLM2-135M-Instruct", REAL_CASE) | found


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="GRAO_SMOLLM2 names no model folder")
@pytest.mark.parametrize("variant", [PACKED, REPEATED])
def test_real_model(benchmark, real_race, variant: str) -> None:
    race, found = real_race
    report(benchmark, race, variant, CONTENDERS[variant], found)
