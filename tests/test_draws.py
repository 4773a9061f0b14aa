"""Prompts worth sampling: dead groups are refilled, and their prompts rest."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_trainer import CONFIG, lines, rarely_equal, run, same_bits

from grao_fast.config import GRAOConfig
from grao_fast.sampling.seeds import prompt_seeds
from grao_fast.training.checkpoint import STATE
from grao_fast.training.draws import PromptDraws
from grao_fast.training.state import DataStream

ROWS = [{"prompt": "ab"[i % 2] * (1 + i), "reference": "c"} for i in range(9)]
BOTH = CONFIG.replace(dynamic_sampling=2, curriculum=True, prompts_per_step=3)


def half_dead(prompts: list[str], completions: list[str]) -> list[float]:
    """Equal rewards for all prompts of the letter a."""
    values = rarely_equal(prompts, completions)
    return [0.0 if prompt[0] == "a" else v for prompt, v in zip(prompts, values, strict=True)]


def draws(size: int = 7, batch_size: int = 3, *, curriculum: bool = True) -> PromptDraws:
    return PromptDraws(DataStream(size, batch_size, seed=1), curriculum=curriculum)


def step(drawn: PromptDraws, number: int, dead: set[int], further: int = 0) -> list[int]:
    """Indices that a step draws, of which some are dead."""
    indices = drawn.batch(number) + (drawn.more(further) if further else [])
    drawn.tell([(index, index in dead) for index in indices])
    drawn.done(number)
    return indices


def test_without_further_draws_a_step_has_its_batch() -> None:
    drawn = draws()
    for number in range(6):
        batch = drawn.stream.batch(number)
        assert drawn.planned(number) == batch
        assert step(drawn, number, set()) == batch
    assert drawn.epochs(6) == 18 / 7


def test_further_draws_go_on_in_the_stream() -> None:
    drawn, seen = draws(), []
    for number, further in enumerate((0, 2, 1, 4)):
        seen += step(drawn, number, set(), further)
    assert seen == drawn.stream.at(range(19))
    assert drawn.epochs(4) == 19 / 7


def test_a_step_that_is_not_done_changes_nothing() -> None:
    drawn = draws()
    step(drawn, 0, {0, 1, 2, 3, 4, 5, 6}, further=2)
    state = drawn.state(1)
    drawn.batch(1)
    drawn.more(3)
    drawn.tell([(0, True)])
    assert drawn.state(1) == state


def test_a_prompt_rests_for_one_epoch_then_two_four_and_eight() -> None:
    """And for none once its group was live."""
    drawn = draws(size=4, batch_size=1)
    visits, number = [], 0
    while len(visits) < 6:
        if 2 in step(drawn, number, {2}):
            visits.append(int(drawn.epochs(number + 1) - 0.01))
        number += 1
    assert [b - a for a, b in pairwise(visits)] == [2, 3, 5, 9, 9]
    assert drawn.resting == 1
    while 2 not in step(drawn, number, set()):
        number += 1
    assert drawn.state(number)["rests"] == {}


def test_prompts_that_all_rest_come_again() -> None:
    drawn = draws(size=5, batch_size=2)
    for number in range(40):
        assert len(step(drawn, number, set(range(5)))) == 2


def test_the_state_is_data_that_goes_on_alike() -> None:
    drawn, other = draws(), draws()
    for number in range(5):
        step(drawn, number, {1, 4}, further=number % 3)
    other.load(json.loads(json.dumps(drawn.state(5))))
    for number in range(5, 12):
        assert step(other, number, {4}) == step(drawn, number, {4})
    assert other.state(12) == drawn.state(12)
    other.load(None)
    assert other.state(12) == drawn.state(12)


def test_further_prompts_have_seeds_of_their_own() -> None:
    assert prompt_seeds(5, 4) == prompt_seeds(5, 7)[:4]
    assert len(set(prompt_seeds(5, 7))) == 7


# ---- in a run


def metrics(output: Path, name: str) -> list[Any]:
    return [row[name] for row in lines(output) if "loss" in row]


def train(tiny_model: Path, output: Path, config: GRAOConfig = BOTH, **options: Any) -> Any:
    return run(tiny_model, output, dataset=ROWS, reward=half_dead, config=config, **options)


def test_dead_groups_are_replaced_by_the_next_prompts(tiny_model, tmp_path: Path) -> None:
    """So that a step has as many live groups as it can get, and counts what that cost."""
    options = {"max_steps": 3, "save_steps": 0, "log_completions_steps": 1}
    config = BOTH.replace(curriculum=False, dynamic_sampling=12, **options)
    train(tiny_model, tmp_path / "on", config)
    train(tiny_model, tmp_path / "off", config.replace(dynamic_sampling=0))
    assert all(share > 0 for share in metrics(tmp_path / "off", "frac_dead"))
    assert metrics(tmp_path / "on", "frac_dead") == [0.0] * 3
    assert "dynamic_sampling/rounds" not in lines(tmp_path / "off")[0]
    groups, epoch = (
        metrics(tmp_path / "on", name) for name in ("dynamic_sampling/groups", "epoch")
    )
    assert epoch == pytest.approx([sum(groups[: i + 1]) / len(ROWS) for i in range(3)])
    assert [count - 3 for count in groups] >= metrics(tmp_path / "on", "dynamic_sampling/refilled")
    shares = metrics(tmp_path / "on", "dynamic_sampling/frac_dead")
    assert [round(s * g) for s, g in zip(shares, groups, strict=True)] == [g - 3 for g in groups]
    rows = [
        json.loads(line) for line in (tmp_path / "on/completions.jsonl").read_text().splitlines()
    ]
    assert {row["prompt"][0] for row in rows} == {"b"}


def test_rounds_are_bounded_and_what_is_dead_then_stays(tiny_model, tmp_path: Path) -> None:
    config = BOTH.replace(max_steps=1, save_steps=0)
    constant = {"dataset": ROWS, "reward": lambda completions: [0.5] * len(completions)}
    run(tiny_model, tmp_path, config=config, **constant)
    (row,) = lines(tmp_path)
    assert (row["dynamic_sampling/rounds"], row["dynamic_sampling/groups"]) == (2, 9)
    assert (row["dynamic_sampling/refilled"], row["frac_dead"], row["loss"]) == (0, 1.0, 0.0)


def test_a_run_that_chooses_its_prompts_resumes_bit_for_bit(tiny_model, tmp_path: Path) -> None:
    whole = train(tiny_model, tmp_path / "a").output_dir
    assert any(metrics(whole, "curriculum/resting"))
    assert any(metrics(whole, "curriculum/passed_over"))
    state = json.loads((whole / "checkpoint-2" / STATE).read_text())["draws"]
    assert state["beyond"] > 0 and state["rests"]
    train(tiny_model, tmp_path / "b", resume_from_checkpoint=whole / "checkpoint-2")
    assert lines(tmp_path / "b")[-4:] == lines(whole)[-4:]
    assert same_bits(tmp_path / "b/final", whole / "final")


@pytest.mark.parametrize("name", ["dynamic_sampling", "curriculum"])
def test_rollouts_ahead_cannot_wait_for_rewards(name: str) -> None:
    server = {"use_vllm": True, "vllm_mode": "server", "async_rollouts": 1}
    with pytest.raises(ValueError, match=rf"{name}=.* set one of the two"):
        GRAOConfig(**server, **{name: 1 if name == "dynamic_sampling" else True})
