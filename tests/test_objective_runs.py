"""A run by another objective: what it needs, logs, resumes from, and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from families import family_model
from test_trainer import CONFIG, ROWS, StopAt, lines, rarely_equal, run, same_bits

from grao_fast.checkup.run import check
from grao_fast.config import GRAOConfig
from grao_fast.system.errors import UserError
from grao_fast.training.checkpoint import CheckpointError
from grao_fast.training.diagnosis import Diagnosis
from grao_fast.training.flops import ModelCost, Work, update_flops

SFT = CONFIG.replace(objective="sft", num_generations=GRAOConfig.num_generations)


def test_sft_samples_and_scores_nothing(
    tiny_model: Path, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a reward, the loss falls; what an objective without samples lacks is not logged."""

    def sampling(*args: Any, **options: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("grao_fast.training.rollouts.sample_and_score", sampling)
    config = SFT.replace(save_steps=0, max_tokens_per_microbatch=None)
    run(tiny_model, tmp_path, config=config, reward=None)
    rows = lines(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[0]["loss"] == -rows[0]["objective/imitation"]
    assert rows[0]["reference/logprob"] < 0 == rows[0]["frac_dead"]
    assert all(value is not None for row in rows for value in row.values())
    assert not any(name.startswith(("reward", "completions/")) for name in rows[0])
    assert not (tmp_path / "completions.jsonl").read_text()


def test_a_reward_is_asked_for_where_something_is_scored(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="samples of this objective are scored: pass a reward"):
        run(tiny_model, tmp_path, reward=None)
    with pytest.raises(UserError, match="answers to eval_dataset are scored: pass a reward"):
        run(tiny_model, tmp_path, reward=None, config=SFT, eval_dataset=ROWS)


def test_references_are_asked_for_where_they_have_a_use(
    tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    config = CONFIG.replace(max_steps=1, save_steps=0, num_generations=2)
    for objective in ("grao", "chord"):
        with pytest.raises(UserError, match="has no reference answers"):
            run(tiny_model, tmp_path, dataset=rows, config=config.replace(objective=objective))
    with pytest.raises(UserError, match="has no reference answers"):
        run(tiny_model, tmp_path, dataset=rows, config=SFT, reward=None)
    config = config.replace(objective="grpo")
    run(tiny_model, tmp_path, dataset=rows, reward=rarely_equal, config=config)
    (row,) = lines(tmp_path)
    assert row["grad_norm"] > 0 and "reference/advantage" not in row
    assert "reference/logprob" not in row and "reference/logprob_gap" not in row


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_resumed_run_is_the_run(
    objective: str, tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    samples = {} if objective == "sft" else {"num_generations": 2}
    config = SFT.replace(objective=objective, num_iterations=2, max_steps=4, **samples)
    options = {"config": config, "reward": rarely_equal if samples else None}
    run(tiny_model, tmp_path / "whole", **options)
    run(tiny_model, tmp_path / "parts", **options, callbacks=[StopAt(2)])
    for other in ("grao", "grpo") if samples else ("dft",):
        changed = options | {"config": config.replace(objective=other)}
        with pytest.raises(
            CheckpointError, match=f"objective was {objective}, and is {other} here"
        ):
            run(tiny_model, tmp_path / "parts", **changed, resume_from_checkpoint=True)
    run(tiny_model, tmp_path / "parts", **options, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_first_pass_costs_the_heads_logits_once_more() -> None:
    cost = ModelCost.of(family_model("Llama"), recompute=True)
    batchless = update_flops(cost, [], [], share_prefix=True, updates=2, scored=False)
    assert set(batchless.values()) == {0.0}
    work = Work(tokens=10, rows=7, pairs=dict.fromkeys(cost.layers, 20))  # pyright: ignore
    more = cost.updates(work, two_passes=True) - cost.updates(work)
    assert more == 7 * cost.row_forward
    assert cost.row_update + cost.row_forward == 4 * cost.row_forward  # 8 D V a row


def test_what_samples_alone_give_an_effect_is_refused_without_them() -> None:
    for options in (
        {"kl_coef": 0.1},
        {"dynamic_sampling": 1},
        {"curriculum": True},
        {"num_generations": 4},
        {"log_completions": True},
        {"log_completions_steps": 5},
    ):
        with pytest.raises(
            UserError, match="no effect with objective='dft', which samples nothing"
        ):
            GRAOConfig(objective="dft", **options)
    GRAOConfig(objective="dft", log_completions_steps=0)


@pytest.mark.parametrize("options", [{"epsilon": 0.1}, {"epsilon_high": 0.3}])
def test_bounds_of_an_objective_without_ratios_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="epsilon and epsilon_high have no effect with objective="):
        GRAOConfig(objective="gspo", num_iterations=2, **options)


def test_a_diagnosis_speaks_of_a_y_in_grao_alone() -> None:
    def told(objective: str) -> str:
        diagnosis, texts = Diagnosis(objective), []
        for step in range(1, 41):
            row = {"loss": 1.0, "reward": 0.0, "reference/logprob": -1.0 - step / 10}
            texts += diagnosis.messages(step, row | {"reference/frac_negative": 1.0})
        return " ".join(texts)

    assert "raise kl_coef" in told("grao") and "the references lose" in told("grao")
    assert "the references" not in told("luffy").replace("the references' mean", "")
    assert "Lower learning_rate" in told("luffy")
    (dead,) = Diagnosis("sft").messages(1, {"loss": 0.0, "frac_dead": 1.0})
    assert "no prompt of the step has a reference" in dead


@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo"])
def test_check_of_another_objective(objective: str, tiny_model: Path, unchecked: None) -> None:
    """Where nothing is sampled, of no sample or reward; where none has a use, of no reference."""
    config = (SFT if objective == "sft" else CONFIG).replace(objective=objective, max_steps=2)
    reward = None if objective == "sft" else rarely_equal
    rows = [{"prompt": row["prompt"]} for row in ROWS] if objective == "grpo" else ROWS
    found = check(tiny_model, rows, reward, config=config, check_prompts=4)
    parts = {finding.part for finding in found.findings}
    assert parts == {"run", "data", "step"} | ({"samples", "rewards"} if reward else set())
    wrong = [f.name for f in found.findings if f.part in ("data", "step") and f.verdict != "ok"]
    assert wrong == (["references"] if objective == "dpo" else [])  # some are longer than samples
