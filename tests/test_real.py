"""A real model on real data: SmolLM2-135M-Instruct on Anthropic's HH harmless-base.

The model's folder is named by GRAO_SMOLLM2 (docs/examples/harmless.md makes one); the data is
looked for beside the checkout.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from families import gradients
from tolerance import assert_accurate
from transformers import AutoModelForCausalLM

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.config import GRAOConfig
from grao_fast.data.examples import load_examples
from grao_fast.data.packing import Group
from grao_fast.rewards import resolve_reward
from grao_fast.sampling.loading import load_policy
from grao_fast.training.coefficients import to_groups
from grao_fast.training.rollout import sample_and_score
from grao_fast.training.state import DataStream
from grao_fast.training.step import micro_batch_loss

DATA = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf" / "harmless-base"
MODEL = os.environ.get("GRAO_SMOLLM2", "")

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MODEL, reason="GRAO_SMOLLM2 names no model folder"),
]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no HH harmless-base in {DATA}")

CONFIG = GRAOConfig(
    num_generations=3,
    max_new_tokens=12,
    max_prompt_length=96,
    max_reference_length=24,
    prompts_per_step=2,
    learning_rate=1e-5,
    max_steps=2,
    save_steps=1,
    disable_tqdm=True,
    device="cpu",
    bf16=False,
)


@pytest.fixture(autouse=True, scope="module")
def all_cores():
    """The other tests are tiny and run on one."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


def shorter(prompts, completions):
    """A reward with a spread and no need of another model."""
    return [-float(len(messages[-1]["content"])) for messages in completions]


class Stop(Callback):
    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
        return True


def rows(split: str, count: int) -> list[dict]:
    examples = load_examples(DATA / f"{split}.jsonl.gz")
    chosen = islice((e for e in examples if e.reference and len(e.prompt) == 1), count)
    return [{"prompt": e.prompt, "reference": e.reference} for e in chosen]


@needs_data
def test_steps_save_resume_evaluate(tmp_path: Path):
    """Two steps; the run that stops after one and resumes ends with the same bits."""
    data = {"dataset": rows("train", 24), "reward": shorter, "config": CONFIG}
    whole = grao_fast.train(
        MODEL, **data, eval_dataset=rows("test", 4), output_dir=tmp_path / "whole"
    )
    assert whole.steps == 2
    assert 0 <= whole.after.ras <= 1
    assert whole.after.nag is not None
    assert whole.metrics["grad_norm"] > 0
    grao_fast.train(MODEL, **data, output_dir=tmp_path / "parts", callbacks=[Stop()])
    grao_fast.train(MODEL, **data, output_dir=tmp_path / "parts", resume_from_checkpoint=True)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict()
        for name in ("whole", "parts")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@needs_data
def test_a_step_is_the_naive_formula():
    """Loss and gradients of one group of SmolLM2 against full logits of the stock model, float32.

    Relative 2e-4 in the max norm of each tensor: 30 layers of float32 in another order.
    """
    loaded = load_policy(MODEL, config=CONFIG)
    policy = loaded.policy
    prompts = loaded.encode(load_examples(rows("train", 4)), CONFIG.sampling)
    first = DataStream(len(prompts), 1, 0).batch(0)
    rollout = sample_and_score(
        loaded,
        resolve_reward(shorter),
        [prompts[i] for i in first],
        sampling=CONFIG.sampling,
        objective=CONFIG.objective_options,
        seed=1,
    )
    groups = to_groups(rollout, CONFIG.objective_options)
    with policy.updating():
        loss = micro_batch_loss(
            policy, policy.lay_out(groups), CONFIG.objective_options, num_prompts=1
        )
        loss.loss.backward()

    naive = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    from grao_fast.kernels.reference import sequence_weights

    weights = sequence_weights(
        rollout.advantages_NK,
        beta=CONFIG.beta,
        lam=CONFIG.lam,
        reference_advantage=CONFIG.reference_advantage,
    )[0]
    expected = torch.zeros(())
    for ids, weight in zip(groups[0].sequence_ids, weights.tolist(), strict=True):
        tokens = torch.tensor([groups[0].prompt_ids + ids])
        logits = naive(tokens).logits[0, len(groups[0].prompt_ids) - 1 : -1] / CONFIG.temperature
        logprobs = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        expected = expected - weight * logprobs.mean()
    expected.backward()
    assert abs(float(loss.loss.detach() - expected.detach())) < 1e-4
    for ours, theirs in zip(policy.model.parameters(), naive.parameters(), strict=True):
        assert float((ours.grad - theirs.grad).abs().max()) <= 2e-4 * float(theirs.grad.abs().max())


def test_shared_prompts_give_the_gradients_of_repeated_ones():
    """Two groups in one row, prompts computed once, against padded rows of stock attention.

    The whole gradient to 1e-5; and over the largest of its tensor, no element is further from
    float64 than the padded rows' are. (Of 272 tensors some are rounded worse on either side.)
    """
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(10, 49000, (length,), generator=generator).tolist()

    groups = [Group(ids(P), [ids(R) for R in (9, 4, 12)]) for P in (30, 7)]
    policy = load_policy(MODEL, config=CONFIG).policy
    stock = load_policy(policy.model, config=CONFIG.replace(share_prefix=False)).policy
    _, shared = gradients(policy, policy.lay_out(groups))
    _, repeated = gradients(stock, stock.lay_out(groups))
    stock.model.double()
    _, truth = gradients(stock, stock.lay_out(groups))
    ours, theirs = (
        torch.cat([found[name].flatten() for name in repeated]) for found in (shared, repeated)
    )
    assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
    scale = {name: tensor.abs().max() for name, tensor in truth.items()}
    sides = (
        torch.cat([(side[name].double() / scale[name]).flatten() for name in truth])
        for side in (shared, repeated, truth)
    )
    assert_accurate("the gradient, each tensor over its largest", *sides, torch.float32)
