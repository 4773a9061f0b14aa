"""The token budget: what a pass holds, how much of it fits, and that nothing else is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import family_model
from test_trainer import CONFIG, ROWS, StopAt, lines, run, same_bits
from transformers import AutoTokenizer

from grao_fast.config import GRAOConfig
from grao_fast.data.examples import load_examples
from grao_fast.models.policy import Policy
from grao_fast.objectives.grao import GRAO
from grao_fast.sampling.loading import load_policy
from grao_fast.training import memory
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.held_bytes import HeldBytes
from grao_fast.training.optim import adamw

MIB = 2**20
FOUND = CONFIG.replace(max_tokens_per_microbatch=None, workspace_mib=1)


@pytest.mark.parametrize("most", [1, 2, 7, 64])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 6, 40, 1000])
def test_the_most_that_fit_are_found(room: int, most: int):
    asked = []

    def peak(n: int) -> float:
        asked.append(n)
        return 10 + 5 * n

    assert memory.most_that_fit(peak, 10 + 5 * room, most) == min(room, most)
    assert max(asked) <= most


def test_a_parabola_goes_through_its_points():
    assert memory.parabola([2, 4, 8], [5 + 3 * x + 2 * x * x for x in (2, 4, 8)]) == (5, 3, 2)
    assert memory.parabola([1, 2, 4], [1, 3, 5]) == (1, 1, 0)  # it would bend down: a line


@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": False}, {"share_prefix": False}]
)
@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", pytest.param("Gemma2", marks=pytest.mark.slow)]
)
def test_the_estimate_is_what_a_pass_holds(family: str, options: dict, tiny_model):
    """Of groups four times as large as the largest that it was made of.

    It may be too high: Gemma 2 holds the scores of one group at a time, which we add up.
    """
    config = GRAOConfig(num_generations=3, workspace_mib=1, **options)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = load_policy(family_model(family), config=config, tokenizer=tokenizer).policy
    shape = GroupShape(400, (480, 480, 480, 240))
    with memory._untouched(policy):
        probe = memory.Probe(policy, config.objective_options, config.workspace_mib)
        estimate = memory._estimated_peak(probe, shape)
        for count in (1, 2):
            with HeldBytes(policy) as held:
                probe.run(shape.group(), count)
            actual = held.peak + held.gradients_peak + config.workspace_mib * MIB
            assert 0.98 <= estimate(count) / actual <= 1.35


def load(tiny_model, config: GRAOConfig) -> tuple[Policy, GroupShape]:
    """A policy, and the largest group of its prompts."""
    loaded = load_policy(tiny_model, config=config)
    prompts = loaded.encode(load_examples(ROWS), config.sampling)
    return loaded.policy, GroupShape.largest(prompts, config.sampling, GRAO())


def budget(policy: Policy, shape: GroupShape, config: GRAOConfig) -> int:
    return memory.token_budget(
        policy,
        adamw(policy.model, config.optimisation),
        shape,
        config.objective_options,
        most=config.prompts_per_step,
        memory_budget_mib=config.memory_budget_mib,
        workspace_mib=config.workspace_mib,
    )


def test_a_budget_is_filled_and_not_exceeded(tiny_model):
    config = FOUND.replace(memory_budget_mib=3, prompts_per_step=7)
    policy, shape = load(tiny_model, config)
    found = budget(policy, shape, config)
    count, rest = divmod(found, shape.group().size.packed)
    assert rest == 0
    assert 1 <= count < config.prompts_per_step
    sizes = []
    with memory._untouched(policy):
        for n in (count, count + 1):
            with HeldBytes(policy) as held:
                memory.Probe(policy, config.objective_options, config.workspace_mib).run(
                    shape.group(), n
                )
            sizes.append(held.peak + held.gradients_peak + MIB)
    assert sizes[0] <= 3 * MIB < sizes[1]


def test_finding_it_leaves_no_trace(tiny_model):
    policy, shape = load(tiny_model, FOUND)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    budget(policy, shape, FOUND)
    assert torch.equal(torch.rand(4), expected)
    after = policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_what_cannot_fit_is_said_before_the_first_step(tiny_model, tmp_path: Path):
    config = FOUND.replace(memory_budget_mib=1)
    with pytest.raises(ValueError, match=r"5 sequences of up to .* and 1 MiB are there.*Lower max"):
        run(tiny_model, tmp_path, config=config)
    assert not [row for row in lines_if_any(tmp_path) if "loss" in row]


def lines_if_any(output: Path) -> list[dict]:
    return lines(output) if (output / "metrics.jsonl").exists() else []


def test_a_run_that_found_its_budget_resumes_bit_for_bit(tiny_model, tmp_path: Path):
    config = FOUND.replace(memory_budget_mib=2, max_steps=4)
    run(tiny_model, tmp_path / "whole", config=config)
    run(tiny_model, tmp_path / "parts", config=config, callbacks=[StopAt(2)])
    run(tiny_model, tmp_path / "parts", config=config, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["PyTorch", "Triton", "cuBLAS"],
)
def test_on_cuda_passes_are_run_until_memory_runs_out(tiny_model, monkeypatch, error):
    """The bookkeeping alone: torch.cuda is replaced, and three groups are more than there is."""
    policy, _ = load(tiny_model, FOUND)
    ran = []

    def fake_run(probe, group, count):
        ran.append(count)
        if count > 2:
            raise error

    monkeypatch.setattr(memory.Probe, "run", fake_run)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 + 100 * ran[-1])
    peak = memory._measured_peak(
        memory.Probe(policy, FOUND.objective_options), GroupShape(3, (2, 2))
    )
    assert [peak(n) for n in (1, 2, 4, 1)] == [100, 200, float("inf"), 100]
    assert ran == [1, 2, 4]
    assert memory.most_that_fit(peak, 1e9, 8) == 2


def test_on_cuda_other_errors_of_a_pass_are_not_taken_for_memory(tiny_model, monkeypatch):
    policy, _ = load(tiny_model, FOUND)

    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory.Probe, "run", fail)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory._measured_peak(memory.Probe(policy, FOUND.objective_options), GroupShape(3, (2, 2)))(
            1
        )
