"""Objectives as weighted tokens: what a plain consumer computes is the objective's loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published import assert_as_published
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from grao_fast.kernels import linear_weighted_cross_entropy, reference
from grao_fast.objectives import GRAO, GRPO, export
from grao_fast.objectives.dpo import DPO
from grao_fast.objectives.export import IGNORED, WeightedTokens
from grao_fast.objectives.luffy import LUFFY
from grao_fast.system.errors import UserError

V, D = 13, 8
PAPER = GRAO(reference_advantage="signed")
PROMPTS = [[3, 4, 5], [6, 7], [8]]
SEQUENCES = [
    [[1, 2], [3], [4, 5, 6]],
    [[7, 8], [9, 10], [11]],
    [[12], [], [2, 3]],
]
REWARDS_NK = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.5, 0.5], [0.2, torch.nan, 0.7]])


class Bigram(torch.nn.Module):
    """A language model of the last token and its place in the sequence, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tokens_VD = torch.nn.Parameter(
            torch.randn(V, D, generator=generator, dtype=torch.float64)
        )
        self.head_VD = torch.nn.Parameter(
            torch.randn(V, D, generator=generator, dtype=torch.float64)
        )

    def hidden(self, ids_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        lengths = cu_seqlens.diff()
        place_T = torch.cat([torch.arange(n) for n in lengths.tolist()])
        return self.tokens_VD[ids_T] * (1 + 0.1 * place_T[:, None])


def consumed(model: Bigram, tokens: WeightedTokens) -> torch.Tensor:
    """What a trainer that knows nothing of objectives computes."""
    logits = model.hidden(tokens.input_ids, tokens.cu_seqlens) @ model.head_VD.T
    losses = cross_entropy(logits, tokens.labels, reduction="none", ignore_index=IGNORED)
    return (losses * tokens.weights).sum()


def specified(model: Bigram, rewards_NK: torch.Tensor) -> torch.Tensor:
    """GRAO's loss of the same groups, by the specification."""
    hidden, target, sequence = [], [], []
    for n, group in enumerate(SEQUENCES):
        for k, ids in enumerate(group):
            row = torch.tensor(PROMPTS[n] + ids)
            of_row = model.hidden(row, torch.tensor([0, len(row)]))
            hidden.append(of_row[len(PROMPTS[n]) - 1 : -1])
            target += ids
            sequence += [n * 3 + k] * len(ids)
    return reference.grao_loss(
        torch.cat(hidden),
        model.head_VD,
        torch.tensor(target),
        torch.tensor(sequence),
        rewards_NK.double(),
        reference_advantage="signed",
    ).loss


def test_the_weighted_cross_entropy_is_the_objective_s_loss() -> None:
    model = Bigram()
    tokens = export(PROMPTS, SEQUENCES, REWARDS_NK, PAPER, max_new_tokens=8)
    loss, truth = consumed(model, tokens), specified(model, REWARDS_NK)
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-8)
    gradients = [torch.autograd.grad(each, model.parameters()) for each in (loss, truth)]
    way = "weighted tokens in a plain cross-entropy, in float64 but for the weights"
    assert_as_published(way, loss, truth, *gradients)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_the_kernel_consumes_it() -> None:
    model = Bigram().float()
    tokens = export(PROMPTS, SEQUENCES, REWARDS_NK, PAPER, max_new_tokens=8)
    loss = linear_weighted_cross_entropy(
        model.hidden(tokens.input_ids, tokens.cu_seqlens),
        model.head_VD,
        tokens.labels,
        tokens.weights,
    ).loss
    torch.testing.assert_close(loss, specified(model, REWARDS_NK), rtol=1e-5, atol=1e-6)


def test_sequences_without_weight_are_left_out() -> None:
    tokens = export(PROMPTS, SEQUENCES, REWARDS_NK, PAPER, max_new_tokens=8)
    assert tokens.cu_seqlens.diff().tolist() == [5, 4, 6, 2, 3]  # the second prompt's rewards tie
    assert tokens.input_ids[:5].tolist() == [3, 4, 5, 1, 2]
    assert tokens.labels[:5].tolist() == [IGNORED, IGNORED, 1, 2, IGNORED]
    assert tokens.weights[2] == tokens.weights[3] != 0
    dead = export(PROMPTS, SEQUENCES, torch.ones(3, 3), GRPO(), max_new_tokens=8)
    assert dead.input_ids.numel() == 0 and dead.cu_seqlens.tolist() == [0]


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    for rewards in (REWARDS_NK, torch.ones(3, 3)):
        tokens = export(PROMPTS, SEQUENCES, rewards, GRPO(), max_new_tokens=8)
        tokens.save(tmp_path / "step.safetensors")
        loaded = WeightedTokens.load(tmp_path / "step.safetensors")
        assert all(torch.equal(one, other) for one, other in zip(tokens, loaded, strict=True))


def test_files_that_break_the_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "step.safetensors"
    tokens = export(PROMPTS, SEQUENCES, REWARDS_NK, PAPER, max_new_tokens=8)
    save_file(tokens._asdict(), path)
    with pytest.raises(UserError, match=r"this reads .*weighted-tokens', version"):
        WeightedTokens.load(path)
    metadata = {"format": "grao-fast/weighted-tokens", "version": "1"}
    save_file({"input_ids": tokens.input_ids}, path, metadata=metadata)
    with pytest.raises(UserError, match="no tensor 'labels'"):
        WeightedTokens.load(path)
    shifted = tokens._asdict() | {"cu_seqlens": tokens.cu_seqlens + 1}
    save_file(shifted, path, metadata=metadata)
    with pytest.raises(UserError, match="must be int32, and rise from 0 to 20"):
        WeightedTokens.load(path)
    save_file(tokens._asdict() | {"labels": tokens.input_ids.clone()}, path, metadata=metadata)
    with pytest.raises(UserError, match="must be -100 exactly where weights are 0"):
        WeightedTokens.load(path)
    path.write_text("no safetensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        WeightedTokens.load(path)


def test_what_data_cannot_hold_is_refused() -> None:
    for objective, reason in ((DPO(), "log-probs"), (LUFFY(), "'luffy' of their own probability")):
        with pytest.raises(UserError, match=reason):
            export(PROMPTS, SEQUENCES, REWARDS_NK, objective, max_new_tokens=8)
    with pytest.raises(UserError, match="do not fit: every prompt has as many sequences"):
        export(PROMPTS[:2], SEQUENCES, REWARDS_NK, GRAO(), max_new_tokens=8)
    with pytest.raises(UserError, match="prompt 1 has no token"):
        export([[1], [], [2]], SEQUENCES, REWARDS_NK, GRAO(), max_new_tokens=8)
