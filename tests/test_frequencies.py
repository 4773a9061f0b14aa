"""Rotary frequencies that follow the longest position of a batch are held for a whole run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import assert_same, family_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import grao_fast
from grao_fast import GRAOConfig
from grao_fast.data.packing import Group, MicroBatch
from grao_fast.models.attention.frequencies import hold_frequencies, release_frequencies
from grao_fast.models.policy import Policy
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.proof import measure_sampler

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
    "factor": 2.0,
    "original_max_position_embeddings": 16,
}
# In all layers; in one of two types of layers; with another scale as well; and of the base.
FOLLOWING: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi3": (
        "Phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": LONG_ROPE},
    ),
    "a type of layer": (
        "Gemma3Text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": LONG_ROPE,
            },
        },
    ),
    "PhiMoE": (
        "Phimoe",
        {
            "num_local_experts": 2,
            "router_jitter_noise": 0.0,
            "sliding_window": None,
            "rope_parameters": LONG_ROPE | {"short_mscale": 1.0, "long_mscale": 1.5},
        },
    ),
    "dynamic NTK": (
        "Llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
}


def group(prompt: int, first: int) -> Group:
    """A prompt of so many tokens and sequences of 2 and 3."""
    ids = [3 + (first + 7 * i) % 70 for i in range(prompt + 5)]
    sequences = [ids[prompt : prompt + 2], ids[prompt + 2 :]]
    return Group(ids[:prompt], sequences)


SHORT, LONG = group(4, 1), group(20, 9)  # within what was trained first, and beyond


def model_of(case: str) -> PreTrainedModel:
    family, options = copy.deepcopy(FOLLOWING[case])  # configs write into what they are given
    model = family_model(family, **options).eval()
    ids = torch.tensor([LONG.prompt_ids])
    try:
        for part in (ids[:, :2], ids, ids, ids[:, :2]):
            model(part)
    except (AttributeError, NameError) as error:
        pytest.skip(f"Transformers {transformers.__version__} cannot run it: {error}")
    return family_model(family, **copy.deepcopy(FOLLOWING[case][1]))


def held(case: str, tiny_model: Path, tokens: int, **options: Any) -> LoadedPolicy:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    loaded = load_policy(model_of(case), config=GRAOConfig(**options), tokenizer=tokenizer)
    hold_frequencies(loaded.causal_lm, tokens)
    return loaded


def summed(policy: Policy, batches: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and gradients of a sum of their squares, over micro-batches."""
    policy.model.zero_grad()
    parts = []
    with policy.updating():
        for batch in batches:
            parts.append(policy.hidden(batch))
            parts[-1].square().sum().backward()
    named = policy.model.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return torch.cat(parts).detach(), found


@pytest.mark.parametrize("share_prefix", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("case", FOLLOWING)
def test_the_gradient_does_not_depend_on_how_a_step_is_split(case, share_prefix, tiny_model):
    policy = held(case, tiny_model, 24, share_prefix=share_prefix).policy
    together = summed(policy, [policy.lay_out([LONG, SHORT])])
    apart = [policy.lay_out([LONG]), policy.lay_out([SHORT])]
    assert_same(together, summed(policy, apart))
    release_frequencies(policy.causal_lm)  # it would, if they were not held
    with pytest.raises(AssertionError):
        assert_same(together, summed(policy, apart))


@pytest.mark.parametrize("case", FOLLOWING)
def test_what_is_held_is_what_the_model_makes_of_that_length(case: str, tiny_model: Path):
    """Short contexts alone: as the stock model does. A long one: as it does with that one."""
    ids = torch.tensor([LONG.prompt_ids])
    stock = model_of(case).eval()
    model = model_of(case).eval()
    with torch.no_grad():
        short, long = stock(ids[:, :6]).logits, stock(ids).logits
        hold_frequencies(model, 16)
        assert torch.equal(model(ids[:, :6]).logits, short)
        hold_frequencies(model, 20)
        torch.testing.assert_close(model(ids).logits, long)
        assert not torch.allclose(model(ids[:, :6]).logits, short, atol=1e-3)
        torch.testing.assert_close(model(ids[:, :6]).logits, stock(ids).logits[:, :6])
        release_frequencies(model)
        assert torch.equal(model(ids[:, :6]).logits, short)


@pytest.mark.parametrize("case", FOLLOWING)
def test_the_sampler_turns_positions_as_the_policy_does(case: str, tiny_model: Path):
    loaded = held(case, tiny_model, 24, gradient_checkpointing=False)
    assert measure_sampler(loaded.sampler, loaded.policy).off < 1e-4


def test_a_run_is_split_in_any_way_and_gives_the_model_back(tiny_model: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"prompt": "x", "reference": "abc"}, {"prompt": "y" * 20, "reference": "abc"}]
    metrics = []
    for tokens in (1, 1000):
        model = model_of("Phi3")
        result = grao_fast.train(
            model,
            rows,
            lambda completions, **_: [float(len(text)) for text in completions],
            tokenizer=tokenizer,
            config=GRAOConfig(
                num_generations=2,
                max_new_tokens=6,
                prompts_per_step=2,
                max_steps=1,
                save_steps=0,
                max_tokens_per_microbatch=tokens,
                disable_tqdm=True,
            ),
            output_dir=tmp_path / str(tokens),
        )
        metrics.append(result.metrics)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-5)
    assert metrics[0]["grad_norm"] > 0
    assert max(m["sampling/logp_diff_max"] for m in metrics) < 1e-4


def test_a_model_of_fixed_frequencies_is_left_alone():
    model = family_model("Qwen3")
    hold_frequencies(model, 24)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
