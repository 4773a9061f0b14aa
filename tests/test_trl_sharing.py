"""GRAOTrainer computes each prompt of a micro-batch once, where the model allows it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import HYBRIDS, SIZES
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, Lfm2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

pytest.importorskip("trl")

from trl_runs import CHECKPOINTING, assert_same, config, double_of, kept, prompts, run, truth

from grao_fast.distributed.world import World
from grao_fast.integrations.trl import GRAOTrainerConfig, head, trainer
from grao_fast.integrations.trl.datasets import check_have_tokens
from grao_fast.integrations.trl.layout import Layout, lay_out
from grao_fast.integrations.trl.policy import policy_of
from grao_fast.models.policy import Policy

CAUSE = "each prompt is computed for each of its samples"


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Layout]]:
    """For each pass of a loss or for log-probs, the tokens of its sequences, and its layout."""
    found = []

    def keep(ids_SL: Any, mask_SL: Any, columns: int, *, share_prefix: bool) -> Layout:
        found.append(
            (int(mask_SL.sum()), lay_out(ids_SL, mask_SL, columns, share_prefix=share_prefix))
        )
        return found[-1][1]

    for module in (trainer, head):
        monkeypatch.setattr(module, "lay_out", keep)
    return found


def test_a_packed_pass_has_every_token_at_its_position_and_equal_prompts_once():
    """Prompts that are the end of others or have one token, and sequences without tokens."""
    torch.manual_seed(0)
    prompt_SP = torch.randint(2, 9, (7, 5))
    prompt_SP[1] = prompt_SP[4] = prompt_SP[0]
    start_S, length_S = torch.tensor([2, 2, 0, 3, 2, 4, 1]), torch.tensor([3, 4, 1, 2, 0, 2, 0])
    prompt_SP[6] = prompt_SP[2].roll(1)
    prompt_SP[3, 3:] = prompt_SP[0, 2:4]
    mask_SL = torch.cat(
        [torch.arange(5) >= start_S[:, None], torch.arange(4) < length_S[:, None]], dim=1
    )
    ids_SL = torch.cat([prompt_SP, torch.randint(2, 9, (7, 4))], dim=1) * mask_SL
    layout = lay_out(ids_SL, mask_SL.long(), 5, share_prefix=True)
    (ids_T,), (position_T,) = layout.inputs["input_ids"], layout.inputs["position_ids"]
    position_SL = mask_SL.long().cumsum(1) - 1
    assert torch.equal(ids_T[layout.place_SL][mask_SL], ids_SL[mask_SL])
    assert torch.equal(position_T[layout.place_SL][mask_SL], position_SL[mask_SL])
    # 3 of 7 prompts are equal. The last sequence is empty and alone behind its prompt: it gets a
    # token that nothing reads.
    assert len(layout.inputs["segments"]) == 5
    assert len(ids_T) == (3 + 5 + 2 + 1 + 4) + int(length_S.sum()) + 1
    assert layout.inputs["segments"][0].suffix_lengths == (3, 4)
    assert layout.inputs["segments"][-1].stop == len(ids_T)
    assert (layout.place_SL[0, 2:5] == layout.place_SL[4, 2:5]).all()
    row_T = layout.before(torch.tensor([0, 1, 1]), torch.tensor([5, 5, 6]))
    assert row_T.tolist() == [2, 2, 6]
    empty = lay_out(ids_SL[:, :5], mask_SL[:, :5].long(), 5, share_prefix=True)
    assert empty.inputs["segments"][0].suffix_lengths == (1,)


def test_both_layouts_learn_alike(tiny_model: Path, tmp_path: Path, layouts: list):
    """Over two updates of a rollout, with ratios, a KL penalty and recomputed layers."""

    def learnt(share_prefix: bool | None) -> tuple[list, list, list]:
        args = config(
            tmp_path,
            GRAOTrainerConfig,
            per_device_train_batch_size=6,
            gradient_accumulation_steps=1,
            num_iterations=2,
            max_steps=2,
            beta=0.3,
            share_prefix=share_prefix,
            lr_scheduler_type="constant",
            **{CHECKPOINTING: True},
        )
        layouts.clear()
        done = run(tiny_model, args, prompts(["live"] * 6), lr=0.02)
        assert done.model.config._attn_implementation == "sdpa"
        return done.gradients, done.state.log_history[:2], list(layouts)

    repeated, logs_repeated, rows = learnt(False)
    shared, logs_shared, packed = learnt(None)
    assert [tokens for tokens, _ in rows] == [tokens for tokens, _ in packed]
    for tokens, layout in packed:
        computed = layout.inputs["input_ids"].numel()
        assert computed == layout.inputs["segments"][-1].stop < 0.7 * tokens
    assert all("segments" not in layout.inputs for _, layout in rows)
    for one, other in zip(logs_repeated, logs_shared, strict=True):
        assert {"loss", "kl", "entropy", "clip_ratio/region_mean"} <= one.keys() == other.keys()
        for name in one.keys() - {"step_time"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    for before, after in zip(repeated, shared, strict=True):
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(*shared, strict=True)) > 1e-3


def hybrid(tiny_model: Path, folder: Path) -> Path:
    """A model with a layer that carries a state from token to token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = SIZES | HYBRIDS["Lfm2"] | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Lfm2Config(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_cannot_share_repeats_prompts_and_says_why(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, layouts: list
):
    model = hybrid(tiny_model, tmp_path / "model")
    with caplog.at_level(logging.WARNING, "grao_fast"):
        done = run(model, config(tmp_path), prompts(["live"] * 6))
    assert f"{CAUSE}: Lfm2ForCausalLM carries a state" in caplog.text
    assert all("segments" not in layout.inputs for _, layout in layouts)
    double = double_of(model)
    truth(double, *kept(done)[0]).loss.backward()
    assert_same(done.gradients[0], double)
    caplog.clear()
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM carries .*set share_prefix=False"):
        run(model, config(tmp_path), prompts(["live"] * 6), share_prefix=True)
    with caplog.at_level(logging.WARNING, "grao_fast"):
        run(model, config(tmp_path), prompts(["live"] * 6), share_prefix=False)
    assert CAUSE not in caplog.text


def policy(
    model: Any, tokenizer: Any, share_prefix: bool | None, dtype: torch.dtype | None = None
) -> Policy:
    return policy_of(
        model,
        tokenizer,
        World(),
        share_prefix=share_prefix,
        autocast_dtype=dtype,
        recompute=False,
    )


@pytest.mark.parametrize("family", ["Lfm2", "FalconH1"])
def test_a_state_is_found_in_bfloat16_too(tiny_model: Path, family: str):
    """Where the rounding of a pass hides what leaks through it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sizes = SIZES | HYBRIDS[family] | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    assert not policy(model, tokenizer, None, torch.bfloat16).share_prefix


def test_an_attention_of_ones_own_is_left_to_its_user(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
):
    AttentionInterface.register("own_sdpa", sdpa_attention_forward)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.set_attn_implementation("own_sdpa")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with caplog.at_level(logging.WARNING, "grao_fast"):
        assert not policy(model, tokenizer, None).share_prefix
    assert f"{CAUSE}: the attention is 'own_sdpa'; set share_prefix=False to keep it" in caplog.text
    assert policy(model, tokenizer, True).attention == "grao_parts"


def test_a_prompt_without_tokens_is_refused():
    mask_BP = torch.tensor([[0, 1], [0, 0], [1, 1]])
    with pytest.raises(ValueError, match="row 1 of the batch: the prompt has no tokens"):
        check_have_tokens(mask_BP)
    check_have_tokens(mask_BP[::2])


def test_a_loss_outside_of_steps_is_in_nobodys_way(tiny_model: Path, tmp_path: Path):
    """A loss that no step asks for keeps its attention until the next loss, rollout or step."""
    done = run(tiny_model, config(tmp_path, max_steps=2), prompts(["live"] * 6))
    _, batch = done.rollouts[0]
    expected = done._compute_loss(done.model, batch).item()
    assert done.model.config._attn_implementation == "grao_parts"
    assert done._compute_loss(done.model, batch).item() == pytest.approx(expected)
    done.train()
    assert done.model.config._attn_implementation == "sdpa"


def test_the_option_is_checked(tiny_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="share_prefix must be one of True, False, None; got 'no'"):
        config(tmp_path, GRAOTrainerConfig, share_prefix="no")
    args = config(tmp_path, GRAOTrainerConfig)
    with pytest.raises(ValueError, match="share_prefix=True is a keyword of GRAOTrainer, and args"):
        run(tiny_model, args, prompts(["live"] * 6), share_prefix=True)
