"""A whole optimiser step, and a whole sampling phase, ours beside TRL's GRPOTrainer.

    pytest benchmarks/test_step.py --benchmark-only
    GRAO_SMOLLM2=/tmp/smollm2 pytest benchmarks/test_step.py --benchmark-only -m real

One model, the same prompts, sequences, rewards and settings on both sides, and the same gradient;
`step_sides.py` says how. Cases differ from the first in one thing: the ratio of prompt to response,
the number of samples G, or the share of groups whose rewards are all equal. TRL goes through a
step in one micro-batch, and in one a group; its better one counts.
"""

from __future__ import annotations

import math

import pytest
from problem import DEVICE
from replay import clock, report
from step_problem import MODELS, Case, make_model, make_prompts
from step_race import (
    CONTENDERS,
    OURS,
    TRL_GROUPS,
    TRL_SAMPLE,
    TRL_WHOLE,
    race_sampling,
    race_steps,
)

SCALE = {"cuda": 8, "cpu": 1}[DEVICE]
ROUNDS = {"cuda": 5, "cpu": 3}[DEVICE]
BASE = Case(prompts=4, samples=8, prompt_tokens=48 * SCALE, response_tokens=48 * SCALE)
STEPS = {
    "prompt = response": BASE,
    "prompt : response = 1 : 4": BASE.replace(prompt_tokens=20 * SCALE, response_tokens=80 * SCALE),
    "prompt : response = 8 : 1": BASE.replace(
        prompt_tokens=128 * SCALE, response_tokens=16 * SCALE
    ),
    "G = 4": BASE.replace(samples=4),
    "G = 16": BASE.replace(samples=16),
    "25% dead groups": BASE.replace(dead=0.25),
    "50% dead groups": BASE.replace(dead=0.5),
}
# Mean lengths of the completions before they are cut at 128 tokens: geometric, and all of 128.
SAMPLING = {"ragged lengths": 64.0 * SCALE, "equal lengths": math.inf}
LONGEST = 128 * SCALE

pytestmark = pytest.mark.benchmark(timer=clock)


@pytest.fixture(scope="module")
def model():
    return make_model(DEVICE, DEVICE)


@pytest.fixture(scope="module", params=STEPS)
def step_race(request, model):
    case = STEPS[request.param]
    facts = {"phase": "step", "case": request.param, "shape": vars(case), "model": _size(model[0])}
    return race_steps(*model, case, rounds=ROUNDS), facts


@pytest.mark.parametrize("variant", [OURS, TRL_WHOLE, TRL_GROUPS])
def test_step(benchmark, step_race, variant: str) -> None:
    measured, facts = step_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)


@pytest.fixture(scope="module", params=SAMPLING)
def sampling_race(request):
    model, tokenizer = make_model(DEVICE, DEVICE, mean_length=SAMPLING[request.param])
    prompts = make_prompts(BASE, MODELS[DEVICE]["vocab"])
    facts = {
        "phase": "sampling",
        "case": request.param,
        "shape": vars(BASE) | {"longest": LONGEST},
        "model": _size(model),
    }
    options = {"samples": BASE.samples, "longest": LONGEST, "rounds": ROUNDS + 2}
    return race_sampling(model, tokenizer, prompts, **options), facts


@pytest.mark.parametrize("variant", [OURS, TRL_SAMPLE])
def test_sampling(benchmark, sampling_race, variant: str) -> None:
    measured, facts = sampling_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)


def _size(model) -> str:
    count = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{model.config.model_type}, {count:.1f} M parameters, V={model.config.vocab_size}"
