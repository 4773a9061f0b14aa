"""The policy computes what the model computes: shared prompts, heads and logit transforms."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, GROUPS, SIZES, assert_same, family_model, gradients
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import pack, pad
from grao_fast.models.attention import packed_attention, sdpa
from grao_fast.models.head import LogitTransform
from grao_fast.models.objective import answer_objectives
from grao_fast.sampling import transformers as transformers_sampler
from grao_fast.sampling.loading import load_policy


@pytest.mark.parametrize("how", ["plain", "recomputed", "recomputed with an adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_gradients_of_repeated_ones(family: str, how: str, tiny_model):
    """Two groups share a row, and the adapter's weights are nonzero, unlike fresh ones."""
    adapter = None
    if how.endswith("adapter"):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    config = GRAOConfig(gradient_checkpointing=how != "plain")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(
        family_model(family), config=config, tokenizer=tokenizer, peft_config=adapter
    ).policy
    shared = gradients(policy, pack(GROUPS))
    assert all(("lora" in name) == (adapter is not None) for name in shared[1])
    repeating = config.replace(share_prefix=False)
    stock = load_policy(policy.model, config=repeating, tokenizer=tokenizer).policy
    assert_same(shared, gradients(stock, pad(GROUPS, pad_token_id=0)))


def test_a_sliding_window_is_felt(tiny_model):
    """The window changes the logits; without this, parity would hold if both sides ignored it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(family_model("Mistral"), config=GRAOConfig(), tokenizer=tokenizer).policy
    with policy.updating():
        narrow = policy.hidden(pack(GROUPS))
    policy.model.config.sliding_window = None
    for layer in policy.model.model.layers:
        layer.self_attn.config.sliding_window = None
    with policy.updating():
        wide = policy.hidden(pack(GROUPS))
    assert float((narrow - wide).detach().abs().max()) > 1e-3


def test_a_window_of_the_mask_alone_is_refused(tiny_model):
    """Phi-MoE is refused: its window is part of the mask, which a shared prefix replaces."""
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=20)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"sliding_window=20 .*share_prefix=False"):
        load_policy(model, config=GRAOConfig(), tokenizer=tokenizer)


def test_a_head_that_is_not_understood_is_refused(tiny_model):
    model = family_model("Llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model.config.logit_scale = 2.0  # a factor that Llama does not apply
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: logits .* differ"):
        load_policy(model, config=GRAOConfig(), tokenizer=tokenizer)


def test_an_adapter_on_the_head_is_refused(tiny_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(ValueError, match="lm_head"):
        load_policy(
            tiny_model,
            config=GRAOConfig(),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
        )


def test_transforms_are_read_from_the_config():
    def read(name: str, **options) -> LogitTransform:
        return LogitTransform.from_config(getattr(transformers, f"{name}Config")(**options))

    assert read("Gemma2", final_logit_softcapping=30.0) == LogitTransform(1.0, 30.0)
    assert read("Granite", logits_scaling=4.0) == LogitTransform(0.25, None)
    assert read("RecurrentGemma", logits_soft_cap=30.0) == LogitTransform(1.0, 30.0)
    assert read("Cohere", logit_scale=0.0625) == LogitTransform(0.0625, None)
    assert read("Llama") == LogitTransform(1.0, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [("./no/such/folder", "does not exist"), ("/no/such/folder", "does not exist")],
)
def test_a_missing_folder_is_said_at_once(model: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_policy(model, config=GRAOConfig())


def test_gradients_that_are_not_the_models_are_refused(tiny_model, monkeypatch):
    """Keys pass no gradient on, a fault that the logits do not show."""

    def without_key_gradients(query, key, *rest, **options):
        return attend(query, key.detach(), *rest, **options)

    attend = sdpa.attend
    hook = functools.partial(packed_attention, attend=without_key_gradients)
    monkeypatch.setitem(AttentionInterface._global_mapping, "grao_parts", hook)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: gradients .* differ .*share_prefix"):
        load_policy(family_model("Llama"), config=GRAOConfig(), tokenizer=tokenizer)
    load_policy(family_model("Llama"), config=GRAOConfig(), tokenizer=tokenizer, trained=False)


def test_a_sequence_that_sees_the_one_beside_it_is_refused(tiny_model):
    """A weak short convolution in every layer's input leaks, without a cache that reveals it."""
    model = family_model("Llama")

    def convolve(module, args, kwargs):
        x = args[0]
        return (x + 1e-5 * torch.cat([x[:, :1], x[:, :-1]], dim=1), *args[1:]), kwargs

    for layer in model.model.layers:
        layer.register_forward_pre_hook(convolve, with_kwargs=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"a sequence sees their tokens: .*set share_prefix=False"):
        load_policy(model, config=GRAOConfig(), tokenizer=tokenizer)
    load_policy(model, config=GRAOConfig(share_prefix=False), tokenizer=tokenizer)


def test_a_sampler_that_says_other_log_probs_is_refused(tiny_model, monkeypatch):
    """A sampler that applies an undeclared temperature would be off-policy in silence."""

    def warmer(logits, temperature, u):
        return draw(logits / 1.1, temperature, u)

    draw = transformers_sampler.draw
    monkeypatch.setattr(transformers_sampler, "draw", warmer)
    message = r"LlamaForCausalLM: log-probs of TransformersSampler differ .* nats"
    with pytest.raises(ValueError, match=message):
        load_policy(tiny_model, config=GRAOConfig(gradient_checkpointing=False))


def test_a_model_that_cannot_be_sampled_is_refused_at_the_start(tiny_model, monkeypatch):
    def prefill(*_):
        raise IndexError("no such layer")

    monkeypatch.setattr(transformers_sampler.TransformersSampler, "_prefill", prefill)
    message = "LlamaForCausalLM cannot be sampled by TransformersSampler: no such layer"
    with pytest.raises(ValueError, match=message):
        load_policy(tiny_model, config=GRAOConfig(gradient_checkpointing=False))


def test_the_check_at_the_start_leaves_no_trace(tiny_model):
    policy = load_policy(tiny_model, config=GRAOConfig(gradient_checkpointing=False)).policy
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert not policy.model.get_input_embeddings()._forward_hooks
    assert "forward" not in vars(policy.causal_lm)  # that ran the losses
    assert policy.causal_lm.config._attn_implementation == "sdpa"


def test_a_deep_copy_of_a_model_that_answers_objectives_computes_with_its_own_weights(
    tiny_model: Path,
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    answer_objectives(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        ids_BL = torch.tensor([[5, 6, 7]])
        assert copied(ids_BL).logits.count_nonzero() == 0
        assert model(ids_BL).logits.count_nonzero() > 0
