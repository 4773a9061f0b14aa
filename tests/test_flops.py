"""FLOPs are those that PyTorch counts; pairs are those that the mask lets through."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import FAMILIES, GROUPS, family_model
from torch import nn
from torch.utils import flop_counter
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AttentionInterface, AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import Group, pack, pad
from grao_fast.models.attention import flex
from grao_fast.sampling.loading import load_policy
from grao_fast.training.flops import ModelCost, batch_work, group_work, layer_windows, update_flops

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def ungrouped(query, key, value):
    """Shapes with a key/value head for every query head: grouped ones torch 2.11 cannot count."""
    return query, (*query[:2], *key[2:]), (*query[:2], *value[2:])


def attention_flops(query, key, value, *rest, out_shape=None, **options) -> int:
    return flop_counter.sdpa_flop_count(*ungrouped(query, key, value))


def attention_backward_flops(grad, query, key, value, *rest, out_shape=None, **options) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, *ungrouped(query, key, value))


# PyTorch has these formulas, and applies them on CUDA only.
ON_CPU = {ATTENTION: attention_flops, ATTENTION_BACKWARD: attention_backward_flops}

FUSED = torch._fused_sdp_choice(
    *(torch.ones(1, heads, 1, 8) for heads in (4, 2, 2)), is_causal=True, enable_gqa=True
)
needs_fused_attention = pytest.mark.skipif(
    not FUSED, reason="this torch has no fused attention with grouped heads on CPUs"
)


def counted_flops(counter: flop_counter.FlopCounterMode) -> int:
    """Without the product by which Transformers before 5.20 makes the angles of positions."""
    angles = (n for name, n in counter.get_flop_counts().items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in angles)


def short(prompt: int, samples: int) -> Group:
    """A prompt and sequences of one token each: each query sees every key of its part."""
    return Group([prompt], [[k + 5] for k in range(samples)])


# With an adapter and no recomputation the first layer's inputs need no gradient, which we count.
@needs_fused_attention
@pytest.mark.parametrize(("adapter", "recompute"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("family", ["Llama", "Granite", "Qwen2"])
def test_flops_are_those_that_pytorch_counts(family, adapter, recompute, tiny_model):
    """PyTorch counts whole rectangles in attention, so the groups are such that they are full.

    It stops recomputing before a layer's last product, which we count, unless told not to.
    """
    peft_config = None
    if adapter:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        peft_config = peft.LoraConfig(r=2, target_modules="all-linear")
    policy = load_policy(
        family_model(family),
        config=GRAOConfig(gradient_checkpointing=recompute),
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=peft_config,
    ).policy
    batch = pack([short(1, 4), short(2, 4)])
    head, bias = policy.head()
    with (
        policy.updating(),
        set_checkpoint_early_stop(False),
        flop_counter.FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter,
    ):
        nn.functional.linear(policy.hidden(batch), head, bias).sum().backward()
    cost = ModelCost.of(policy.causal_lm, recompute=policy.recomputes)
    assert cost.updates(batch_work(batch, cost.layers)) == counted_flops(counter)
    assert policy.recomputes == recompute


@needs_fused_attention
def test_scoring_is_one_forward_pass(tiny_model):
    policy = load_policy(tiny_model, config=GRAOConfig()).policy
    batch = pack([short(1, 4), short(2, 4)])
    with (
        torch.no_grad(),
        policy.updating(),
        flop_counter.FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter,
    ):
        nn.functional.linear(policy.hidden(batch), policy.head()[0])
    cost = ModelCost.of(policy.causal_lm, recompute=True)
    assert cost.scores(batch_work(batch, cost.layers)) == counted_flops(counter)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_pairs_are_those_of_the_mask(window: int | None):
    batch = pack(GROUPS)
    L = batch.input_ids_BL.shape[1]
    sees = flex.mask_of(batch.segments, window, torch.device("cpu"))
    mask = sees(None, None, torch.arange(L)[:, None], torch.arange(L))
    assert batch_work(batch, [window]).pairs[window] == int(mask.sum())
    repeated = group_work(6, [3, 1, 7], [window], share_prefix=False)
    by_hand = sum(min(p + 1, window or 99) for n in (9, 7, 13) for p in range(n))
    assert repeated.pairs[window] == by_hand


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_that_the_layers_ask_for(family: str, monkeypatch, tiny_model):
    model = family_model(family)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(
        model, config=GRAOConfig(gradient_checkpointing=False), tokenizer=tokenizer
    ).policy
    packed, asked = AttentionInterface._global_mapping["grao_parts"], []

    def watched(*tensors, sliding_window=None, **options):
        asked.append(sliding_window)
        return packed(*tensors, sliding_window=sliding_window, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "grao_parts", watched)
    with policy.updating():
        policy.hidden(pack(GROUPS))
    assert asked == layer_windows(model.config)


def test_a_mixture_counts_the_experts_that_a_token_meets():
    model = family_model("Qwen3Moe")
    experts = [p.numel() for p in model.parameters() if p.ndim == 3]
    half = ModelCost.of(model, recompute=False)
    model.config.num_experts_per_tok = 4
    assert ModelCost.of(model, recompute=False).forward - half.forward == sum(experts)


def test_what_is_saved_is_what_was_left_out():
    """Done and saved are all groups together, whichever way they are laid out."""
    cost = ModelCost.of(family_model("Mistral"), recompute=True)
    dead = dataclasses.replace(GROUPS[0], terms_CK=torch.zeros(1, 3))
    alive = [dataclasses.replace(group, terms_CK=torch.ones(1, 3)) for group in (*GROUPS, dead)]
    groups = [*GROUPS, dead]
    options = {"updates": 2, "scored": True}
    packed = update_flops(cost, groups, [pack(GROUPS)], share_prefix=True, **options)
    all_of_them = update_flops(cost, alive, [pack(alive)], share_prefix=True, **options)
    assert packed["flops/saved_dead"] > 0
    done = packed["flops/done"] + packed["flops/saved_dead"]
    assert done == all_of_them["flops/done"]
    alone = [
        pad(
            [dataclasses.replace(group, terms_CK=(torch.arange(3) == k)[None].double())],
            pad_token_id=0,
        )
        for group in GROUPS
        for k in group.live_sequences
    ]
    repeated = update_flops(cost, groups, alone, share_prefix=False, **options)
    assert repeated["flops/done"] == packed["flops/done"] + packed["flops/saved_prefix"]
    assert repeated["flops/saved_prefix"] == 0
