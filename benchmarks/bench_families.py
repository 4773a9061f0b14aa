"""Compares packed groups with repeated prompts in every model family: gradients and tokens.

    pytest benchmarks/bench_families.py --benchmark-only
    GRAO_SMOLLM2=/tmp/smollm2 pytest benchmarks/bench_families.py --benchmark-only -m real

The families, two layers with random weights each, are those of the tests. `family_sides.py` says
what is compared.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from batches import DEVICE, SIZE
from families import FAMILIES, family_model
from family_sides import PACKED, REPEATED, compare_family
from replay import clock, report
from step_problem import Case, make_model, make_rollout
from step_race import Contender, take_turns
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from grao_fast.data.encoding import Encoded
from grao_fast.data.examples import Example
from grao_fast.kernels import group_advantages
from grao_fast.sampling import Completion
from grao_fast.training.rollout import Rollout

CONTENDERS = {
    PACKED: Contender(PACKED, "grao-fast, shared prompts"),
    REPEATED: Contender(REPEATED, "grao-fast, repeated prompts"),
}
CASE = Case(prompts=4, samples=4, prompt_tokens=24, response_tokens=16)
ROUNDS = 2 if SIZE == "tiny" else 5

REAL = os.environ.get("GRAO_SMOLLM2", "")
REAL_ROUNDS = 2
# A question's samples and, last, its reference, each with a reward.
REAL_GROUPS = {
    "Name a fruit.": {
        "An apple.": 1.0,
        "A banana is a fruit that grows in bunches.": 0.5,
        "I am not sure what you mean.": -1.0,
        "A mango is a sweet fruit from the tropics.": 1.5,
    },
    "What is the capital of France?": {
        "The capital of France is Paris.": 1.0,
        "It is Lyon, a large city in the south.": -1.0,
        "Paris.": 0.5,
        "Paris, which lies on the Seine.": 1.2,
    },
}

pytestmark = [
    pytest.mark.benchmark(timer=clock),
    pytest.mark.skipif(
        DEVICE != "cpu", reason="runs on CPUs: FlexAttention takes no heads of 8 dimensions"
    ),
]


def facts(family: str) -> dict[str, Any]:
    return {"family": family, "dtype": "float32", "threads": torch.get_num_threads()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: on tiny tensors more threads cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=FAMILIES)
def family_race(request):
    """Check every parameter to 1e-5, which float32 allows through two layers."""
    model = family_model(request.param)
    _, tokenizer = make_model("tiny", "cpu")  # its EOS and padding are all that is used
    rollout = make_rollout(CASE, model.config.vocab_size)
    held = ("loss", "gradient", "worst parameter")
    runs, found = compare_family(model, tokenizer, rollout, held=held)
    return take_turns(runs, {}, ROUNDS, model.device), facts(request.param) | found


@pytest.mark.parametrize("variant", [PACKED, REPEATED])
def test_family(benchmark, family_race, variant: str) -> None:
    race, found = family_race
    report(benchmark, race, variant, CONTENDERS[variant], found)


@pytest.fixture(scope="module")
def real_race():
    """Check the gradient as a whole: after 30 layers of float32 single tensors differ by more than
    1e-5, also between repeated prompts and the naive formula."""
    model = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    rollout = real_rollout(tokenizer)
    runs, found = compare_family(model, tokenizer, rollout, held=("loss", "gradient"))
    return take_turns(runs, {}, REAL_ROUNDS, model.device), facts("SmolLM2-135M-Instruct") | found


def real_rollout(tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """Return `REAL_GROUPS` as a rollout."""
    prompts, completions = [], []
    for question, answers in REAL_GROUPS.items():
        prompt_ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        *samples, reference = ([*tokenizer(a).input_ids, tokenizer.eos_token_id] for a in answers)
        prompts.append(Encoded(Example("", "", {}), prompt_ids, reference, ""))
        completions.append([Completion(ids, [math.nan] * len(ids), True) for ids in samples])
    rewards_NK = torch.tensor(
        [list(answers.values()) for answers in REAL_GROUPS.values()], dtype=torch.float64
    )
    return Rollout(
        prompts=prompts,
        completions=completions,
        texts=[list(answers)[:-1] for answers in REAL_GROUPS.values()],
        rewards_NK=rewards_NK,
        advantages_NK=group_advantages(rewards_NK),
        per_function={},
        seconds={},
    )


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="GRAO_SMOLLM2 names no model folder")
@pytest.mark.parametrize("variant", [PACKED, REPEATED])
def test_real_model(benchmark, real_race, variant: str) -> None:
    race, found = real_race
    report(benchmark, race, variant, CONTENDERS[variant], found)
