"""Tests of the demo: its task, a short run, and, if slow tests are asked for, a whole one."""

from __future__ import annotations

import json

import pytest
import torch

from grao_fast.demo import run_demo
from grao_fast.demo.base_model import imitate, make_model, make_tokenizer
from grao_fast.demo.run import exact
from grao_fast.demo.task import better_sorted, flawed, in_place, make_rows, solution


def test_solution_and_reference_of_the_documented_prompt() -> None:
    assert solution("31415926=") == "11234569"
    assert flawed("31415926=", zeroed=7) == "11243560"


def test_every_reference_has_exactly_three_digits_wrong() -> None:
    rows = make_rows(500, seed=3)
    prompts, references = zip(*((row["prompt"], row["reference"]) for row in rows), strict=True)
    assert len(set(prompts)) == 500
    assert set(in_place(prompts, references)) == {5 / 8}


def test_rows_depend_on_the_seed_alone() -> None:
    assert make_rows(20, seed=1) == make_rows(20, seed=1) != make_rows(20, seed=2)


def test_in_place_counts_digits_and_punishes_a_wrong_length() -> None:
    prompt = "31415926="
    answers = ["11234569", "11234596", "1123", "", "112345690"]
    assert in_place([prompt] * 5, answers) == [1.0, 6 / 8, 4 / 8, 0.0, 8 / 9]


def test_the_reward_is_antisymmetric_and_zero_at_the_reference() -> None:
    prompts, good, bad = ["31415926="] * 2, ["11234569", "11243560"], ["11243560", "11243560"]
    assert better_sorted(prompts, good, bad) == [3 / 8, 0.0]
    assert better_sorted(prompts, bad, good) == [-3 / 8, 0.0]


def test_the_tokenizer_gives_back_what_it_was_given() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("31415926=")["input_ids"]
    assert len(ids) == 9
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "31415926="


def test_imitation_lowers_the_loss_and_ignores_the_prompt() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    losses = imitate(model, tokenizer, make_rows(64, seed=0), steps=range(12), seed=0)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(torch.tensor(len(tokenizer)).log().item(), rel=0.2)
    assert losses[-1] < 0.9 * losses[0]


def test_a_short_demo_writes_its_files_and_prints_its_table(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    result = run_demo(output_dir=tmp_path, seed=1, max_steps=2)
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for words in ("digits in place", "imitation alone", "RAS", "NAG", "62.5"):
        assert words in printed
    assert {path.name for path in result.plots} == {"reward.png", "loss.png", "components.png"}
    assert all(str(path) in printed.replace("\n", "") for path in result.plots)
    assert all(path.stat().st_size > 1000 for path in result.plots)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert result.reference_in_place == 5 / 8
    assert exact(result.after, of="reference") == 0
    assert result.before.nag is None and result.after.nag is not None


def test_steps_must_be_positive(tmp_path) -> None:
    with pytest.raises(ValueError, match="max_steps must be positive"):
        run_demo(output_dir=tmp_path, max_steps=0)


def test_results_of_another_run_are_kept(tmp_path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(ValueError, match="already holds final"):
        run_demo(output_dir=tmp_path, max_steps=2)


@pytest.mark.slow
def test_the_whole_demo_outdoes_its_references(tmp_path) -> None:
    result = run_demo(output_dir=tmp_path, seed=0)
    assert result.before.metric < result.reference_in_place
    assert result.imitation.metric < result.reference_in_place + 0.05
    assert result.after.metric > result.reference_in_place + 0.2
    assert result.after.ras > 0.9
    assert result.after.nag > 0.9
