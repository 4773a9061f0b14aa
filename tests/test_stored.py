"""Training on completions that the dataset stores, with their rewards and log-probs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from published import assert_as_published
from test_off_policy_step import assert_same_gradients, double_of, sampler_logprobs, truth
from test_trainer import CONFIG, StopAt, letters, lines, run, same_bits
from tiny import write_jsonl
from tolerance import gradients_of

from grao_fast.checkup.run import check
from grao_fast.cli.commands import main
from grao_fast.config import GRAOConfig
from grao_fast.data.examples import Examples
from grao_fast.data.packing import split_by_tokens
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError
from grao_fast.training.coefficients import to_groups
from grao_fast.training.group_shape import GroupShape
from grao_fast.training.inputs import read_inputs
from grao_fast.training.memory import _too_large
from grao_fast.training.step import micro_batch_loss
from grao_fast.training.stored import stored_rollout

STORED = CONFIG.replace(sampler="dataset", num_generations=GRAOConfig.num_generations)
ANSWERS = ["abc", "aab cab", "b", "caac"]


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Rows with four completions and the rewards that `letters` gives them."""
    prompts = ["one", "two and", "three", "4", "five of them", "six", "seven!"]
    targets = ["abc"[i % 3] for i in range(len(prompts))]
    return [
        {
            "prompt": prompt,
            "reference": prompt[::-1],
            "target": target,
            "completions": ANSWERS,
            "rewards": letters(None, ANSWERS, [target] * 4),
            "reference_reward": letters(None, [prompt[::-1]], [target])[0],
        }
        | columns
        for prompt, target in zip(prompts, targets, strict=True)
    ]


def with_logprobs() -> list[dict[str, Any]]:
    """Rows whose log-probs are unlike the policy's; one completion of each has none."""
    logprobs = [[-4.0 - 0.3 * (t % 5) for t in range(len(text) + 1)] for text in ANSWERS]
    return rows(logprobs=[*logprobs[:3], None])


class Replay:
    """A sampler that returns ANSWERS for every prompt."""

    context_length = None

    def sync(self, policy: Any) -> None:
        pass

    def sample(self, prompts: list[list[int]], **options: Any) -> list[list[Completion]]:
        from tiny import character_tokenizer

        ids = [[*character_tokenizer()(text)["input_ids"], 1] for text in ANSWERS]
        return [[Completion(x, [-1.0] * len(x), True) for x in ids] for _ in prompts]


def test_it_is_the_run_whose_sampler_returns_them(
    tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    config = CONFIG.replace(num_iterations=2, kl_coef=0.1, max_steps=3, save_steps=0)
    run(tiny_model, tmp_path / "sampled", config=config, sampler=Replay())
    config = config.replace(num_generations=8)  # the default, which adapts
    options = {"config": config, "dataset": rows(), "reward": None}
    run(tiny_model, tmp_path / "stored", **options, sampler="dataset")
    assert same_bits(tmp_path / "sampled" / "final", tmp_path / "stored" / "final")
    differ = ("sampling/", "rewards/")
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith(differ)} for row in lines(folder)]
        for folder in (tmp_path / "stored", tmp_path / "sampled")
    )
    assert ours == theirs and len(ours) == 3
    written = json.loads((tmp_path / "stored" / "config.json").read_text())
    assert (written["sampler"], written["num_generations"]) == ("dataset", 4)


