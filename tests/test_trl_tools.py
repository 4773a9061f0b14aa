"""Tools and environments in TRL: samples call them, references are read turn by turn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

pytest.importorskip("trl")

from trl_runs import assert_same, config, double_of, run, truth
from trl_tools import ANSWER, Purse, add, called, groups_of, length, rows, save_tool_model, turns

from grao_fast.integrations.trl import GRAOTrainer
from grao_fast.integrations.trl.in_step import InStepTrainer
from grao_fast.integrations.trl.references import read_row

SAID = ["it is 7", "it is 12 or so", "no"]


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("tools"))


def speak(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any]) -> None:
    """In place of sampling: each second sample calls a tool first, and none says the same."""

    def turn(self: GRAOTrainer, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple:
        texts = []
        for b, ids in enumerate(prompt_ids):
            answered = "<tool_response>" in self._tokenizer.decode(ids)
            asks = b % 2 and not answered
            wanted = f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>"
            texts.append(wanted if asks else f"{SAID[b % 3]}{' again' * answered}")
        return [self._tokenizer(text + "<|im_end|>")["input_ids"] for text in texts], None

    monkeypatch.setattr(GRAOTrainer, "_generate_single_turn", turn)


def test_samples_and_references_read_results_and_do_not_learn_them(
    tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    speak(monkeypatch, called("add", a=3, b=4))
    given = []

    def watched(completions: list, **columns: Any) -> list[float]:
        given.append(completions)
        return length(completions)

    args = config(tmp_path, max_completion_length=400, max_tool_calling_iterations=2)
    data = rows(turns(a=3, b=4))
    trainer = run(tool_model, args, data, reward_funcs=watched, tools=[add])
    groups, learned = groups_of([trainer.rollouts[0][1]])

    tokenizer = AutoTokenizer.from_pretrained(tool_model)
    whole = tokenizer.apply_chat_template(
        data["prompt"][0] + data["reference"][0],
        tools=[add],
        return_dict=False,
    )
    prompt, (_, called_one, ids) = groups[0]
    assert prompt + ids == whole[:-1]  # the template ends in a line break
    read = [t for t, own in zip(ids, learned[0][2], strict=True) if not own]
    result = "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"
    assert tokenizer.decode(read) == f"\n{result}<|im_start|>assistant\n"
    sampled = [t for t, own in zip(called_one, learned[0][1], strict=True) if not own]
    assert sampled == read  # the result as TRL puts it behind a sample's call

    samples, (reference, *_) = given
    assert [len(each) for each in samples] == [1, 3] * 3
    assert reference[0]["tool_calls"] == samples[1][0]["tool_calls"]
    assert reference[1] == samples[1][1] == {"role": "tool", "name": "add", "content": "7"}
    assert reference[2] == {"role": "assistant", "content": ANSWER}
    rewards_N2 = torch.tensor(length(samples), dtype=torch.float64).view(3, 2)
    rewards_NK = torch.cat([rewards_N2, torch.full((3, 1), float(len(ANSWER)))], dim=1)
    double = double_of(tool_model)
    truth(double, groups, rewards_NK, learned=learned).loss.backward()
    assert_same(trainer.gradients[0], double)
    assert trainer.state.log_history[0]["reference/advantage"] > 1
    assert trainer.state.log_history[0]["tools/call_frequency"] == 0.5


@pytest.mark.parametrize("as_text", [False, True])
def test_a_call_has_its_own_arguments(as_text: bool):
    """In Arrow, each call has the arguments of the other tool too, as null."""
    given = [{"a": 3, "b": 4}, {"amount": 6, "limit": None} if as_text else {"amount": 6}]
    references = [turns("add", **given[0]), turns("put", **given[1])]
    if as_text:
        for reference in references:
            function = reference[0]["tool_calls"][0]["function"]
            function["arguments"] = json.dumps(function["arguments"])
    prompt = [{"role": "user", "content": "3 and 4?"}]
    data = Dataset.from_list([{"prompt": prompt, "reference": each} for each in references])
    for row, expected in zip(data, given, strict=True):
        _, reference = read_row(row, "a row")
        assert isinstance(reference, list)
        assert reference[0]["tool_calls"][0]["function"]["arguments"] == expected
    wrong = turns()
    wrong[0]["tool_calls"][0]["function"]["arguments"] = "a=3"
    with pytest.raises(ValueError, match=r"a row, `reference`: `arguments` .* got 'a=3'"):
        read_row({"prompt": prompt, "reference": wrong}, "a row")


class Silent(Purse):
    """The same, without a reward of its own."""

    get_reward = None  # type: ignore[assignment]


def test_an_environments_reward_needs_one_for_the_reference(
    tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    speak(monkeypatch, called("put", amount=6))
    args = config(tmp_path, max_completion_length=400)
    with pytest.raises(
        ValueError, match=r"Purse needs `environments`, which .* `reference_reward`"
    ):
        run(tool_model, args, rows("seven"), reward_funcs=[length], environment_factory=Purse)
    data = rows(turns("put", amount=6), reference_reward=60.0)
    later = Dataset.from_list([*data.to_list(), data[0] | {"reference_reward": None}])
    held = {"held": data.remove_columns("reference_reward")}
    for train, evaluation, where in (
        (later, None, "the reference of train_dataset, row 3, a reward"),
        (data, held, "the references of eval_dataset['held'] a reward"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"samples alone have: give {where}")):
            run(
                tool_model,
                args,
                train,
                eval_dataset=evaluation,
                reward_funcs=[length],
                environment_factory=Purse,
            )
    trainer = run(tool_model, args, data, reward_funcs=[length], environment_factory=Purse)
    groups, learned = groups_of([trainer.rollouts[0][1]])
    assert "3 and 4? You have 1." in trainer._tokenizer.decode(groups[0][0])
    assert {0, 1} == {*learned[0][1]} == {*learned[0][2]}
    said = [SAID[0], SAID[0] + " again", SAID[2], SAID[1] + " again", SAID[1], SAID[2] + " again"]
    assert trainer._logs["completion"][3][-1]["content"] == said[3]
    lengths_N2 = torch.tensor([len(each) for each in said], dtype=torch.float64).view(3, 2)
    rewards_N2 = lengths_N2 + torch.tensor([1.0, 7.0])
    rewards_NK = torch.cat([rewards_N2, torch.full((3, 1), 60.0)], dim=1)
    double = double_of(tool_model)
    truth(double, groups, rewards_NK, learned=learned).loss.backward()
    assert_same(trainer.gradients[0], double)


def test_rewards_without_an_environment_score_references(
    tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a dataset without prompts, which the environment gives; one reward is the dataset's."""
    speak(monkeypatch, called("put", amount=6))
    seen = []

    def watched(completions: list, environments: list | None = None, **_: Any) -> list[float]:
        seen.append(environments is not None)
        return length(completions)

    data = rows("seven").remove_columns("prompt").add_column("reference_reward", [None, 2.5, None])
    args = config(tmp_path, max_completion_length=400, shuffle_dataset=False)
    trainer = run(tool_model, args, data, reward_funcs=watched, environment_factory=Silent)
    assert seen == [True, False]
    mean = trainer.state.log_history[0]["reference/reward"]
    assert mean == pytest.approx((5 + 2.5 + 5) / 3)


