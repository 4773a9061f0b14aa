"""Times a whole optimiser step and a whole sampling phase of ours and of TRL's GRPOTrainer.

    pytest benchmarks/bench_step.py --benchmark-only
    GRAO_SMOLLM2=/tmp/smollm2 pytest benchmarks/bench_step.py --benchmark-only -m real

One model, the same prompts, sequences, rewards and settings on both sides, and the same gradient;
`step_sides.py` says how. Cases differ from the first in one thing: the ratio of prompt to response,
the number of samples G, or the share of groups whose rewards are all equal. TRL goes through a
step in one micro-batch, and in one a group; its better one counts.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from batches import DEVICE, SIZE
from replay import clock, report
from step_problem import Case, make_model, make_prompts
from step_race import (
    CONTENDERS,
    OURS,
    TRL_GROUPS,
    TRL_SAMPLE,
    TRL_WHOLE,
    race_sampling,
    race_steps,
    trl_absence,
)

SCALE = {"cuda": 8, "cpu": 1, "tiny": 1}[SIZE]
ROUNDS = {"cuda": 5, "cpu": 3, "tiny": 2}[SIZE]
BASE = Case(prompts=4, samples=8, prompt_tokens=48 * SCALE, response_tokens=48 * SCALE)
STEPS = [
    BASE,
    BASE.replace(prompt_tokens=20 * SCALE, response_tokens=80 * SCALE),
    BASE.replace(prompt_tokens=128 * SCALE, response_tokens=16 * SCALE),
    BASE.replace(samples=4),
    BASE.replace(samples=16),
    BASE.replace(dead=0.25),
    BASE.replace(dead=0.5),
]
# Mean lengths of completions, before they are cut, where any token may be an EOS.
SAMPLING = {"ragged lengths": 64.0 * SCALE, "equal lengths": math.inf}
LONGEST = 128 * SCALE

REAL = os.environ.get("GRAO_SMOLLM2", "")
REAL_BASE = Case(prompts=2, samples=4, prompt_tokens=32, response_tokens=32)
REAL_STEPS = [REAL_BASE, REAL_BASE.replace(prompt_tokens=128, response_tokens=16)]
QUESTIONS = [
    "Name a fruit.",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What is 17 + 25?",
    "List three primary colours.",
]
# (prompts, longest answer in tokens); the model ends its answers itself. On a CPU a few rows cost
# about as much as one, since each step of decoding reads all weights.
REAL_SAMPLING = [(2, 64), (8, 128)]

pytestmark = pytest.mark.benchmark(timer=clock)
needs_model = pytest.mark.skipif(not REAL, reason="GRAO_SMOLLM2 names no model folder")


def step_name(case: Case) -> str:
    """Return the mean lengths of a case and whatever else differs between cases."""
    dead = f", {case.dead:.0%} of groups dead" if case.dead else ""
    return f"prompt {case.prompt_tokens}, response {case.response_tokens}, G={case.samples}{dead}"


def step_facts(model, case: Case) -> dict[str, Any]:
    title = f"optimiser step, {model_name(model)}"
    return {"title": title, "case": step_name(case), "shape": vars(case)}


def model_name(model) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    kind = type(model).__name__.removesuffix("ForCausalLM")
    return f"{kind}, {millions:.1f} M parameters, V={model.config.vocab_size}"


@pytest.fixture(scope="module")
def model():
    return make_model(SIZE, DEVICE)


@pytest.fixture(scope="module", params=STEPS, ids=step_name)
def step_race(request, model):
    case = request.param
    race = race_steps(*model, case, rounds=ROUNDS, without_trl=trl_absence())
    return race, step_facts(model[0], case)


@pytest.mark.parametrize("variant", [OURS, TRL_WHOLE, TRL_GROUPS])
def test_step(benchmark, step_race, variant: str) -> None:
    measured, facts = step_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)


@pytest.fixture(scope="module", params=SAMPLING)
def sampling_race(request):
    model, tokenizer = make_model(SIZE, DEVICE, mean_length=SAMPLING[request.param])
    race = race_sampling(
        model,
        tokenizer,
        make_prompts(BASE, model.config.vocab_size),
        samples=BASE.samples,
        longest=LONGEST,
        rounds=ROUNDS + 2,
        without_trl=trl_absence(),
    )
    case = f"prompt {BASE.prompt_tokens}, at most {LONGEST} tokens, G={BASE.samples}"
    title = f"sampling, {model_name(model)}"
    return race, {"title": title, "case": f"{request.param}: {case}", "shape": vars(BASE)}


@pytest.mark.parametrize("variant", [OURS, TRL_SAMPLE])
def test_sampling(benchmark, sampling_race, variant: str) -> None:
    measured, facts = sampling_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)


@pytest.fixture(scope="module")
def real_model():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).to(DEVICE)
    return model, AutoTokenizer.from_pretrained(REAL)


@pytest.fixture(scope="module", params=REAL_STEPS, ids=step_name)
def real_step_race(request, real_model):
    case = request.param
    race = race_steps(*real_model, case, rounds=ROUNDS, without_trl=trl_absence())
    return race, step_facts(real_model[0], case)


@pytest.fixture(scope="module", params=REAL_SAMPLING, ids="{0[0]} prompts".format)
def real_sampling_race(request, real_model):
    model, tokenizer = real_model
    count, longest = request.param
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS[:count]
    ]
    options = {"samples": BASE.samples, "longest": longest, "rounds": ROUNDS}
    race = race_sampling(model, tokenizer, prompts, **options, without_trl=trl_absence())
    case = f"its own lengths: {count} prompts, at most {longest} tokens, G={BASE.samples}"
    return race, {"title": f"sampling, {model_name(model)}", "case": case}


@pytest.mark.real
@needs_model
@pytest.mark.parametrize("variant", [OURS, TRL_WHOLE, TRL_GROUPS])
def test_real_step(benchmark, real_step_race, variant: str) -> None:
    measured, facts = real_step_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)


@pytest.mark.real
@needs_model
@pytest.mark.parametrize("variant", [OURS, TRL_SAMPLE])
def test_real_sampling(benchmark, real_sampling_race, variant: str) -> None:
    measured, facts = real_sampling_race
    report(benchmark, measured, variant, CONTENDERS[variant], facts)
