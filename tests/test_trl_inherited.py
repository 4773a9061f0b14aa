"""What TRL's own tests ask of GRPOTrainer, asked of GRAOTrainer.

TRL's tests load their models and data from the hub. Here both are tiny and local, and each row has
a reference. A trainer of either kind begins from the same seed, so that what TRL does up to the
loss is compared with GRPOTrainer's; the loss is compared with the specification in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from families import SIZES, family_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trls
from tiny import save_tiny_classifier
from trl import GRPOTrainer
from trl_runs import (
    CHECKPOINTING,
    assert_same,
    config,
    double_of,
    prompts,
    run,
    token_ids,
    truth,
    with_rewards,
)
from trl_tools import save_tool_model

from grao_fast.integrations.trl import GRAOTrainer
from grao_fast.models.head import LogitTransform

WORDS = ["better than", "explicit is", "simple", "complex or not", "flat", "sparse is better"]
OF_TRAINER = (
    "eval_dataset", "reward_processing_classes", "peft_config", "tools", "environment_factory",
    "rollout_func", "processing_class",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward model whose tokenizer and chat template are not the policy's."""
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    return str(save_tiny_classifier(tmp_path_factory.mktemp("judge"), chat_template=template))


def texts(**columns: Any) -> Dataset:
    rows = [{"prompt": word, "reference": f" {word}!", "value": n} for n, word in enumerate(WORDS)]
    return Dataset.from_list([row | columns for row in rows])


def messages(**columns: Any) -> Dataset:
    rows = [{"prompt": [{"role": "user", "content": word}], "reference": word} for word in WORDS]
    return Dataset.from_list([row | columns for row in rows])


def stream() -> Any:
    return texts().to_iterable_dataset()


