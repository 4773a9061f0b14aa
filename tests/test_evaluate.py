"""RAS, NAG, their intervals, and `evaluate` from models to files."""

from __future__ import annotations

import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import save_tiny_model, sums, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_fast import GRAOConfig, evaluate, evaluate_completions
from grao_fast.data.examples import Example
from grao_fast.evaluation.bootstrap import bootstrap_intervals
from grao_fast.evaluation.pass_at_k import expected_best, pass_at_k
from grao_fast.rewards import RewardError

# Of lengths 2: against it "a" loses, "bb" ties, "ccc" wins.
EXAMPLES = [Example(f"p{n}", "yy", {}) for n in range(5)]
COMPLETIONS = ["a", "bb", "ccc", "dddd", "e"]
BASELINE = ["a", "b", "cc", "ddddd", ""]  # tie, win, win, loss, win


def length(completions: list[str]) -> list[float]:
    return [len(text) for text in completions]


def longer(completions: list[str], references: list[str]) -> list[float]:
    pairs = zip(completions, references, strict=True)
    return [(len(mine) > len(other)) - (len(mine) < len(other)) for mine, other in pairs]


@pytest.mark.parametrize(("reward", "kind"), [(length, "pointwise"), (longer, "pairwise")])
def test_metrics(reward: Any, kind: Any) -> None:
    result = evaluate_completions(
        reward, EXAMPLES, COMPLETIONS, baseline=BASELINE, reward_type=kind, metric=length
    )
    assert result.metrics() == pytest.approx(
        {
            "reward": 11 / 5 if kind == "pointwise" else 0.0,  # lengths; or 2 wins, 2 losses
            "ras": 2 / 5,
            "ras_win_or_tie": 3 / 5,
            "nag": (3 - 1) / 5,
            "nag_wins": 3 / 5,
            "metric": 11 / 5,
        }
    )
    assert set(result.intervals) == set(result.metrics())
    for name, (low, high) in result.intervals.items():
        assert low < getattr(result, name) < high
    row = result.rows[3]
    assert (row["completion"], row["baseline"], row["reference"]) == ("dddd", "ddddd", "yy")
    assert row["vs_reference"] == (2 if kind == "pointwise" else 1)
    assert row["vs_baseline"] == -1


def test_a_reward_is_asked_once_for_every_text() -> None:
    calls = []

    def counted(completions: list[str]) -> list[float]:
        calls.append(completions)
        return length(completions)

    evaluate_completions(
        counted, EXAMPLES[:2], ["a", "b"], baseline=["c", "d"], reward_type="pointwise"
    )
    assert calls == [["a", "c", "yy", "b", "d", "yy"]]


def test_what_is_absent_is_none_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    alone = Example("p", None, {})
    result = evaluate_completions(length, [alone], ["a"], reward_type="pointwise")
    assert result.to_dict() == {"prompts": 1, "reward": 1.0, "intervals": {"reward": [1.0, 1.0]}}
    assert (result.ras, result.nag, result.metric) == (None, None, None)
    result = evaluate_completions(
        length, [alone, *EXAMPLES[:2]], ["a", "a", "ccc"], reward_type="pointwise"
    )
    assert (result.prompts, result.ras) == (3, 0.5)
    assert "1 of 3 prompts have no reference or no reward" in caplog.text
    silent = evaluate_completions(
        lambda completions: [None] * len(completions),
        EXAMPLES,
        COMPLETIONS,
        reward_type="pointwise",
    )
    assert silent.to_dict() == {"prompts": 5, "intervals": {}}


def test_lengths_are_checked() -> None:
    with pytest.raises(ValueError, match="completions must hold 5 texts, got 1"):
        evaluate_completions(length, EXAMPLES, ["a"], reward_type="pointwise")
    with pytest.raises(ValueError, match="baseline must hold 5 texts, got 1"):
        evaluate_completions(length, EXAMPLES, COMPLETIONS, baseline=["a"], reward_type="pointwise")
    with pytest.raises(ValueError, match="no examples"):
        evaluate_completions(length, [], [], reward_type="pointwise")


# ---- intervals


def binomial_quantile(n: int, p: float, q: float) -> int:
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    raise AssertionError