def test_what_no_sample_could_be_is_refused(tool_model: Path, tmp_path: Path):
    args = config(tmp_path, max_completion_length=400)

    def refused(data: Dataset | None, match: str, **options: Any) -> None:
        """Before training, in training data and in data for evaluation."""
        at = "" if data is None else "train_dataset, row 0.*"
        with pytest.raises(ValueError, match=at + match):
            GRAOTrainer(str(tool_model), length, args, data, **options)
        if data is not None:
            options |= {"eval_dataset": data}
            with pytest.raises(ValueError, match="eval_dataset, row 0.*" + match):
                GRAOTrainer(str(tool_model), length, args, rows("seven"), **options)

    answered = [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    asked = rows([*answered, {"role": "assistant", "content": "yes"}])
    refused(asked, "turns of assistant, user, assistant: .* belongs into `prompt`", tools=[add])
    nameless = turns(a=3, b=4)
    nameless[0] = {"role": "assistant", "content": "I add"}
    refused(rows(nameless), "tool's result, '7', without `name`", tools=[add])
    text = Dataset.from_list([{"prompt": "3 and 4?", "reference": "7"}] * 3)
    refused(text, "`prompt` is text: give messages", tools=[add])
    with pytest.raises(ValueError, match=r"a row: tools are called in messages"):
        run(tool_model, args, text.to_iterable_dataset(), reward_funcs=length, tools=[add])
    refused(None, "gives prompts and no references: pass a dataset", environment_factory=Purse)
    wrong = rows("seven", reference_reward="good")
    refused(wrong, "`reference_reward` must be a number, got 'good'", tools=[add])


@pytest.mark.parametrize(
    ("expected", "of_run"),
    [
        (False, {}),
        (True, {"sharded": True}),
        (False, {"sharded": True, "processes": 1}),
        (False, {"sharded": True, "vllm": "colocate"}),
        (True, {"sharded": True, "vllm": "colocate", "sleeps": True}),
        (False, {"vllm": "colocate", "sleeps": True}),
        (True, {"vllm": "colocate", "engine_of": 2}),
        (True, {"vllm": "server"}),
    ],
    ids=str,
)
def test_processes_sample_turns_together_where_one_waits_for_others(
    expected: bool, of_run: dict[str, Any]
):
    """vLLM samples for one process alone, unless it serves several or is given weights anew."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=of_run.get("processes", 2)),
        _dist=SimpleNamespace(is_zero3=False, is_fsdp=of_run.get("sharded", False)),
        use_vllm="vllm" in of_run,
        vllm_mode=of_run.get("vllm"),
        args=SimpleNamespace(
            vllm_tensor_parallel_size=of_run.get("engine_of", 1),
            vllm_enable_sleep_mode=of_run.get("sleeps", False),
        ),
    )
    assert InStepTrainer._samples_together.fget(trainer) == expected
