"""Models that carry a state from token to token: trained and evaluated by `generate`, unshared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import HYBRIDS, assert_same, family_model, gradients
from tiny import sums
from torch import nn
from transformers import AutoTokenizer

import grao_fast
from grao_fast import GRAOConfig
from grao_fast.data.packing import Group, pad
from grao_fast.sampling import Completion
from grao_fast.sampling.generate import GenerateSampler, supports_left_padding
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.training.flops import layer_windows

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [16, 17, 18]]
SEEDS = [3, 1, 4, 15]


@pytest.fixture(scope="module", params=HYBRIDS)
def loaded(request: pytest.FixtureRequest, tiny_model: Path) -> LoadedPolicy:
    """Every third token ends a completion, so that rows end at different times."""
    model = family_model(request.param)
    model.generation_config.eos_token_id = list(range(1, 77, 3))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return load_policy(model, config=GRAOConfig(share_prefix=False), tokenizer=tokenizer)


def sample(loaded: LoadedPolicy, prompts=PROMPTS, **options) -> list[list[Completion]]:
    options = {
        "num_generations": 6,
        "max_new_tokens": 8,
        "temperature": 0.7,
        "seeds": SEEDS,
    } | options
    return loaded.sampler.sample(prompts, **options)


def test_log_probs_are_those_of_the_full_forward_pass(loaded: LoadedPolicy):
    groups = sample(loaded)
    model = loaded.causal_lm.eval()
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-4)
            ended = [token in loaded.eos_token_ids for token in completion.token_ids]
            assert not any(ended[:-1])
            assert completion.finished == ended[-1]
            assert completion.finished or len(ended) == 8
            lengths.add(len(ended))
    assert len(lengths) > 3


def test_one_call_one_result_and_another_seed_another(loaded: LoadedPolicy):
    assert sample(loaded) == sample(loaded)
    assert sample(loaded) != sample(loaded, seeds=[4, *SEEDS[1:]])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_group_does_not_depend_on_the_prompts_beside_it(loaded: LoadedPolicy, temperature: float):
    """Padding would be summed into the state."""
    together = sample(loaded, temperature=temperature)
    for prompt, seed, group in zip(PROMPTS, SEEDS, together, strict=True):
        (alone,) = sample(loaded, [prompt], temperature=temperature, seeds=[seed])
        assert [c.token_ids for c in alone] == [c.token_ids for c in group]


def test_padding_that_is_masked_everywhere_is_used(loaded: LoadedPolicy):
    """Prompts of all lengths in one batch; weights are as they were to the bit."""
    assert isinstance(loaded.sampler, GenerateSampler) and loaded.sampler.pads
    assert list(loaded.sampler._batches(PROMPTS, 64)) == [[2, 0, 3, 1]]
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    assert supports_left_padding(loaded.causal_lm)
    after = loaded.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("leak", ["a mask that is not applied", "a bias behind the mask"])
def test_padding_that_reaches_a_state_is_never_made(leak: str):
    """By so little, or not yet, that no log-prob of a new model shows it."""
    model = family_model("Lfm2")
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    conv = model.model.layers[0].conv
    if leak == "a mask that is not applied":
        inner = conv.forward
        conv.forward = lambda *args, **kwargs: inner(*args, **kwargs | {"attention_mask": None})
    else:
        conv.in_proj.bias = nn.Parameter(torch.zeros(conv.in_proj.out_features))
    assert not supports_left_padding(model)
    model.to(torch.bfloat16)
    assert not supports_left_padding(model)
    sampler = GenerateSampler(model, Decoding(eos_token_ids=(), pad_token_id=0, batch_size=64))
    assert list(sampler._batches(PROMPTS, 64)) == [[2], [0, 3], [1]]


def test_the_models_generation_config_has_no_say(loaded: LoadedPolicy):
    """Nor is it changed."""
    expected = sample(loaded)
    own = loaded.causal_lm.generation_config
    settings = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "repetition_penalty": 5.0,
        "suppress_tokens": [3, 4, 5],
        "max_length": 5,
        "min_new_tokens": 8,
    }
    before = {name: getattr(own, name) for name in settings}
    own.update(**settings)
    try:
        assert sample(loaded) == expected
        assert loaded.causal_lm.generation_config is own
        assert all(getattr(own, name) == value for name, value in settings.items())
    finally:
        own.update(**before)


def test_padding_on_the_right_changes_no_gradient(loaded: LoadedPolicy):
    """Rows of two lengths in one batch, against one row a batch."""
    rows = [Group([5, 6, 7], [[8, 9, 10, 11, 12, 13]]), Group([14], [[15, 16]])]
    hidden, together = gradients(loaded.policy, pad(rows, pad_token_id=0))
    weight = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    loaded.model.zero_grad()
    parts = []
    with loaded.policy.updating():
        for row, weight_TD in zip(rows, weight.split([6, 2]), strict=True):
            parts.append(loaded.policy.hidden(pad([row], pad_token_id=0)))
            (parts[-1] * weight_TD).sum().backward()
    named = loaded.model.named_parameters()
    apart = {name: p.grad.clone() for name, p in named if p.grad is not None}
    assert_same((hidden, together), (torch.cat(parts).detach(), apart))


CONFIG = GRAOConfig(
    num_generations=3,
    max_new_tokens=6,
    prompts_per_step=2,
    max_steps=2,
    save_steps=0,
    learning_rate=1e-3,
    disable_tqdm=True,
    share_prefix=False,
    memory_budget_mib=4000,
    device="cpu",
)


def distinct(completions, **columns) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


@pytest.mark.slow  # the trainer's own are of every kind; this one is of the other sampler
def test_a_resumed_run_is_the_same_to_the_bit(tiny_model: Path, tmp_path: Path):
    options = {
        "tokenizer": AutoTokenizer.from_pretrained(tiny_model),
        "config": CONFIG.replace(
            save_steps=1, max_tokens_per_microbatch=100, memory_budget_mib=None
        ),
    }
    whole, resumed = family_model("Lfm2"), family_model("Lfm2")
    grao_fast.train(whole, sums(4), distinct, output_dir=tmp_path / "whole", **options)
    grao_fast.train(
        resumed,
        sums(4),
        distinct,
        output_dir=tmp_path / "resumed",
        resume_from_checkpoint=tmp_path / "whole" / "checkpoint-1",
        **options,
    )
    theirs = resumed.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in whole.state_dict().items())


@pytest.mark.parametrize(
    "family", ["Qwen3Next", "Lfm2", "Mamba2", pytest.param("FalconH1", marks=pytest.mark.slow)]
)
def test_two_steps_and_an_evaluation(family: str, tiny_model: Path, tmp_path: Path):
    """In float32 the sampler and the policy agree to rounding; layers are recomputed."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = family_model(family)
    with pytest.raises(ValueError, match=r"carries a state .*: set share_prefix=False"):
        options = {"tokenizer": tokenizer, "output_dir": tmp_path / "shared"}
        shared = CONFIG.replace(share_prefix=True)
        grao_fast.train(model, sums(4), distinct, config=shared, **options)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = grao_fast.train(
        model,
        sums(4),
        distinct,
        config=CONFIG,
        tokenizer=tokenizer,
        eval_dataset=sums(2),
        output_dir=tmp_path / "run",
    )
    assert result.metrics["sampling/logp_diff_max"] < 1e-4
    assert result.metrics["grad_norm"] > 0
    changed = [not torch.equal(before[name], w) for name, w in model.state_dict().items()]
    assert all(changed)
    assert result.after is not None and result.after.nag is not None
    answered = grao_fast.evaluate(tmp_path / "run" / "final", sums(2), distinct, config=CONFIG)
    assert answered.reward == result.after.reward


def test_a_cache_of_fixed_size_is_refused(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = GRAOConfig(share_prefix=False, cache_implementation="static")
    with pytest.raises(
        ValueError, match=r'Lfm2ForCausalLM keeps .* cache_implementation="dynamic"'
    ):
        load_policy(family_model("Lfm2"), config=config, tokenizer=tokenizer)


def test_a_layer_that_does_not_attend_costs_no_pairs():
    windows = {name: layer_windows(family_model(name).config) for name in HYBRIDS}
    assert windows == {"Qwen3Next": [None], "Lfm2": [None], "FalconH1": [None] * 2, "Mamba2": []}