def said(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def letters(completions: list, **_: Any) -> list[float]:
    return [float(sum(map(ord, said(each))) % 11) for each in completions]


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


class Recording:
    """Keeps rollouts as they are before a shuffle, and what steps are given."""

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.rollouts = [*getattr(self, "rollouts", []), (inputs, output)]
        return output

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.given = [*getattr(self, "given", []), inputs]
        return super().training_step(model, inputs, num_items_in_batch)


class OfTRL(Recording, GRPOTrainer):
    pass


class OfGRAO(Recording, GRAOTrainer):
    pass


def make(kind: type, model: Any, folder: Path, rewards: Any, data: Any, **options: Any) -> Any:
    """A trainer; options that are none of its parameters are of its arguments."""
    named = {name: options.pop(name) for name in OF_TRAINER if name in options}
    defaults = {"num_generations": 3, "gradient_accumulation_steps": 1, "learning_rate": 0.1}
    args = config(folder, **(defaults | options))
    rewards = list(rewards) if isinstance(rewards, list) else rewards  # to which TRL writes
    return kind(str(model) if isinstance(model, Path) else model, rewards, args, data, **named)


def both(
    *arguments: Any, speak: Callable[[list[str]], list[str]] | None = None, **options: Any
) -> tuple[Any, Any]:
    """Trained by TRL, and by GRAOTrainer; each loads the model again.

    speak: the model's turns for these prompts, in place of sampling.
    """
    trainers = [make(kind, *arguments, **options) for kind in (OfTRL, OfGRAO)]
    for trainer in trainers:
        trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
        if speak is not None:
            trainer.model.generate = partial(_generate, trainer._tokenizer, speak)
        torch.manual_seed(0)
        trainer.train()
    return trainers[0], trainers[1]


def _generate(tokenizer: Any, speak: Callable, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    turns = [f"{text}<|im_end|>" for text in speak(tokenizer.batch_decode(input_ids))]
    ids = [torch.tensor(tokenizer(turn)["input_ids"]) for turn in turns]
    return torch.cat([input_ids, nn.utils.rnn.pad_sequence(ids, batch_first=True)], dim=1)


def weights(trainer: Any) -> list[tuple[str, torch.Tensor]]:
    return list(trainer.model.named_parameters())


def moved(trainer: Any) -> set[str]:
    return {name for name, each in weights(trainer) if not torch.equal(each, trainer.began[name])}


def assert_sampled_alike(theirs: Any, ours: Any) -> None:
    """The same rows and completions in the first rollout, and the same metrics of them."""
    (their_rows, their_batch), (rows, batch) = theirs.rollouts[0], ours.rollouts[0]
    assert rows == their_rows
    for name in {"prompt_ids", "completion_ids", "completion_mask", "tool_mask"} & set(their_batch):
        assert torch.equal(batch[name], their_batch[name]), name
    expected, logged = theirs.state.log_history[0], ours.state.log_history[0]
    shared = ("reward", "reward_std", "num_tokens", "completions/", "rewards/", "tools/", "samp")
    names = [name for name in expected if name.startswith(shared)]
    assert len(names) >= 12
    for name in names:
        value = expected[name]  # None for a reward that gives none
        assert logged[name] == (value and pytest.approx(value, rel=1e-5)), name


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
        trainer = make(kind, llama, tmp_path, letters, texts(), **options)
        torch.manual_seed(0)
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


class Counter:
    """An environment that counts."""

    def reset(self, **row: Any) -> None:
        self.count, self.row = 0, row

    def increment(self, step: int) -> int:
        """Increments the count.

        Args:
            step: By how much.
        """
        self.count += step
        return self.count


class Scored(Counter):
    def get_reward(self) -> float:
        return float(self.count)


class Echo:
    """An environment that repeats, and gives the prompt."""

    def reset(self, **row: Any) -> str:
        self.count, self.row = 0, row
        return "Say something."

    def shout(self, text: str) -> str:
        """Repeats a text in capitals.

        Args:
            text: The text.
        """
        self.count += 1
        return text.upper()


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
    "an unknown environment": (
        messages(environment="other"),
        letters,
        {"environment_factory": {"one": Counter}},
        "not among the environments",
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


def test_a_trained_copy_of_the_head_is_refused(llama: Path, tmp_path: Path):
    """GRPOTrainer trains one; GRAOTrainer's loss reads a plain head."""
    adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"ModulesToSaveWrapper.*leave lm_head out"):
        make(OfGRAO, llama, tmp_path, letters, texts(), peft_config=adapter)


def call(name: str, **arguments: Any) -> str:
    function = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{function}\n</tool_call>"


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The one number.
        b: The other number.
    """
    return a * b


async def multiply_later(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The one number.
        b: The other number.
    """
    return a * b


def told(completions: list, **_: Any) -> list[float]:
    """By the last turn's text, and by how many turns there are."""
    return [float(len(said(each)) + 3 * len(each)) for each in completions]


def multiplied(name: str) -> list[str]:
    return [call(name, a=3, b=4), call(name, a=3, c=4), "no tool"]


COUNTED = [call("increment", step=1), call("decrement", step=2), "no tool"]
MALFORMED = [
    '<tool_call>\n{"arguments": {"a": 3, "b": 4}}\n</tool_call>',
    '<toolcall>\n{"arguments": {"a": 3, "b": 4}}\n</toolcall> so',
    '<tool_call>\n{"arguments": {a: 3, b: 4}}\n</tool_call>',
]
MIXED = Dataset.from_list(
    [{"environment": each, "reference": "I did"} for each in ["counter", "echo"] * 2]
)
TOOLS: dict[str, tuple[Any, Any, dict[str, Any], list[str], tuple[float, float], list[int]]] = {
    # Data, rewards, options, first turns, frequencies of calls and failures, counts at the end.
    "a tool": (messages(), told, {"tools": [multiply]}, multiplied("multiply"), (2 / 3, 1 / 2), []),
    "a tool that waits": (
        messages(),
        told,
        {"tools": [multiply_later]},
        multiplied("multiply_later"),
        (2 / 3, 1 / 2),
        [],
    ),
    "malformed calls": (messages(), told, {"tools": [multiply]}, MALFORMED, (0, 0), []),
    "an environment": (
        messages(),
        told,
        {"environment_factory": Counter},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "an environment's reward": (
        messages(reference_reward=0.5),
        None,
        {"environment_factory": Scored},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "its reward and another": (
        messages(reference_reward=0.5),
        [told],
        {"environment_factory": Scored, "reward_weights": [0.5]},
        COUNTED,
        (2 / 3, 1 / 2),
        [1, 0, 0],
    ),
    "several environments": (
        MIXED,
        told,
        {
            "environment_factory": {"counter": Counter, "echo": Echo},
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "shuffle_dataset": False,
        },
        [call("increment", step=1), "no tool", call("shout", text="hi"), "none"],
        (1 / 2, 0),
        [1, 0, 1, 0],
    ),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tools_are_called_as_trl_calls_them(llama: Path, tmp_path: Path, case: str):
    data, rewards, options, turns, frequencies, counts = TOOLS[case]

    def speak(prompts: list[str]) -> list[str]:
        return turns if len(prompts) == len(turns) else ["done!"] * len(prompts)

    theirs, ours = both(
        llama, tmp_path, rewards, data, speak=speak, max_completion_length=400, **options
    )
    assert_sampled_alike(theirs, ours)
    entry = ours.state.log_history[0]
    assert (entry["tools/call_frequency"], entry["tools/failure_frequency"]) == pytest.approx(
        frequencies
    )
    assert [each.count for each in ours.environments or []] == counts
    assert moved(ours) == set(ours.began)


def test_data_of_an_environments_own_have_no_references(llama: Path, tmp_path: Path):
    """GRPOTrainer trains without a dataset; GRAOTrainer has nothing to compare with."""
    with pytest.raises(ValueError, match="gives prompts and no references: pass a dataset"):
        make(OfGRAO, llama, tmp_path, told, None, environment_factory=Echo)


class Engine:
    """In place of TRL's VLLMGeneration: the first token of each sample has no log-prob."""

    def __init__(self, **_: Any) -> None:
        self.tokens = torch.Generator().manual_seed(0)

    def sync_weights(self) -> None:
        pass

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


@pytest.mark.parametrize("form", ["a config", "a model", "a model and a KL penalty", "recomputed"])
def test_an_adapter_alone_moves(llama: Path, tmp_path: Path, form: str):
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    options: dict[str, Any] = {"max_steps": 2, "lr_scheduler_type": "constant"}
    if form.startswith("a model"):
        model = get_peft_model(model, adapter)
        options |= {"beta": 0.1} if "KL" in form else {}
    else:
        options |= {"peft_config": adapter, CHECKPOINTING: form == "recomputed"}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    trainer = make(OfGRAO, model, tmp_path, letters, texts(), processing_class=tokenizer, **options)
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == {name for name in trainer.began if ".default." in name}
    copies = [name for name in trainer.began if ".ref." in name]
    assert bool(copies) == ("KL" in form)


def saved_family(name: str, llama: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = family_model(name, **sizes, max_position_embeddings=256, **MODELS[name])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "Cohere2": {},
    "Gemma2": {},
    "Qwen3Moe": {},
    "Glm4Moe": MIXTURE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "NemotronH": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
}
OF_EXPERTS = ("Qwen3Moe", "Glm4Moe", "GptOss")


@pytest.mark.parametrize("name", MODELS)
def test_families_that_trl_trains(llama: Path, tmp_path: Path, name: str):
    folder = saved_family(name, llama, tmp_path / "model")
    options = {"router_aux_loss_coef": 0.0} if name in OF_EXPERTS else {}
    trainer = make(OfGRAO, folder, tmp_path, letters, texts(), **options)
    gradients = []
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(each.grad.clone() for _, each in weights(trainer))
    )
    trainer.train()
    eager = {"experts_implementation": "eager"} if name in OF_EXPERTS else {}  # in float64
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    rows, batch = trainer.rollouts[0]
    tokenizer = trainer._tokenizer
    answer = [*tokenizer(rows[0]["reference"])["input_ids"], tokenizer.eos_token_id]
    pairs = token_ids(batch)
    sequences = [*[ids for _, ids in pairs], answer]
    spoken = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences]
    rewards_NK = torch.tensor([letters(spoken)], dtype=torch.float64)
    transform = LogitTransform.from_config(double.config.get_text_config())
    logits = {"logit_scale": transform.logit_scale, "softcap": transform.softcap}
    truth(double, [(pairs[0][0], sequences)], rewards_NK, **logits).loss.backward()
    assert_same(gradients, double)


def test_an_adapter_of_experts_is_held_to_its_copy(llama: Path, tmp_path: Path):
    folder = saved_family("GptOss", llama, tmp_path / "model")
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    adapter = LoraConfig(target_parameters=names)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapter)
    trainer = make(
        OfGRAO,
        model,
        tmp_path,
        letters,
        texts(),
        beta=0.1,
        router_aux_loss_coef=0.0,
        max_steps=2,
        lr_scheduler_type="constant",
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == {name for name in trainer.began if ".default." in name}
    first, second = (entry["kl"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-6


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


def test_code_beside_a_model_runs_if_it_is_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    settings["auto_map"] = {name: f"modeling_own.{each}" for name, each in classes.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="custom code"):
        make(OfGRAO, folder, tmp_path, letters, texts())
    trainer = make(OfGRAO, folder, tmp_path, letters, texts(), trust_remote_code=True)
    assert type(trainer.model).__name__ == "OwnForCausalLM"
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == set(trainer.began)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
