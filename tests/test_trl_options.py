"""Every option of TRL's GRPOTrainer works, is refused by name, or is said to have no effect."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    TrainerCallback,
    TrainingArguments,
)

pytest.importorskip("trl")

import trl.trainer.grpo_trainer as trls
from trl import GRPOConfig, GRPOTrainer
from trl_runs import (
    assert_same,
    config,
    double_of,
    kept,
    prompts,
    reward,
    run,
    token_ids,
    truth,
    with_rewards,
)

from grao_fast.integrations.trl import GRAOTrainer, GRAOTrainerConfig
from grao_fast.integrations.trl import options as listed

LIVE = ["live"] * 6
LISTS = {
    "works": listed.WORKS,
    "GPU": listed.NEEDS_GPU,
    "refused": {*listed.ONLY, *listed.REFUSED},
    "meaningless": listed.MEANINGLESS,
}
TRANSFORMERS = {each.name for each in fields(TrainingArguments)}


def test_every_option_is_in_one_list_and_every_entry_is_an_option():
    own = {each.name for each in fields(GRPOConfig)} - TRANSFORMERS
    parameters = set(inspect.signature(GRPOTrainer.__init__).parameters) - {"self"}
    names = [name for each in LISTS.values() for name in each]
    assert len(names) == len(set(names))
    assert set(names) - TRANSFORMERS == own | parameters
    assert set(names) & TRANSFORMERS <= set(listed.ONLY)


def test_the_page_has_the_same_lists():
    page = Path(__file__).parents[1] / "docs" / "trl.md"
    if not page.is_file():
        pytest.skip("needs a checkout")
    rows = dict(re.findall(r"^\| \*\*(\S+)\*\*[^|]*\| (.*) \|$", page.read_text(), re.MULTILINE))
    said = {name: set(re.findall(r"`(\w+)`", text)) for name, text in rows.items()}
    assert said == {name: set(each) for name, each in LISTS.items()}


def test_trls_default_loss_type_is_read_as_graos_and_the_others_are_refused(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    args = config(tmp_path)
    del args.loss_type  # the class's default
    trainer = run(tiny_model, args, prompts(LIVE))
    said = [each for each in caplog.messages if each.startswith("loss_type='dapo', TRL's default")]
    assert len(said) == 1 and "every sequence the same weight" in said[0]
    double = double_of(tiny_model)
    truth(double, *kept(trainer)[0]).loss.backward()
    assert_same(trainer.gradients[0], double)
    for loss_type in ("dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"):
        with pytest.raises(ValueError, match=f"no loss_type='{loss_type}'.* leave loss_type out"):
            run(tiny_model, config(tmp_path, loss_type=loss_type), prompts(LIVE))


def test_what_deepspeed_would_split_or_drop_is_refused(tmp_path: Path):
    args = config(tmp_path)
    settings = {"zero_optimization": {"stage": 2}}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=settings)
    listed.check_options(args, {"optimizers": (None, None)})
    with pytest.raises(ValueError, match=r"leave optimizers out, and set optim and learning_rate"):
        listed.check_options(args, {"optimizers": (object(), None)})
    settings["tensor_parallel"] = {"autotp_size": 2}
    with pytest.raises(ValueError, match=r"autotp_size=2 splits each layer.*and take ZeRO-3"):
        listed.check_options(args, {})


def test_options_of_what_is_refused_are_said_to_have_no_effect(tmp_path, caplog):
    args = config(tmp_path, vespo_k_pos=1.0, log_multimodal=False)
    listed.check_options(args, {})
    assert caplog.messages == [
        'vespo_k_pos=1.0 has no effect: it is an option of loss_type="vespo", which is refused',
        "log_multimodal=False has no effect: it is an option of images, and models are of text",
    ]


def test_graos_options_are_trls_arguments_too(tiny_model: Path, tmp_path: Path, caplog):
    own = {"grao_beta": 0.9, "grao_lam": 0.2, "reference_advantage": "signed"}
    args = config(tmp_path, kind=GRAOTrainerConfig, statistics="samples", **own)
    assert GRAOTrainerConfig(str(tmp_path), bf16=False).loss_type == "grpo"
    trainer = run(tiny_model, args, prompts(LIVE))
    assert "loss_type" not in caplog.text
    double = double_of(tiny_model)
    options = {"statistics": "samples", "reference_advantage": "signed", "beta": 0.9, "lam": 0.2}
    truth(double, *kept(trainer)[0], **options).loss.backward()
    assert_same(trainer.gradients[0], double)
    with pytest.raises(ValueError, match=r"which has grao_beta=0\.9: set it there alone"):
        GRAOTrainer("no such model", reward, args, prompts(LIVE), grao_beta=0.5)


def test_a_command_line_and_a_wrong_value(tmp_path: Path):
    line = ["--output_dir", str(tmp_path), "--bf16", "False", "--grao_lam", "0.3"]
    (args,) = HfArgumentParser(GRAOTrainerConfig).parse_args_into_dataclasses(line)
    assert (args.grao_beta, args.grao_lam, args.loss_type) == (0.5, 0.3, "grpo")
    with pytest.raises(ValueError, match="statistics must be one of group, samples; got 'batch'"):
        GRAOTrainerConfig(str(tmp_path), bf16=False, statistics="batch")


def test_options_of_sampling_and_logging_work_together(tiny_model: Path, tmp_path: Path):
    """All in one run, whose gradient stays the specification's."""
    args = config(
        tmp_path,
        steps_per_generation=None,
        generation_batch_size=6,
        model_init_kwargs={"dtype": "float32"},
        trust_remote_code=True,
        disable_dropout=True,
        shuffle_dataset=False,
        pad_to_multiple_of=8,
        top_p=0.95,
        top_k=20,
        min_p=0.001,
        repetition_penalty=1.1,
        generation_kwargs={"min_new_tokens": 2},
        chat_template_kwargs={"enable_thinking": False},
        cache_implementation="dynamic",
        reward_weights=[1.0, 0.0],
        log_completions=True,
        num_completions_to_print=1,
        log_unique_prompts=True,
    )

    def other(completions: list, **_: Any) -> list[float | None]:
        return [None] * len(completions)

    trainer = run(tiny_model, args, prompts(LIVE), by_name=True, reward_funcs=[reward, other])
    inputs, batch = trainer.rollouts[0]
    assert [row["prompt"] for row in inputs[::2]] == prompts(LIVE)["prompt"][:3]
    assert batch["prompt_ids"].shape[1] % 8 == batch["completion_ids"].shape[1] % 8 == 0
    assert int(batch["completion_mask"].sum(1).min()) >= 2
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == 1
    double = double_of(tiny_model)
    truth(double, *kept(trainer)[0]).loss.backward()
    assert_same(trainer.gradients[0], double)


