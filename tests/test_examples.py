"""The examples run, in a small form."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from judge_server import JudgeServer, chat, serving
from tiny import sums, write_jsonl
from transformers import AutoModelForCausalLM

from grao_fast.cli.commands import main
from grao_fast.config import GRAOConfig
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """Import an example, which is a script, from its path."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Run an example as its command line does."""
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    load(name).main()


def steps_of(output: Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


# ---- a custom sampler


@pytest.fixture(scope="module")
def stratified() -> ModuleType:
    return load("sampler/stratified")


def test_first_tokens_are_spread_over_their_distribution(stratified, tiny_model) -> None:
    """With G samples, a token of probability p begins at least floor(p G) of them, less one."""
    config = GRAOConfig(device="cpu", max_new_tokens=2)
    sampler = stratified.StratifiedSampler()
    load_policy(tiny_model, config=config, sampler=sampler)  # checks its log-probs
    (group,) = sampler.sample(
        [[5, 6, 7]], num_generations=64, max_new_tokens=1, temperature=1.0, seeds=[3]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        p_V = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([each.token_ids[0] for each in group]), minlength=len(p_V))
    assert (counts - 64 * p_V).abs().max() < 2
    for each in group:
        assert each.logprobs[0] == pytest.approx(math.log(p_V[each.token_ids[0]]), abs=1e-5)


def test_a_sampler_repeats_by_its_seeds(stratified, tiny_model) -> None:
    sampler = stratified.StratifiedSampler()
    load_policy(tiny_model, config=GRAOConfig(device="cpu", max_new_tokens=2), sampler=sampler)
    options = {"num_generations": 4, "max_new_tokens": 8, "temperature": 1.0}
    both = sampler.sample([[5, 6], [7]], seeds=[1, 2], **options)
    assert sampler.sample([[7]], seeds=[2], **options) == both[1:]
    assert sampler.sample([[7]], seeds=[3], **options) != both[1:]


def test_a_sampler_with_other_log_probs_is_refused(stratified, tiny_model, monkeypatch) -> None:
    def warmer(logits, temperature, u):
        return draw(logits, 2 * temperature, u)

    draw = stratified.draw
    monkeypatch.setattr(stratified, "draw", warmer)
    with pytest.raises(UserError, match="log-probs of StratifiedSampler differ from the policy's"):
        load_policy(
            tiny_model,
            config=GRAOConfig(device="cpu", max_new_tokens=2),
            sampler=stratified.StratifiedSampler(),
        )


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (dict, {}, "sampler is the class dict: pass an instance"),
        ({}, {}, "sampler dict has no context_length"),
        (None, {"use_vllm": True}, "ask for two samplers: leave one out"),
    ],
)
def test_what_is_no_sampler_is_refused(sampler, options, message, stratified, tiny_model) -> None:
    sampler = stratified.StratifiedSampler() if sampler is None else sampler
    with pytest.raises(UserError, match=message):
        load_policy(tiny_model, config=GRAOConfig(device="cpu", **options), sampler=sampler)


@pytest.mark.slow
def test_the_sampler_example(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    data = write_jsonl(tmp_path / "problems.jsonl", sums(8))
    options = {"model": tiny_model, "data": data, "output": tmp_path / "run"}
    call("sampler/stratified", monkeypatch, **options, steps=2, max_new_tokens=4)
    assert len(steps_of(tmp_path / "run")) == 2
    assert "2 steps; groups with equal rewards" in capsys.readouterr().out


# ---- mathematics


def test_problems_are_solved_by_their_references() -> None:
    problems = load("math/problems")
    rows = problems.problems(200, seed=0)
    assert rows == problems.problems(200, seed=0) != problems.problems(200, seed=1)
    assert len({row["prompt"][0]["content"] for row in rows}) == 200
    for row in rows:
        assert row["reference"].endswith(f" The answer is {row['answer']}.")
        for equation in row["reference"].split(". The answer")[0].split(", and "):
            left, right = equation.rstrip(".").split(" = ")
            a, sign, b = left.split()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
            value["/"] = int(a) // int(b) if int(b) and int(a) % int(b) == 0 else None
            assert value[sign] == int(right)
        assert int(row["answer"]) == int(right) > 0


@pytest.mark.slow
def test_the_math_example(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("math_verify")
    call("math/problems", monkeypatch, output=tmp_path / "problems", train=8, test=2)
    options = {"model": tiny_model, "data": tmp_path / "problems", "output": tmp_path / "run"}
    call(
        "math/train", monkeypatch, **options, steps=2, max_new_tokens=4, prompts_per_step=2, rank=2
    )
    assert {"rewards/math/mean", "rewards/length/mean"} <= steps_of(tmp_path / "run")[0].keys()
    assert (tmp_path / "run/final/adapter_config.json").is_file()


# ---- offline


def test_the_offline_example(tiny_model, tmp_path, monkeypatch, unchecked) -> None:
    """The model that is trained sampled them: importance weights are 1 until the first update."""
    folder = EXAMPLES / "offline"
    monkeypatch.chdir(tmp_path)
    load("offline/logprobs").main(str(tiny_model), str(folder / "groups.jsonl"), "scored.jsonl")
    argv = f"train --config {folder / 'run.yaml'} --model {tiny_model} --device cpu"
    options = "--num_train_epochs 1 --learning_rate 1e-2 --save_steps 0 --log_completions_steps 1"
    assert main(f"{argv} {options}".split()) == 0
    first, second = steps_of(tmp_path / "offline-run")
    weight = "sampling/importance_sampling_ratio/"
    for name in ("min", "mean", "max"):
        assert first[weight + name] == pytest.approx(1, abs=1e-4)
    assert second[weight + "min"] < 0.99 and second[weight + "max"] <= 2
    assert (
        first["reward"] == pytest.approx(0.5, abs=0.2) and first["completions/clipped_ratio"] == 0
    )


# ---- a judge


@pytest.mark.slow
def test_the_judge_example(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("openai")
    judge = JudgeServer(lambda pair: chat("A" if pair.first > pair.second else "B"))
    with serving(judge) as url:
        options = {"model": tiny_model, "judge_model": "judge-model", "judge_url": url}
        call(
            "judge/train",
            monkeypatch,
            **options,
            output=tmp_path / "run",
            steps=2,
            max_new_tokens=4,
            prompts_per_step=2,
        )
    assert len(steps_of(tmp_path / "run")) == 2
    assert "2 steps; mean reward of the last" in capsys.readouterr().out