def test_gradients_are_those_of_the_formula_with_stored_logprobs(tiny_model: Path) -> None:
    """Rows of two to four completions, weighed by exp(logp - stored), which the cap holds at 3."""
    data = with_logprobs()
    for row, fewer in zip(data, (4, 2, 3), strict=False):
        for name in ("completions", "rewards", "logprobs"):
            row[name] = row[name][:fewer]
    data[3]["completions"] = ["", *ANSWERS[1:]]
    data[3]["logprobs"] = [[-5.0], *data[3]["logprobs"][1:]]
    config = STORED.replace(temperature=0.8)
    inputs = read_inputs(data, None, config=config, eval_dataset=None, metric=None)
    config = inputs.config
    assert (config.num_generations, config.objective_options.sampler_cap) == (4, 3.0)
    loaded = load_policy(tiny_model, config=config)
    prompts = loaded.encode(inputs.examples, config.sampling)
    objective = config.objective_options
    rollout = stored_rollout(loaded, None, prompts, num_generations=4, objective=objective)
    assert [len(group) for group in rollout.completions] == [4, 2, 3, 4, 4, 4, 4]
    assert rollout.texts[3] == ["", *ANSWERS[1:]] and rollout.completions[3][0].token_ids == [1]
    groups, total = to_groups(rollout, objective), 0.0
    with loaded.policy.updating():
        for part in split_by_tokens(groups, 60, share_prefix=True):
            batch = loaded.policy.lay_out(part)
            loss = micro_batch_loss(loaded.policy, batch, objective, num_prompts=len(groups))
            loss.loss.backward()
            total += float(loss.loss.detach())
    padded = padded_rollout(rollout)
    double = double_of(tiny_model)
    known_T = sampler_logprobs(padded)
    expected = truth(double, padded, config, sampler_logprob_T=known_T, sampler_cap=3.0)
    expected.loss.backward()
    gradients = gradients_of(loaded.policy.model), gradients_of(double)
    way = 'offline, sampler="dataset", off-policy weights from stored log-probs'
    assert_as_published(way, total, expected.loss.detach(), *gradients)
    assert abs(total - float(expected.loss.detach())) < 1e-5
    assert_same_gradients(loaded.policy.model, double)
    plain = double_of(tiny_model)
    truth(plain, padded, config).loss.backward()
    gap = (plain.lm_head.weight.grad - double.lm_head.weight.grad).abs().max()
    assert gap > 0.1 * double.lm_head.weight.grad.abs().max()


def padded_rollout(rollout: Any) -> Any:
    """With an empty completion where one is absent, as the specification takes it."""
    absent = [Completion([], [], True)]
    groups = [[*group, *absent * (4 - len(group))] for group in rollout.completions]
    return dataclasses.replace(rollout, completions=groups)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "ids"])
def test_files_store_completions(kind: str, tmp_path: Path) -> None:
    import datasets

    data = with_logprobs()
    data[1] |= {"completions": ["a"], "rewards": [None], "logprobs": None}
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "rows.jsonl", data)
    else:
        path = tmp_path / "rows.parquet"
        if kind == "ids":
            data = [
                {k: v for k, v in row.items() if k != "completions"}
                | {"completion_ids": [[3 + len(text)] * 2 for text in row["completions"]]}
                for row in data
            ]
        datasets.Dataset.from_list(data).to_parquet(path)
    inputs = read_inputs(path, letters, config=STORED, eval_dataset=path, metric=None)
    assert inputs.config.num_generations == 4
    stored = inputs.examples[1].stored
    assert stored is not None and stored.logprobs == [None] and math.isnan(stored.rewards[0])
    assert set(inputs.examples[0].columns) == {"target"}
    assert inputs.eval_examples is not None
    first = inputs.examples[0].stored
    assert first is not None and first.rewards == rows()[0]["rewards"]
    assert (first.answers is None) == (kind == "ids")