@pytest.mark.parametrize(("n", "wins"), [(50, 15), (300, 200)])
def test_intervals_are_those_of_resampling(n: int, wins: int) -> None:
    """A resample of 0/1 values has Binomial(n, wins/n) ones, so its quantiles are known."""
    values = torch.zeros(n, dtype=torch.float64)
    values[:wins] = 1
    absent = values.clone()
    absent[0] = absent[-1] = math.nan
    intervals = bootstrap_intervals({"all": values, "some": absent}, seed=0)
    for bound, q in zip(intervals["all"], (0.025, 0.975), strict=True):
        assert abs(bound * n - binomial_quantile(n, wins / n, q)) <= 1
    for bound, q in zip(intervals["some"], (0.025, 0.975), strict=True):
        p = (wins - 1) / (n - 2)
        assert abs(bound - binomial_quantile(n - 2, p, q) / (n - 2)) <= 2 / n
    assert bootstrap_intervals({"all": values, "some": absent}, seed=0) == intervals
    assert bootstrap_intervals({"all": values, "some": absent}, seed=1) != intervals


def test_intervals_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"x": torch.linspace(0, 1, 40, dtype=torch.float64)}
    whole = bootstrap_intervals(values, seed=0)["x"]
    monkeypatch.setattr("grao_fast.evaluation.bootstrap._CHUNK", 40 * 999)
    assert bootstrap_intervals(values, seed=0)["x"] == pytest.approx(whole, abs=0.01)


# ---- the table


def test_table() -> None:
    result = evaluate_completions(
        longer, EXAMPLES, COMPLETIONS, baseline=BASELINE, reward_type="pairwise"
    )
    screen = Console(file=io.StringIO(), width=100)
    screen.print(result.table())
    shown = screen.file.getvalue()
    assert "5 prompts, greedy" in shown
    (line,) = [line for line in shown.splitlines() if "wins minus losses" in line]
    assert "40.0%" in line
    assert "metric" not in shown


# ---- from models to files

CONFIG = GRAOConfig(max_new_tokens=6, device="cpu", seed=3)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with its layers scrambled, so that it answers otherwise."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "other")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_evaluate_writes_its_results(tmp_path: Path, tiny_model: Path, other_model: Path) -> None:
    data = write_jsonl(tmp_path / "sums.jsonl", sums(6))
    result = evaluate(
        str(tiny_model),
        data,
        longer_conversation,
        base_model=other_model,
        config=CONFIG.replace(reward_type="pairwise"),
        metric=has_answer,
        output_dir=tmp_path / "scores",
    )
    assert set(result.metrics()) == {
        "reward", "ras", "ras_win_or_tie", "nag", "nag_wins", "metric",
    }  # fmt: skip
    saved = json.loads((tmp_path / "scores/eval.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    rows = [json.loads(line) for line in (tmp_path / "scores/completions.jsonl").open()]
    assert rows == result.rows
    assert len(rows) == 6
    assert any(row["completion"] != row["baseline"] for row in rows)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for row in rows[:2]:  # greedy answers, as generate gives them
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer, skip_special_tokens=True) == row["completion"]


def longer_conversation(completions: list[Any], references: list[Any]) -> list[float]:
    texts = [[messages[0]["content"] for messages in part] for part in (completions, references)]
    return longer(*texts)


def has_answer(completions: list[Any], answer: list[str]) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [float(right in messages[0]["content"]) for messages, right in pairs]


def test_a_model_gains_nothing_over_itself(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"prompt": "1+1", "reference": "2"}, {"prompt": "x" * 30, "reference": "y"}]
    config = CONFIG.replace(max_prompt_length=20)  # drops the second
    result = evaluate(
        model, rows, length, base_model=str(tiny_model), config=config, tokenizer=tokenizer
    )
    assert (result.prompts, result.nag, result.nag_wins) == (1, 0.0, 0.0)


