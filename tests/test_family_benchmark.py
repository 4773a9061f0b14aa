"""The benchmark of model families compares what it says, and fails where packing is not exact."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from families import SIZES, family_model
from family_sides import PACKED, REPEATED, compare_family, off
from step_problem import Case, make_model, make_rollout, useful_tokens
from transformers import AttentionInterface

from grao_fast.models.attention import packed_attention, sdpa

CASE = Case(prompts=2, samples=3, prompt_tokens=9, response_tokens=8)
ROLLOUT = make_rollout(CASE, SIZES["vocab_size"])


def compared(family: str, *held: str):
    _, tokenizer = make_model("tiny", "cpu")
    return compare_family(family_model(family), tokenizer, ROLLOUT, held=held)


def test_a_mixture_is_the_naive_formula_without_its_routers_loss():
    runs, facts = compared("Mixtral", "worst parameter")
    assert [runs[name](0) for name in (PACKED, REPEATED)] == [useful_tokens(ROLLOUT)] * 2
    for pair in ("packed, repeated", "packed, naive", "repeated, naive"):
        assert max(facts["errors"][pair].values()) < 1e-5, pair
    prompts = sum(len(prompt.prompt_ids) for prompt in ROLLOUT.prompts)
    assert facts["tokens"]["packed"] == prompts + useful_tokens(ROLLOUT)
    assert facts["tokens"]["repeated"] - facts["padding"] == 4 * prompts + useful_tokens(ROLLOUT)


def test_a_fault_that_the_check_at_the_start_lets_pass_fails(monkeypatch):
    """Attention of packed groups is too large by 1e-4."""

    def too_large(*args, **options):
        return attend(*args, **options) * (1 + 1e-4)

    attend = sdpa.attend
    hook = functools.partial(packed_attention, attend=too_large)
    monkeypatch.setitem(AttentionInterface._global_mapping, "grao_parts", hook)
    with pytest.raises(AssertionError, match="LlamaForCausalLM: gradient of packed groups is off"):
        compared("Llama", "gradient")


def test_errors_are_relative_and_a_gradient_of_0_does_not_pass_unseen():
    expected = (2.0, [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])])
    found = off((1.0, [torch.tensor([3.0, 1.5]), torch.tensor([2.0, 4.0])]), expected)
    assert found == {"loss": 0.5, "gradient": 0.5, "worst parameter": 0.5}
    without = (2.0, [torch.zeros(2), torch.tensor([0.0, 4.0])])
    assert off(expected, without)["worst parameter"] == math.inf
    assert math.isnan(off(without, without)["worst parameter"])
