"""What TRL's own tests ask of GRPOTrainer's rollouts and data, asked of GRAOTrainer.

TRL's tests load models and data from the hub. Here both are tiny and local, and each row has a
reference. What TRL does up to the loss is compared with GRPOTrainer's from the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict, IterableDatasetDict
from peft import LoraConfig
from transformers import AutoTokenizer

pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trls
from tiny import save_tiny_classifier
from trl_beside import (
    WORDS,
    OfGRAO,
    OfTRL,
    assert_sampled_alike,
    both,
    letters,
    make,
    messages,
    moved,
    said,
    stream,
    texts,
    weights,
)
from trl_runs import assert_same, config, double_of, prompts, run, token_ids, truth, with_rewards
from trl_tools import save_tool_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model whose tokenizer and chat template are not the policy's."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    return str(save_tiny_classifier(tmp_path_factory.mktemp("judge"), chat_template=template))


def variety(completions: list, **_: Any) -> list[float]:
    return [float(len(set(said(each)))) for each in completions]


async def later(completions: list, **columns: Any) -> list[float]:
    return variety(completions, **columns)


def nothing(completions: list, **_: Any) -> list[None]:
    return [None] * len(completions)


def far_from_value(completions: list, value: list[int], **_: Any) -> list[float]:
    return [abs(n - score) for n, score in zip(value, letters(completions), strict=True)]


def informed(completions: list, trainer_state: Any, log_metric: Any, **_: Any) -> list[float]:
    log_metric("rewards/step", float(trainer_state.global_step))
    return letters(completions)


SAMPLING = {"top_p": 0.9, "top_k": 10, "min_p": 0.01, "repetition_penalty": 1.1}
BEAMS = {"num_beams": 2, "top_k": 50, "length_penalty": -0.1}
CASES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "text": (texts, [letters], {}),
    "messages": (messages, [letters], {}),
    "stream": (stream, [letters], {}),
    "rewards with weights": (texts, [letters, variety], {"reward_weights": [0.7, 0.3]}),
    "a reward that waits": (texts, [letters, later], {}),
    "a reward that gives None": (texts, [letters, nothing], {}),
    "a reward by a column": (texts, [far_from_value], {}),
    "a reward by the state": (texts, [informed], {}),
    "a reward model": (texts, ["judge"], {}),
    "a reward model of messages": (messages, ["judge"], {}),
    "a function and a model": (texts, [letters, "judge"], {}),
    "padding": (texts, [letters], {"pad_to_multiple_of": 8}),
    "sampling": (texts, [letters], SAMPLING),
    "beams": (texts, [letters], {"generation_kwargs": BEAMS}),
    "a group in two": (texts, [letters], {"num_generations": 6, "gradient_accumulation_steps": 2}),
    "iterations": (texts, [letters], {"num_iterations": 2, "max_steps": 2}),
    "a KL penalty": (texts, [letters], {"beta": 0.1}),
    "a worker": (texts, [letters], {"dataloader_num_workers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_samples_and_metrics_are_trls(llama: Path, judge: str, tmp_path: Path, case: str):
    data, rewards, options = CASES[case]
    rewards = [judge if each == "judge" else each for each in rewards]
    theirs, ours = both(llama, tmp_path, rewards, data(), **options)
    assert_sampled_alike(theirs, ours)
    assert moved(ours) == set(ours.began)


def test_steps_are_given_what_trl_gives(llama: Path, tmp_path: Path):
    """Two epochs of two rollouts of three prompts, each for two iterations of four steps."""
    theirs, ours = both(
        llama,
        tmp_path,
        letters,
        texts(),
        num_generations=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        steps_per_generation=3,
        num_iterations=2,
        shuffle_dataset=False,
        num_train_epochs=2,
        max_steps=-1,
    )
    assert len(ours.given) == 2 * 2 * 3 * 2
    assert ours.given == theirs.given
    first, second = ([row["prompt"] for row in ours.given[n][::2]] for n in (5, 6))
    assert first + second == WORDS


EVALUATED: dict[str, Callable[[], Any]] = {
    "rows": texts,
    "a stream": stream,
    "rows by name": lambda: {"one": texts(), "two": texts()},
    "streams by name": lambda: {"one": stream(), "two": stream()},
    "a DatasetDict": lambda: DatasetDict({"one": texts(), "two": texts()}),
    "an IterableDatasetDict": lambda: IterableDatasetDict({"one": stream(), "two": stream()}),
}


@pytest.mark.parametrize("held", EVALUATED)
def test_evaluation_is_of_trls_samples(llama: Path, tmp_path: Path, held: str):
    options = {"per_device_eval_batch_size": 3, "num_generations_eval": 1}
    found = []
    for kind in (OfTRL, OfGRAO):
        data = EVALUATED[held]()
        trainer = make(kind, llama, tmp_path, letters, texts(), eval_dataset=data, **options)
        torch.manual_seed(0)
        trainer.evaluate()
        found.append(trainer.evaluate(eval_dataset=EVALUATED[held]()))
    theirs, ours = found
    losses = [name for name in ours if name.endswith("_loss")]
    assert losses == [name for name in theirs if name.endswith("_loss")]
    assert all(math.isfinite(ours[name]) for name in losses)
    names = [name for name in theirs if name.startswith(("eval_reward", "eval_completions"))]
    assert len(names) >= 10
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_evaluation_before_the_first_step(llama: Path, tmp_path: Path):
    theirs, ours = both(
        llama,
        tmp_path,
        letters,
        texts(),
        eval_dataset=texts(),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=3,
    )
    expected, logged = theirs.state.log_history[0], ours.state.log_history[0]
    assert math.isfinite(logged["eval_loss"]) and logged["step"] == 0
    assert logged["eval_reward"] == pytest.approx(expected["eval_reward"])


def test_loaders_and_reward_classes_are_trls(llama: Path, judge: str, tmp_path: Path):
    """A stream has one worker, and one for evaluation leaves training its workers."""
    streamed = make(OfGRAO, llama, tmp_path, letters, stream(), dataloader_num_workers=4)
    assert streamed.args.dataloader_num_workers == 0
    assert streamed.args.accelerator_config.dispatch_batches is False
    options = {"dataloader_num_workers": 4, "per_device_eval_batch_size": 3}
    mapped = make(OfGRAO, llama, tmp_path, letters, texts(), eval_dataset=stream(), **options)
    assert mapped.get_train_dataloader().num_workers == 4
    assert mapped.get_eval_dataloader().num_workers == 0
    assert mapped.args.dataloader_num_workers == 4
    classes = [AutoTokenizer.from_pretrained(judge) for _ in range(2)]
    for given in (classes, classes[0]):
        rewards = [judge, judge] if isinstance(given, list) else judge
        trainer = make(OfGRAO, llama, tmp_path, rewards, texts(), reward_processing_classes=given)
        kept = trainer.reward_processing_classes
        assert all(one is other for one, other in zip(kept, classes, strict=False))
        assert len(kept) == len(trainer.reward_funcs)


def without_log_probs(prompts: list, trainer: Any) -> dict[str, list]:
    return {"prompt_ids": [[5]] * len(prompts), "completion_ids": [[6]] * len(prompts)}


def one_reward(completions: list, **_: Any) -> list[float]:
    return [1.0]


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "no data": (None, letters, {}, "`train_dataset` is required"),
    "data by split": (DatasetDict(train=texts()), letters, {}, "must be a `Dataset`"),
    "a dispatched stream": (
        stream(),
        letters,
        {"accelerator_config": {"dispatch_batches": True}},
        "dispatch_batches=False",
    ),
    "no reward": (texts(), None, {}, "No reward source"),
    "too few rewards": (texts(), one_reward, {}, "returned 1 rewards"),
    "a rollout without log-probs": (
        texts(),
        letters,
        {"rollout_func": without_log_probs},
        "must return keys",
    ),
    "an adapter of the head": (
        texts(),
        letters,
        {"peft_config": LoraConfig(target_modules=["q_proj", "lm_head"])},
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_trl_refuses_is_refused_in_its_words(llama: Path, tmp_path: Path, case: str):
    data, rewards, options, part = REFUSED[case]
    told = []
    for kind in (OfTRL, OfGRAO):
        with pytest.raises((ValueError, TypeError), match=part) as error:
            make(kind, llama, tmp_path, rewards, data, **options).train()
        told.append(str(error.value))
    assert told[0] == told[1]


class Engine:
    """In place of TRL's VLLMGeneration: the first token of each sample has no log-prob."""

    def __init__(self, **_: Any) -> None:
        self.tokens, self.syncs = torch.Generator().manual_seed(0), 0

    def sync_weights(self) -> None:
        self.syncs += 1

    def generate(self, prompts: list, num_generations: int, **_: Any) -> tuple:
        ids = torch.randint(10, 60, (len(prompts), 5), generator=self.tokens).tolist()
        return [list(each) for each in prompts], ids, [[[None], *[[-4.3]] * 4]] * len(ids), None


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_a_token_without_a_log_prob_has_no_weight_of_its_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setattr(trls, "VLLMGeneration", Engine)
    options = {"use_vllm": True, "vllm_importance_sampling_mode": mode}
    theirs, ours = both(llama, tmp_path, letters, texts(), **options)
    assert_sampled_alike(theirs, ours)
    ratios = [each.rollouts[0][1]["importance_sampling_ratio"] for each in (theirs, ours)]
    torch.testing.assert_close(*ratios)
    if mode.startswith("token"):
        assert (ratios[1][:, 0] == 1).all() and (ratios[1][:, 1:] != 1).all()
    assert all(bool(each.isfinite().all()) for _, each in weights(ours))
    assert moved(ours) == set(ours.began)