def test_errors_come_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "grao_fast.evaluation.evaluate.load_policy",
        lambda *a, **k: pytest.fail("a model was loaded"),
    )
    rows = [{"prompt": "a", "reference": "b"}]
    with pytest.raises(ValueError, match="no such file"):
        evaluate("org/name", "absent.jsonl", length)
    with pytest.raises(RewardError, match="needs `answer`"):
        evaluate("org/name", rows, has_answer)
    with pytest.raises(RewardError, match="needs `answer`"):
        evaluate("org/name", rows, length, metric=has_answer)
    for models in (("./absent", None), ("org/name", "./absent")):
        with pytest.raises(ValueError, match=r"'\./absent' does not exist"):
            evaluate(models[0], rows, length, base_model=models[1])
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is that of a training run"):
        evaluate("org/name", rows, length, output_dir=tmp_path)


# ---- pass@k


def test_pass_at_k_is_the_mean_over_all_draws() -> None:
    """The best of k of n scores, over all draws without replacement; Chen's for 0 and 1."""
    scores = [0.0, 1.0, 1.0, 0.0, 0.0]
    for values in (scores, [0.3, -2.0, 7.0, 0.3, 1.5]):
        for k in range(1, 6):
            best = [max(drawn) for drawn in itertools.combinations(values, k)]
            assert expected_best(values, k) == pytest.approx(sum(best) / len(best))
    for k in range(1, 6):
        chen = 1 - math.comb(3, k) / math.comb(5, k)
        assert expected_best(scores, k) == pytest.approx(chen)
    assert expected_best([1.0, math.nan, 0.0], 1) == 0.5
    assert math.isnan(expected_best([1.0, math.nan], 2))
    assert expected_best([0.0] * 1999 + [1.0], 1000) == pytest.approx(0.5)  # no overflow
    names = [name.removeprefix("pass_at_") for name in pass_at_k([[0.0] * 6])]
    assert names == ["1", "2", "4", "6"]


def test_samples_are_scored_by_the_metric_alone() -> None:
    samples = [["a", "bb"], ["c", "d"], ["eee", "f"], ["", ""], ["gg", "gg"]]
    asked: list[int] = []

    def short(completions: list[str]) -> list[float | None]:
        asked.append(len(completions))
        return [None if not text else float(len(text) == 1) for text in completions]

    result = evaluate_completions(
        length, EXAMPLES, COMPLETIONS, reward_type="pointwise", metric=short, samples=samples
    )
    assert asked == [5, 10]
    assert result.metric == 2 / 5  # of the greedy ones, "a" and "e"
    assert result.pass_at_k == pytest.approx({1: (0.5 + 1 + 0.5 + 0) / 4, 2: 3 / 4})
    assert result.metrics()["pass_at_2"] == 3 / 4
    assert set(result.intervals) == set(result.metrics())
    assert result.rows[2]["samples"] == ["eee", "f"]
    assert result.rows[3]["sample_metrics"] == [None, None]
    screen = Console(file=io.StringIO(), width=100)
    screen.print(result.table())
    assert "5 prompts, greedy and sampled" in screen.file.getvalue()
    assert "pass@2, held-out metric of samples" in screen.file.getvalue()
    with pytest.raises(ValueError, match="samples are scored by the metric: pass one"):
        evaluate_completions(
            length, EXAMPLES, COMPLETIONS, reward_type="pointwise", samples=samples
        )
    with pytest.raises(ValueError, match="samples must hold 5 texts, got 1"):
        evaluate_completions(
            length, EXAMPLES, COMPLETIONS, reward_type="pointwise", metric=short, samples=[["a"]]
        )


def test_evaluate_samples_every_prompt_from_its_own_seed(tiny_model: Path) -> None:
    config = CONFIG.replace(num_generations_eval=4, temperature=1.0)
    rows = sums(5)
    results = [
        evaluate(str(tiny_model), part, characters, metric=characters, config=config)
        for part in (rows, rows, rows[:2])
    ]
    texts = [[row["samples"] for row in result.rows] for result in results]
    assert texts[0] == texts[1] and texts[0][:2] == texts[2]
    assert all(len(set(group)) > 1 for group in texts[0])
    assert texts[0][0] != texts[0][1]
    assert set(results[0].pass_at_k) == {1, 2, 4}
    assert results[0].pass_at_k[1] < results[0].pass_at_k[4]
    with pytest.raises(ValueError, match="num_generations_eval=4 has no effect without a metric"):
        evaluate(str(tiny_model), rows, characters, config=config)


def characters(completions: list[Any]) -> list[float]:
    return [float(len(messages[0]["content"])) for messages in completions]
