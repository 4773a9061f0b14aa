"""The policy computes what the model computes: shared prompts, heads and logit transforms."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_fast.batch import Group, pack, pad
from grao_fast.config import GRAOConfig
from grao_fast.policy import LogitTransform, load_policy

SIZES = {
    "vocab_size": 75,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 4},
    "Gemma2": {"sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5},
    "Gemma3Text": {"sliding_window": 4},
    "Phi3": {},
    "Granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "Olmo2": {},
    "Cohere2": {"logit_scale": 0.3, "sliding_window": 4},
    "Mixtral": {"num_local_experts": 4},
}
GROUPS = [
    Group(
        [5, 6, 7, 8, 9, 10],
        [[11, 12, 13], [14], [15, 16, 17, 18, 19, 20, 1]],
        torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64),
        torch.tensor([True, True, True]),
    ),
    Group(
        [21, 22],
        [[23, 24, 25, 26, 27, 28], [29, 30, 1], [31]],
        torch.tensor([0.0, 2.0, 1.0], dtype=torch.float64),
        torch.tensor([True, False, True]),
    ),
]


def family_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # fresh norms of 1 would hide a misplaced scale
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.2)
    return model


def gradients(policy, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.model.zero_grad()
    with policy.updating():
        hidden = policy.hidden(batch)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), [
        p.grad.clone() for p in policy.model.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_gradients_of_repeated_ones(
    family: str, checkpointing: bool, tiny_model
):
    """Relative 1e-5 in the max norm of each tensor: float32 rounding through two layers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(
        family_model(family),
        config=GRAOConfig(gradient_checkpointing=checkpointing),
        tokenizer=tokenizer,
    )
    hidden, shared = gradients(policy, pack(GROUPS))
    stock = load_policy(
        policy.model,
        config=GRAOConfig(share_prefix=False, gradient_checkpointing=checkpointing),
        tokenizer=tokenizer,
    )
    expected, repeated = gradients(stock, pad(GROUPS, pad_token_id=0))
    assert torch.allclose(hidden, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(shared) == len(repeated)
    for ours, theirs in zip(shared, repeated, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_a_sliding_window_is_felt(tiny_model):
    """The parity above would also hold if both sides ignored the window."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(family_model("Mistral"), config=GRAOConfig(), tokenizer=tokenizer)
    with policy.updating():
        narrow = policy.hidden(pack(GROUPS))
    policy.model.config.sliding_window = None
    for layer in policy.model.model.layers:
        layer.self_attn.config.sliding_window = None
    with policy.updating():
        wide = policy.hidden(pack(GROUPS))
    assert float((narrow - wide).abs().max()) > 1e-3


def test_a_window_of_the_mask_alone_is_refused(tiny_model):
    """Phi-MoE builds its window into the mask, which a shared prefix does without."""
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
    assert read("Cohere", logit_scale=0.0625) == LogitTransform(0.0625, None)
    assert read("Llama") == LogitTransform(1.0, None)


@pytest.mark.parametrize(
    ("model", "message"),
    [("./no/such/folder", "does not exist"), ("/no/such/folder", "does not exist")],
)
def test_a_missing_folder_is_said_at_once(model: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_policy(model, config=GRAOConfig())