def test_rollout_func_finds_the_steps_weights_in_vllm(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trls, "VLLMGeneration", Engine)
    syncs = []

    def rollout(prompts: list, trainer: Any) -> dict[str, list]:
        syncs.append(trainer.vllm_generation.syncs)
        ids = [[10 + syncs[-1] + b, 20] for b in range(len(prompts))]
        return without_log_probs(prompts, trainer) | {
            "completion_ids": ids,
            "logprobs": [[-4.3] * 2] * len(prompts),
        }

    options = {"use_vllm": True, "rollout_func": rollout, "max_steps": 2}
    make(OfGRAO, llama, tmp_path, letters, texts(), **options).train()
    assert syncs == [1, 2]


def test_where_all_samples_are_truncated_references_alone_teach(tiny_model: Path, tmp_path: Path):
    """Rewards of the samples still count in their groups."""
    endless = {"suppress_tokens": [1]}
    args = config(tmp_path, mask_truncated_completions=True, generation_kwargs=endless)
    data = prompts(["live"] * 6).add_column("reference_reward", [6.5] * 6)
    trainer = run(tiny_model, args, data)
    rows, batch = trainer.rollouts[0]
    assert not batch["completion_mask"].any()
    ids = batch["completion_ids"].tolist()
    pairs = [(prompt, ids[b]) for b, (prompt, _) in enumerate(token_ids(batch))]
    groups, rewards_NK = with_rewards(trainer._tokenizer, rows, pairs, 2)
    rewards_NK[:, -1] = 6.5
    learned = [[[0] * 6, [0] * 6, [1] * len(answer)] for _, (_, _, answer) in groups]
    double = double_of(tiny_model)
    truth(double, groups, rewards_NK, learned=learned).loss.backward()
    assert any(bool(gradient.any()) for gradient in trainer.gradients[0])
    assert_same(trainer.gradients[0], double)