def test_the_kls_policy_follows(tiny_model: Path, tmp_path: Path):
    """Mixed in full at each step, it is the policy as it was at the step before."""
    args = config(
        tmp_path,
        beta=0.1,
        use_bias_correction_kl=False,
        sync_ref_model=True,
        ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=1,
        max_steps=2,
    )
    trainer = run(tiny_model, args, prompts(LIVE * 2), lr=0.1)
    for mine, ours in zip(trainer.ref_model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, ours)
    moved = zip(trainer.model.parameters(), double_of(tiny_model).parameters(), strict=True)
    assert any(not torch.equal(mine.double(), began) for mine, began in moved)
    assert trainer.state.log_history[1]["kl"] == 0.0


def test_groups_that_fit_stay_whole(tiny_model: Path, tmp_path: Path):
    """In micro-batches of two groups, each the loss of its groups, in an order of their own."""
    args = config(
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=3,
        max_steps=3,
    )
    kinds = ["live", "dead", "gappy"] * 4
    trainer = run(tiny_model, args, prompts(kinds), extra={"row_B": torch.arange(12)})
    ((groups, rewards_NK),) = kept(trainer)
    orders = [part["row_B"].view(2, 2) for part in trainer._buffered_inputs]
    assert sorted(torch.cat(orders).flatten().tolist()) == list(range(12))
    for order_NG, gradients in zip(orders, trainer.gradients, strict=True):
        chosen = (order_NG[:, 0] // 2).tolist()
        assert order_NG.tolist() == [[2 * n, 2 * n + 1] for n in chosen]
        double = double_of(tiny_model)
        truth(double, [groups[n] for n in chosen], rewards_NK[chosen]).loss.backward()
        assert_same(gradients, double)


def test_groups_that_do_not_fit_are_said_to_be_split(tiny_model, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(tiny_model, config(tmp_path), prompts(LIVE))
    assert "micro-batches of 3 rows split groups of 2: set per_device_train_batch" in caplog.text


def test_tokens_of_an_environment_are_read_and_not_learned(tiny_model: Path, tmp_path: Path):
    """A rollout of two turns: the answer between them is the environment's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def rollout(prompts: list, trainer: GRAOTrainer) -> dict[str, list]:
        ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in prompts]
        prompt_ids = [each["input_ids"] for each in ids]
        first = [[10 + b, 20] for b in range(len(prompts))]
        completions = [[*turn, 30, 31, 32, 40 + turn[0], 1] for turn in first]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": [[-1.0] * 7] * len(prompts),
            "env_mask": [[1, 1, 0, 0, 0, 1, 1]] * len(prompts),
        }

    trainer = run(tiny_model, config(tmp_path), prompts(LIVE), rollout_func=rollout)
    ((groups, rewards_NK),) = kept(trainer)
    double = double_of(tiny_model)
    learned = [[*[[1, 1, 0, 0, 0, 1, 1]] * 2, [1] * len(sequences[-1])] for _, sequences in groups]
    loss = truth(double, groups, rewards_NK, learned=learned).loss
    assert loss != 0
    loss.backward()
    assert_same(trainer.gradients[0], double)


def test_truncated_samples_weigh_nothing_and_count_in_their_groups(
    tiny_model: Path, tmp_path: Path
):
    """The first sample of every second group is truncated, and its reward stays in the group."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def rollout(prompts: list, trainer: GRAOTrainer) -> dict[str, list]:
        ids = [tokenizer.apply_chat_template(each, add_generation_prompt=True) for each in prompts]
        return {
            "prompt_ids": [each["input_ids"] for each in ids],
            "completion_ids": [[10 + b, 20, 1 if b % 4 else 40] for b in range(len(prompts))],
            "logprobs": [[-1.0] * 3] * len(prompts),
        }

    args = config(tmp_path, mask_truncated_completions=True)
    trainer = run(tiny_model, args, prompts(LIVE), rollout_func=rollout)
    rows, batch = trainer.rollouts[0]
    assert batch["completion_mask"].sum(1).tolist() == [0, 3, 3, 3, 0, 3]
    ids = batch["completion_ids"].tolist()
    pairs = [(prompt, ids[b]) for b, (prompt, _) in enumerate(token_ids(batch))]
    groups, rewards_NK = with_rewards(tokenizer, rows, pairs, 2)
    learned = [
        [[int(n % 2 == 1)] * 3, [1] * 3, [1] * len(reference)]
        for n, (_, (_, _, reference)) in enumerate(groups)
    ]
    double = double_of(tiny_model)
    found = truth(double, groups, rewards_NK, learned=learned)
    assert (found.advantages_NK[[0, 2], 0] != 0).any()
    found.loss.backward()
    assert_same(trainer.gradients[0], double)


def test_transformers_batches_continuously(tiny_model: Path, tmp_path: Path):
    """By the option's old name, which TRL reads as the new one."""
    with pytest.warns(FutureWarning, match="use_transformers_paged"):
        args = config(
            tmp_path,
            use_transformers_paged=True,
            transformers_continuous_batching_config={"num_blocks": 32, "page_size": 32},
        )
    assert args.use_transformers_continuous_batching
    trainer = run(tiny_model, args, prompts(LIVE))
    assert trainer.continuous_batching_config.num_blocks == 32
    double = double_of(tiny_model)
    truth(double, *kept(trainer)[0]).loss.backward()
    assert_same(trainer.gradients[0], double)


def test_completions_are_uploaded_from_their_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With stand-ins for the hub's functions: what they are given, and what lies there."""
    calls = {}
    monkeypatch.setattr(trls, "create_repo", lambda name, **options: calls.update(made=name))
    monkeypatch.setattr(trls.DatasetCard, "push_to_hub", lambda self, name: calls.update(card=name))
    monkeypatch.setattr(trls, "CommitScheduler", lambda **options: calls.update(options))
    args = config(tmp_path, log_completions=True, log_completions_hub_repo="a/completions")
    trainer = run(tiny_model, args, prompts(LIVE))
    assert {calls[name] for name in ("made", "card", "repo_id")} == {"a/completions"}
    (written,) = Path(calls["folder_path"]).glob(calls["allow_patterns"][0])
    double = double_of(tiny_model)
    expected = truth(double, *kept(trainer)[0]).advantages_NK[:, :-1].flatten()
    told = torch.tensor(load_dataset("parquet", data_files=str(written))["train"]["advantage"])
    torch.testing.assert_close(told, expected, check_dtype=False)


def test_an_adapter_on_a_model_in_few_bits(tiny_model: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    trainer = run(
        tiny_model,
        config(tmp_path, max_steps=2, learning_rate=0.1, lr_scheduler_type="constant"),
        prompts(LIVE * 2),
        by_name=True,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    weights = dict(trainer.model.named_parameters())
    assert sum(each.dtype == torch.int8 for each in weights.values()) == 14
    assert all("lora" in name for name, each in weights.items() if each.requires_grad)
    assert all(gradient.any() for gradient in trainer.gradients[1])
    with pytest.raises(ValueError, match=r"in 4 bits does not train on a CPU: .*load_in_8bit"):
        run(
            tiny_model,
            config(tmp_path),
            prompts(LIVE),
            by_name=True,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        )


class StandIn:
    """In place of trl's VLLMGeneration: samples fixed tokens, at log-probs of its own."""

    def __init__(self, **options: Any) -> None:
        self.options, self.tokens = options, torch.Generator().manual_seed(0)

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list, num_generations: int, **_: Any) -> tuple:
        shape = (len(prompts), 5)
        ids = torch.randint(10, 60, shape, generator=self.tokens).tolist()
        logprobs = torch.rand(*shape, 1, generator=self.tokens) / 10 - 4.35
        return [list(each) for each in prompts], ids, logprobs.tolist(), None


VLLM = {
    "vllm_model_impl": "vllm",
    "vllm_enable_sleep_mode": True,
    "vllm_structured_outputs_regex": "a+",
    "vllm_server_base_url": "http://localhost:1",
    "vllm_server_host": "localhost",
    "vllm_server_port": 2,
    "vllm_server_timeout": 3.0,
    "vllm_group_port": 4,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_length": 64,
    "vllm_tensor_parallel_size": 1,
}


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_vllms_options_arrive_and_its_weights_are_trls(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
):
    monkeypatch.setattr(trls, "VLLMGeneration", StandIn)
    bounds = {"clip_max": 1.02, "clip_min": 0.98} if mode == "token_truncate" else {"clip_max": 1.0}
    weights = {f"vllm_importance_sampling_{name}": value for name, value in bounds.items()}
    args = config(
        tmp_path,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_importance_sampling_mode=mode,
        **VLLM,
        **weights,
    )
    trainer = run(tiny_model, args, prompts(LIVE))
    given = trainer.vllm_generation.options
    assert {name: given[name.removeprefix("vllm_")] for name in VLLM} == VLLM
    assert given["mode"] == "colocate"
    ((groups, rewards_NK),) = kept(trainer)
    ratio_BC = trainer.rollouts[0][1]["importance_sampling_ratio"].expand(6, 5)
    assert ratio_BC.unique().numel() > 1
    double = double_of(tiny_model)
    logprob_T = truth(double, groups, rewards_NK).logprob_T
    factors = []
    for n, (_, sequences) in enumerate(groups):
        factors += ratio_BC[2 * n : 2 * n + 2].flatten().tolist() + [1.0] * len(sequences[-1])
    sampler_T = logprob_T - torch.tensor(factors, dtype=torch.float64).log()
    truth(double, groups, rewards_NK, sampler_logprob_T=sampler_T).loss.backward()
    assert_same(trainer.gradients[0], double)


def test_vllms_engine_may_not_wrap_the_policys_class(tmp_path: Path):
    args = config(tmp_path, use_vllm=True, vllm_model_impl="transformers")
    with pytest.raises(ValueError, match="the policy is of that class: leave vllm_model_impl"):
        listed.check_options(args, {})
    args.vllm_mode = "server"
    listed.check_options(args, {})


def test_a_reward_model_scores_references_too(tiny_model: Path, tmp_path: Path):
    """With its own processing class, and a callback of the user's among TRL's arguments."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    judge = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    judge.config._name_or_path = "a/judge"
    rows = Dataset.from_list([{"prompt": "abc", "completion": "one two"}] * 6)
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer = run(
        tiny_model,
        config(tmp_path),
        rows,
        reward_funcs=judge,
        reward_processing_classes=tokenizer,
        callbacks=[Counter()],
    )
    with torch.no_grad():
        score = float(judge(**tokenizer("abcone two", return_tensors="pt")).logits)
    assert trainer.state.log_history[0]["reference/reward"] == pytest.approx(score, abs=1e-5)
    assert steps == [1]


def test_a_resumed_run_ends_where_a_whole_one_does(tiny_model: Path, tmp_path: Path):
    """Its last step has the same gradients, and the model's card names GRAO."""
    steps = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = run(tiny_model, config(tmp_path, **steps), prompts(LIVE * 2), lr=0.1)
    rest = run(
        tiny_model,
        config(tmp_path, **steps),
        prompts(LIVE * 2),
        lr=0.1,
        resume_from=tmp_path / "checkpoint-1",
    )
    assert (len(whole.gradients), len(rest.gradients)) == (2, 1)
    for mine, other in zip(rest.gradients[0], whole.gradients[1], strict=True):
        torch.testing.assert_close(mine, other)
    assert any(bool(gradient.any()) for gradient in rest.gradients[0])
    assert "2508.07750" in (tmp_path / "README.md").read_text()


def test_the_old_name_of_the_weights_bound(tmp_path: Path):
    with pytest.warns(FutureWarning, match="vllm_importance_sampling_cap"):
        args = config(tmp_path, vllm_importance_sampling_cap=2.5)
    assert args.vllm_importance_sampling_clip_max == 2.5