def test_a_reward_scores_what_has_none(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    seen: list[str] = []

    def counted(prompts: Any, completions: Any, target: Any) -> list[float]:
        seen.extend(completions)
        return letters(prompts, completions, target)

    config = STORED.replace(max_steps=2, save_steps=0)
    run(tiny_model, tmp_path / "whole", dataset=rows(), reward=None, config=config)
    data = rows()
    for row in data:
        row["rewards"] = [row["rewards"][0], None, *row["rewards"][2:]]
        row["reference_reward"] = None
    options = {"dataset": data, "reward": counted, "config": config}
    run(tiny_model, tmp_path / "parts", **options)
    assert len(seen) == 2 * 2 * 4 and seen.count(ANSWERS[1]) == 8 and ANSWERS[0] not in seen
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


def test_a_resumed_run_is_the_run(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    options = {"dataset": with_logprobs(), "reward": None, "config": STORED.replace(max_steps=4)}
    run(tiny_model, tmp_path / "whole", **options)
    run(tiny_model, tmp_path / "parts", **options, callbacks=[StopAt(2)])
    run(tiny_model, tmp_path / "parts", **options, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    ratio = "sampling/importance_sampling_ratio/"
    first = lines(tmp_path / "whole")[0]
    assert first[f"{ratio}min"] < 1 < first[f"{ratio}max"] <= 3.0


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completions": "abc"}, "row 0, `completions` must be a list, got str"),
        ({"completions": ["a", None, "b", "c"]}, "row 0, completion 1 is null"),
        ({"rewards": [1.0]}, "`rewards` has 1 items for 4 completions"),
        ({"rewards": [1.0, math.nan, 0, 0]}, "completion 1: its reward must be a finite number"),
        ({"rewards": [1.0, None, 0, 0]}, "no reward is stored for a completion of row 0"),
        ({"reference_reward": None}, "no reward is stored for the reference of row 0"),
        ({"logprobs": [[-1.0, 2.0]] * 4}, "completion 0: log-prob 1 must be a finite number"),
        ({"completions": [], "rewards": []}, "no row of the dataset stores a completion"),
        ({"completion_ids": [[3]]}, "leave one of the columns out"),
    ],
)
def test_rows_that_cannot_be_used_are_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_inputs(rows(**columns), None, config=STORED, eval_dataset=None, metric=None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"logprobs": [[-1.0] * 3, None, None, None]},
            "row 0, completion 0 has 3 log-probs and 4 tokens: its end-of-sequence token has none",
        ),
        (
            {"logprobs": [None, [-1.0] * 3, None, None]},
            "row 0, completion 1 has 3 log-probs and 8 tokens: another tokenizer",
        ),
        ({"completions": ["a" * 8, "b", "c", "d"]}, "has 9 tokens, more than max_new_tokens=8"),
    ],
)
def test_completions_that_do_not_fit_are_named(
    columns: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(tiny_model, tmp_path, dataset=rows(**columns), reward=None, config=STORED)


def test_token_ids_are_taken_as_they_are(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    data = [
        {k: v for k, v in row.items() if k != "completions"}
        | {"completion_ids": [[3, 4, 1], [3], [5, 1], [6, 6, 1]], "logprobs": [[-1.0]] * 4}
        for row in rows()
    ]
    message = "row 0, completion 0 has 1 log-probs and 3 tokens: give one for each"
    with pytest.raises(UserError, match=message):
        run(tiny_model, tmp_path, dataset=data, reward=None, config=STORED)
    data = [row | {"logprobs": None} for row in data]
    config = STORED.replace(max_steps=1, save_steps=0)
    run(tiny_model, tmp_path, dataset=data, reward=None, config=config)
    (row,) = lines(tmp_path)
    assert row["completions/clipped_ratio"] == 0.25 and row["completions/mean_length"] == 2.25
    data[0]["completion_ids"] = [[3, 4000, 1], [3], [5, 1], [6, 6, 1]]
    with pytest.raises(UserError, match="token 4000 is beyond the model's embedding"):
        run(tiny_model, tmp_path / "beyond", dataset=data, reward=None, config=config)


def test_what_has_no_effect_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    for options in (
        {"dynamic_sampling": 2},
        {"curriculum": True},
        {"async_rollouts": 1},
    ):
        (name,) = options
        with pytest.raises(UserError, match=f'{name}=.* has no effect with sampler="dataset"'):
            STORED.replace(**options)
    with pytest.raises(UserError, match="sampler='dataset' has no effect with objective='sft'"):
        STORED.replace(objective="sft")

    def read(data: Any, reward: Any = None, **options: Any) -> GRAOConfig:
        config = STORED.replace(**options)
        return read_inputs(data, reward, config=config, eval_dataset=None, metric=None).config

    with pytest.raises(UserError, match="use_vllm=True has no effect where nothing is sampled"):
        read(rows(), use_vllm=True)
    assert read(rows(), num_generations=4).vllm_importance_sampling_clip_max is None
    with pytest.raises(UserError, match="num_generations=3 has no effect on stored completions"):
        read(rows(), num_generations=3)
    with pytest.raises(UserError, match=r"clip_max=2\.0 has no effect without stored log-probs"):
        read(rows(), vllm_importance_sampling_clip_max=2.0)
    capped = read(with_logprobs(), vllm_importance_sampling_clip_max=2.0)
    assert capped.objective_options.sampler_cap == 2.0
    with pytest.raises(UserError, match="the reward has no effect"):
        read(rows(), letters)
    with pytest.raises(UserError, match="stores no completions"):
        read([{"prompt": "a", "reference": "b"}])
    for objective in ("gspo", "dpo", "srft"):
        caplog.clear()
        read(with_logprobs(), objective=objective)
        assert f"log-probs have no effect with objective='{objective}'" in caplog.text
    caplog.clear()
    read(rows(), objective="gspo")
    read(with_logprobs())
    assert not caplog.text
    imitated = [{k: v for k, v in row.items() if k != "reference_reward"} for row in rows()]
    assert read(imitated, objective="chord").num_generations == 4


def test_a_sampler_by_another_name_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampler='data': by name there is \"dataset\" alone"):
        run(tiny_model, tmp_path, sampler="data")


def test_memory_is_measured_for_the_longest_that_is_stored(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    """And not for max_new_tokens, which may be far above; of many rows, the largest are known."""
    for name, value in {"_FEW": 10, "_SAMPLE": 4, "_LARGEST": 1}.items():
        monkeypatch.setattr(f"grao_fast.data.sizes.{name}", value)
    config = STORED.replace(max_new_tokens=100)
    data = rows() * 3
    data[9] = data[9] | {"completions": ["a" * 40, *ANSWERS[1:]]}
    inputs = read_inputs(data, None, config=config, eval_dataset=None, metric=None)
    assert isinstance(inputs.examples, Examples)
    assert 9 not in inputs.examples.sizes.sample()
    loaded = load_policy(tiny_model, config=inputs.config)
    prompts = loaded.encode(inputs.examples, inputs.config.sampling)
    formula = config.objective_options.formula
    shape = GroupShape.largest(prompts, inputs.config.sampling, formula)
    assert shape == GroupShape(12, (41, 41, 41, 41, 13), stored=True)
    refused = _too_large(shape, 2.0**20, 0)
    assert "Store fewer or shorter completions" in refused and "num_generations" not in refused
    refused = _too_large(GroupShape(12, (13,)), 2.0**20, 0)  # references alone
    assert "12 tokens of prompt and 1 sequence of up to 13, needs" in refused
    assert "Lower max_prompt_length or max_reference_length" in refused


def test_check_reads_stored_groups(tiny_model: Path, unchecked: None) -> None:
    equal = rows(rewards=[1.0] * 4, reference_reward=1.0)
    result = check(tiny_model, equal, None, config=CONFIG.replace(num_generations=8),
                   sampler="dataset")  # fmt: skip
    found = {finding.name: finding for finding in result.findings}
    assert found["dead groups"].verdict == "failure" and "100%" in found["dead groups"].value
    assert "are stored" in found["calls"].value
    assert found["stored completions"].value.startswith("4 to 4 for a prompt")
    fewer = rows()
    fewer[0] |= {"completions": ANSWERS[:2], "rewards": fewer[0]["rewards"][:2]}
    result = check(tiny_model, fewer, None, config=STORED, check_prompts=7)
    found = {finding.name: finding for finding in result.findings}
    assert found["no reward"].value == "every sample has a reward"
    assert "up to 16 stored completions" in found["steps"].value
    assert "sampling" not in found["step"].value
    broken = rows(logprobs=[[-1.0], None, None, None])
    with pytest.raises(UserError, match="row 0, completion 0 has 1 log-probs and 4 tokens"):
        check(tiny_model, broken, None, config=STORED)


def test_the_command_trains_on_a_file(
    tiny_model: Path, tmp_path: Path, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", with_logprobs())
    argv = f"train --model {tiny_model} --dataset {path} --sampler dataset --max_new_tokens 8"
    argv += " --device cpu --prompts_per_step 2 --max_steps 1 --log_completions_steps 1"
    argv += f" --output_dir {tmp_path / 'run'}"
    assert main(argv.split()) == 0
    assert "1 steps" in capsys.readouterr().out
    samples = [json.loads(x) for x in (tmp_path / "run" / "completions.jsonl").open()]
    assert samples and all(len(row["completions"]) == 4 for row in samples)
    assert torch.isfinite(torch.tensor(lines(tmp_path / "run")[0]["loss"]))


def test_two_processes_train_as_one(tiny_model: Path, tmp_path: Path, unchecked: None) -> None:
    """Sharded, on ragged groups; each scores what has no reward in its share of them."""
    data = with_logprobs()
    for row in data[::2]:
        row |= {"completions": ANSWERS[:3], "logprobs": row["logprobs"][:3]}
        row["rewards"] = [None, *row["rewards"][1:3]]
    config = STORED.replace(max_steps=2, save_steps=0, prompts_per_step=3)
    options = {"dataset": data, "eval_dataset": data[:2]}
    run(tiny_model, tmp_path / "one", **options, config=config)

    def body(rank: int) -> None:
        run(tiny_model, tmp_path / "two", **options, config=config.replace(sharding="full"))

    ended = launch(body, tmp_path, size=2, timeout=120)
    assert [each.status for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    names = ("loss", "reward", "grad_norm", "sampling/importance_sampling_ratio/mean")
    both = [
        [row[name] for row in lines(tmp_path / folder) if "loss" in row for name in names]
        for folder in ("one", "two")
    ]
    assert len(both[0]) == 8 and both[1] == pytest.approx(both[0], rel=1e-3, abs=1e-5)
