"""A mixture of experts keeps its router's auxiliary loss, however a step is split."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from families import GROUPS, family_model, gradients
from test_off_policy_step import one_update
from test_trainer import CONFIG, sampled
from transformers import AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.packing import pack
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.step import micro_batch_loss

MIXTURES = ["Mixtral", "Qwen3Moe"]


def load(family: str, tiny_model, config: GRAOConfig | None = None, **options) -> LoadedPolicy:
    model = family_model(family)
    for name, value in options.items():
        setattr(model.config, name, value)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return load_policy(model, config=config or GRAOConfig(), tokenizer=tokenizer)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_group_of_one_sequence_has_the_models_own(family: str, tiny_model):
    model = family_model(family)
    alone = dataclasses.replace(GROUPS[0], terms_CK=torch.tensor([[0.0, 0.0, 1.0]]))
    tokens = torch.tensor([alone.prompt_ids + alone.sequence_ids[2]])
    own = model(tokens, output_router_logits=True).aux_loss.detach()
    for share_prefix in (True, False):
        policy = load(family, tiny_model, GRAOConfig(share_prefix=share_prefix)).policy
        with policy.updating():
            batch = policy.lay_out([alone])
            loss = policy.at_head(batch, partial(policy.router_loss, batch=batch)).detach()
        assert float(loss) == pytest.approx(0.1 * float(own), rel=1e-5)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_it_does_not_depend_on_how_the_step_was_split(family: str, share_prefix: bool, tiny_model):
    """Loss and gradients of two groups in one micro-batch, and in two; N counts a dead third."""
    config = GRAOConfig(share_prefix=share_prefix)
    results = []
    for parts in ([GROUPS], [[group] for group in GROUPS]):
        policy = load(family, tiny_model, config).policy
        total = 0.0
        with policy.updating():
            for part in parts:
                loss = micro_batch_loss(
                    policy, policy.lay_out(part), config.objective_options, num_prompts=3
                )
                loss.loss.backward()
                total += float(loss.router)
        results.append((total, [p.grad for p in policy.model.parameters()]))
    (whole, of_whole), (split, of_split) = results
    assert whole == pytest.approx(split, rel=1e-6)
    for ours, theirs in zip(of_whole, of_split, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_its_gradient_reaches_the_router(tiny_model):
    """The loss is felt: with four times the coefficient, four times the gradient."""
    policy = load("Mixtral", tiny_model).policy
    batch = pack(GROUPS)
    routers = [name for name, _ in policy.model.named_parameters() if name.endswith("gate.weight")]
    assert routers

    def router_gradients(coef: float) -> list[torch.Tensor]:
        router = dataclasses.replace(policy.router, coef=coef)
        found = gradients(dataclasses.replace(policy, router=router), batch)[1]
        return [found[name] for name in routers]

    none, once, four = (router_gradients(coef) for coef in (0.0, 1.0, 4.0))
    for a, b, c in zip(none, once, four, strict=True):
        assert float((b - a).abs().max()) > 0
        assert torch.allclose(c - a, 4 * (b - a), rtol=1e-3, atol=1e-5 * float(c.abs().max()))


def test_a_step_reports_it(tiny_model):
    loaded = load("Qwen3Moe", tiny_model, CONFIG)

    def rising(prompts, completions):  # this model's answers say nothing: any that differ will do
        return [float(i) for i in range(len(completions))]

    rollout = sampled(loaded, rising, CONFIG)
    metrics = one_update(loaded, rollout, CONFIG, lr=0.1)
    terms = sum(metrics[f"objective/{name}"] for name in ("exploration", "imitation", "alignment"))
    assert metrics["router_loss"] > 0
    assert metrics["loss"] == pytest.approx(metrics["router_loss"] - terms, abs=1e-6)
    assert metrics["flops/done"] > 0


def test_without_the_flag_there_is_none(tiny_model):
    policy = load("Mixtral", tiny_model, output_router_logits=False).policy
    assert policy.router is None


def test_a_model_whose_loss_cannot_be_found_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*output_router_logits = False"):
        load("Llama", tiny_model, output_router_logits=True)
