"""GRAO inside TRL's GRPOTrainer, against the specification in float64."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

pytest.importorskip("trl")

from published import assert_as_published
from tolerance import gradients_of, worst_error
from trl_runs import (
    assert_same,
    config,
    double_of,
    kept,
    owners_of,
    prompts,
    reward,
    run,
    truth,
    with_rewards,
)

from grao_fast.integrations.trl import GRAOTrainer
from grao_fast.integrations.trl.references import carriers, in_order, most_carriers
from grao_fast.kernels import reference

WORKER = Path(__file__).with_name("trl_worker.py")
KINDS = ["live", "dead", "gappy"] * 4


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("accumulated", "per_generation", "steps"),
    [(2, 2, 2), (1, 1, 2), (4, 2, 1), (1, 2, 4)],
    ids=["whole", "one_micro_batch", "two_rollouts_a_step", "two_steps_a_rollout"],
)
def test_the_gradient_is_the_specifications(
    tiny_model: Path, tmp_path: Path, accumulated: int, per_generation: int, steps: int
):
    """Groups of 2 in shuffled micro-batches of 3 rows, or of 6 where there is but one.

    Dead groups and absent rewards are among them, and references longer than completions may be.
    Two steps on a rollout have its gradient between them.
    """
    args = config(
        tmp_path,
        per_device_train_batch_size=6 // per_generation,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=per_generation,
        max_steps=steps,
    )
    trainer = run(tiny_model, args, prompts(KINDS))
    assert len(trainer.gradients) == steps
    double = double_of(tiny_model)
    losses = [truth(double, *batch) for batch in kept(trainer)]
    assert any((each.advantages_NK == 0).all(1).any() for each in losses)
    assert any(each.advantages_NK.isnan().any() for each in losses)
    loss = sum(each.loss for each in losses) / len(losses)
    loss.backward()
    gradients = [torch.stack(each).mean(0) for each in zip(*trainer.gradients, strict=True)]
    assert_same(gradients, double)
    if per_generation <= accumulated:  # off policy, ratios stand where log-probs do
        mean = sum(logged(trainer, "loss")) / steps
        errors = mean, loss.detach(), gradients, gradients_of(double)
        assert_as_published("TRL, GRAOTrainer", *errors)
        assert mean == pytest.approx(float(loss.detach()), abs=1e-4)


def test_metrics_are_of_samples_and_the_reference_has_its_own(tiny_model: Path, tmp_path: Path):
    """At the second step: what rewards said of references at the first is forgotten."""
    trainer = run(tiny_model, config(tmp_path, max_steps=2), prompts(KINDS))
    groups, rewards_NK = kept(trainer)[1]
    rows, _ = trainer.rollouts[1]
    expected = truth(double_of(tiny_model), groups, rewards_NK)
    entry = trainer.state.log_history[1]
    assert max(len(sequences[-1]) for _, sequences in groups) > 6
    assert entry["completions/max_length"] <= 6
    assert entry["scored"] == len(rows)
    assert len(trainer._logs["extra"]["said"]) == len(trainer._logs["prompt"]) == len(rows)
    metrics = {
        "reward": rewards_NK[:, :-1].nanmean(),
        "reference/reward": rewards_NK[:, -1].nanmean(),
        "reference/advantage": expected.advantages_NK[:, -1].nanmean(),
        "reference/frac_negative": (expected.advantages_NK[:, -1] < 0).double().mean(),
        "frac_dead": (expected.advantages_NK.nan_to_num() == 0).all(1).double().mean(),
        "objective/exploration": expected.exploration,
        "objective/imitation": expected.imitation,
        "objective/alignment": expected.alignment,
    }
    for name, value in metrics.items():
        assert entry[name] == pytest.approx(float(value.detach()), abs=1e-4), name
    parts = sum(entry[f"objective/{part}"] for part in ("exploration", "imitation", "alignment"))
    assert parts == pytest.approx(-entry["loss"], abs=1e-4)
    table = torch.tensor(list(trainer._logs["advantages"]), dtype=torch.float64)
    torch.testing.assert_close(
        table, expected.advantages_NK[:, :-1].flatten(), equal_nan=True, rtol=1e-6, atol=1e-6
    )
    assert "clip_ratio/region_mean" not in entry and "kl" not in entry


@pytest.mark.parametrize("corrected", [True, False])
def test_a_second_iteration_holds_ratios_and_the_kl_holds_the_policy(
    tiny_model: Path, tmp_path: Path, corrected: bool
):
    """Two steps by SGD on one rollout, against the same two of the specification."""
    kl_coef, clip, lr = 0.3, (0.02, 0.2), 0.02
    args = config(
        tmp_path,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=1,
        num_iterations=2,
        max_steps=2,
        epsilon=clip[0],
        epsilon_high=clip[1],
        beta=kl_coef,
        use_bias_correction_kl=corrected,
        lr_scheduler_type="constant",
    )
    trainer = run(tiny_model, args, prompts(["live", "dead"] * 3), lr=lr)
    ((groups, rewards_NK),) = kept(trainer)
    double = double_of(tiny_model)
    owner_T = owners_of(groups)
    is_sample_T = owner_T % 3 != 2
    # A KL to anything makes the specification score samples of dead groups too.
    anything = {"ref_logprob_T": torch.zeros(len(owner_T)), "kl_coef": 1.0}
    scored_T = truth(double, groups, rewards_NK, **anything).logprob_T
    start_T = torch.where(is_sample_T, scored_T, torch.nan)
    truth(double, groups, rewards_NK).loss.backward()
    assert_same(trainer.gradients[0], double)  # the policy is where it began: no KL yet
    torch.optim.SGD(double.parameters(), lr=lr).step()
    double.zero_grad()
    kl = {"ref_logprob_T": start_T, "kl_coef": kl_coef, "kl_times_ratio": corrected}
    second = truth(double, groups, rewards_NK, old_logprob_T=start_T, clip=clip, **kl)
    second.loss.backward()
    assert_same(trainer.gradients[1], double)
    weight_T = reference.sequence_weights(second.advantages_NK).flatten()[owner_T]
    rho_T = (second.logprob_T - start_T).exp()[is_sample_T]
    weight_T = weight_T[is_sample_T]
    held_T = ((weight_T > 0) & (rho_T > 1.2)) | ((weight_T < 0) & (rho_T < 0.98))
    assert 0.1 < held_T.double().mean() < 0.9
    held = [0.0, float(held_T.double().mean())]
    assert logged(trainer, "clip_ratio/region_mean") == pytest.approx(held)
    assert logged(trainer, "kl") == pytest.approx([0.0, float(second.kl.detach()) / kl_coef])


def test_vllms_importance_ratio_is_a_factor_of_the_samples_tokens(tiny_model: Path, tmp_path: Path):
    ratio_BC = torch.linspace(0.0, 2.0, 36).view(6, 6)
    extra = {"importance_sampling_ratio": ratio_BC}
    trainer = run(tiny_model, config(tmp_path), prompts(["live"] * 6), extra=extra)
    ((groups, rewards_NK),) = kept(trainer)
    double = double_of(tiny_model)
    logprob_T = truth(double, groups, rewards_NK).logprob_T
    factors = []
    for n, (_, sequences) in enumerate(groups):
        for k, ids in enumerate(sequences):
            of_sample = ratio_BC[2 * n + k, : len(ids)].tolist() if k < 2 else []
            factors += of_sample or [1.0] * len(ids)
    sampler_T = logprob_T - torch.tensor(factors, dtype=torch.float64).log()
    assert len(factors) == len(logprob_T)
    truth(double, groups, rewards_NK, sampler_logprob_T=sampler_T).loss.backward()
    assert_same(trainer.gradients[0], double)


@pytest.mark.parametrize("reference_advantage", ["clip", "floor", "tapered"])
def test_options_of_the_objective_arrive(
    tiny_model: Path, tmp_path: Path, reference_advantage: str
):
    options = {"statistics": "samples", "reference_advantage": reference_advantage}
    trainer = run(
        tiny_model, config(tmp_path), prompts(KINDS), grao_beta=0.9, grao_lam=0.2, **options
    )
    double = double_of(tiny_model)
    (batch,) = kept(trainer)
    result = truth(double, *batch, beta=0.9, lam=0.2, **options)
    result.loss.backward()
    assert_same(trainer.gradients[0], double)
    if reference_advantage != "clip":
        signed_NK = reference.sequence_weights(result.advantages_NK, reference_advantage="signed")
        assert (signed_NK[:, -1] < 0).any()


def test_a_blank_reference_is_absent(tiny_model: Path, tmp_path: Path):
    """It is not scored either: a reward may not take an empty text."""
    scored = []

    def counted(completions: list, **columns: Any) -> list[float | None]:
        scored.append(len(completions))
        return reward(completions, **columns)

    rows = prompts(["live"] * 6).to_list()
    for row in rows[::2]:
        row["reference"][0]["content"] = " "
    trainer = run(
        tiny_model,
        config(tmp_path, per_device_train_batch_size=6),
        Dataset.from_list(rows),
        reward_funcs=counted,
    )
    double = double_of(tiny_model)
    losses = [truth(double, *batch) for batch in kept(trainer)]
    absent = torch.cat([each.advantages_NK[:, -1].isnan() for each in losses])
    assert absent.any() and not absent.all()
    samples = sum(len(rows) for rows, _ in trainer.rollouts)
    assert sum(scored) == samples + int((~absent).sum())
    (sum(each.loss for each in losses) / len(losses)).backward()
    assert_same(trainer.gradients[0], double)


def test_a_batch_without_references_learns_from_samples(tiny_model: Path, tmp_path: Path):
    scored = []

    def counted(completions: list, **columns: Any) -> list[float | None]:
        scored.append(len(completions))
        return reward(completions, **columns)

    rows = prompts(["live"] * 6).to_list()
    for row in rows[1:]:
        row["reference"][0]["content"] = " "
    args = config(tmp_path, max_steps=2)
    trainer = run(tiny_model, args, Dataset.from_list(rows), reward_funcs=counted)
    assert sorted(scored) == [1, 6, 6]
    for gradients, batch in zip(trainer.gradients, kept(trainer), strict=True):
        double = double_of(tiny_model)
        truth(double, *batch).loss.backward()
        assert_same(gradients, double)


def test_rows_of_a_stream_may_lack_the_column(tiny_model: Path, tmp_path: Path):
    rows = prompts(["live"] * 6).to_list()
    for row in rows[1::2]:
        del row["reference"]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = run(tiny_model, config(tmp_path), stream)
    inputs, batch = trainer.rollouts[0]
    lengths_B = batch["lengths_B2"][:, 1]
    carried = [bool(row.get("reference")) and b % 2 == 0 for b, row in enumerate(inputs)]
    assert any(carried) and (lengths_B > 0).tolist() == carried


@pytest.mark.parametrize(("processes", "B", "G"), [(1, 6, 2), (2, 3, 2), (3, 4, 3), (2, 2, 4)])
def test_rewards_of_references_come_in_the_order_of_groups(processes: int, B: int, G: int):
    """Of groups that begin in any process, as many or as few of which have a reference."""
    N, most = processes * B // G, most_carriers(B, G)
    for seed in range(20):
        present_N = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.5
        present_PC = torch.zeros(processes, most, dtype=torch.bool)
        scored = [[] for _ in range(processes)]
        n = 0
        for process in range(processes):
            for place, _ in enumerate(carriers(process, B, G)):
                present_PC[process, place] = present_N[n]
                scored[process] += [float(n)] if present_N[n] else []
                n += 1
        longest = max(map(len, scored))
        rewards_PR = torch.tensor([(each + [-1.0] * most)[:longest] for each in scored])
        rewards_N = in_order(present_PC, rewards_PR, B, G)
        expected_N = torch.arange(N).where(present_N, torch.nan)
        assert n == N
        torch.testing.assert_close(rewards_N, expected_N, equal_nan=True)


def test_text_is_taken_as_it_is(tiny_model: Path, tmp_path: Path):
    """As prompts, as references in another column, and in what rewards are called with."""
    seen = []

    def count(prompts: list, completions: list, completion_ids: list, **_: Any) -> list[float]:
        seen.append((completions, completion_ids))
        return [float(len(completion)) for completion in completions]

    rows = [{"prompt": "abc", "completion": "a completion longer than six"}] * 4
    args = config(tmp_path, steps_per_generation=2)
    trainer = run(tiny_model, args, Dataset.from_list(rows), reward_funcs=count)
    _, batch = trainer.rollouts[0]
    ids = [*trainer._tokenizer(rows[0]["completion"])["input_ids"], 1]
    assert seen[1] == ([rows[0]["completion"]] * 3, [ids] * 3)
    assert batch["lengths_B2"][:, 1].tolist() == [len(ids), 0] * 3
    assert batch["reference_ids"][::2].tolist() == [ids] * 3


def test_an_adapter_learns_and_is_held_to_the_model_below(tiny_model: Path, tmp_path: Path):
    from peft import LoraConfig

    options = {"beta": 0.1, "lr_scheduler_type": "constant"}
    trainer = run(
        tiny_model,
        config(tmp_path, max_steps=2, learning_rate=0.1, **options),
        prompts(["live"] * 12),
        lr=None,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    assert trainer.gradients[1] and all(gradient.any() for gradient in trainer.gradients[1])
    first, second = logged(trainer, "kl")
    assert first == 0.0 < second


def test_evaluation_reports_the_objective(tiny_model: Path, tmp_path: Path):
    args = config(tmp_path, num_generations_eval=1, per_device_eval_batch_size=2)
    trainer = run(tiny_model, args, prompts(KINDS), eval_dataset=prompts(["live"] * 4))
    trainer.rollouts.clear()
    metrics = trainer.evaluate()
    double = double_of(tiny_model)
    results = [truth(double, *batch) for batch in kept(trainer, G=1)]
    losses = [float(each.loss.detach()) for each in results]
    assert len(losses) == 2
    said = [completion[0]["content"] for completion in trainer._logs["completion"]]
    assert list(trainer._logs["extra"]["said"])[-4:] == said[-4:]
    advantages = torch.cat([each.advantages_NK[:, 0] for each in results]).tolist()
    assert list(trainer._logs["advantages"])[-4:] == pytest.approx(advantages)
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_positions_count_from_each_prompts_first_token(tiny_model: Path, tmp_path: Path):
    """A model whose positions are absolute would notice the padding before a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, **ids, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    trainer = run(tmp_path / "gpt2", config(tmp_path), prompts(["live"] * 6))
    _, batch = trainer.rollouts[0]
    assert not batch["prompt_mask"].all()
    double = double_of(tmp_path / "gpt2")
    truth(double, *kept(trainer)[0]).loss.backward()
    assert_same(trainer.gradients[0], double)


def test_training_raises_the_reward(tiny_model: Path, tmp_path: Path):
    def share_of_a(completions: list, **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [text.count("a") / 6 for text in texts]

    rows = prompts(["live"] * 6).remove_columns("reference").add_column("chosen", ["aaaaaa"] * 6)
    args = config(tmp_path, max_steps=25, lr_scheduler_type="constant")
    trainer = run(tiny_model, args, rows, lr=0.03, reward_funcs=share_of_a)
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.1 and sum(rewards[-5:]) / 5 > 0.6


REFUSED = {
    "scale_rewards": "batch",
    "multi_objective_aggregation": "normalize_then_sum",
    "importance_sampling_level": "sequence",
    "top_entropy_quantile": 0.5,
    "entropy_coef": 0.1,
    "use_adaptive_entropy": True,
    "delta": 1.5,
    "off_policy_mask_threshold": 0.5,
    "cast_lm_head_to_fp32": True,
    "torch_compile": True,
    "remove_unused_columns": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_without_a_place_are_refused_by_name(tiny_model: Path, tmp_path: Path, name: str):
    args = config(tmp_path)
    setattr(args, name, REFUSED[name])
    with pytest.raises(ValueError, match=rf"no {name}=.*set {name}="):
        run(tiny_model, args, prompts(KINDS))


def test_models_that_are_not_understood_are_refused(tiny_model: Path, tmp_path: Path):
    args, rows = config(tmp_path), prompts(KINDS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    llama = AutoModelForCausalLM.from_pretrained(tiny_model)
    llama.config.logit_scale = 2.0  # which no Llama reads
    with pytest.raises(ValueError, match="LlamaForCausalLM: logits from its hidden states differ"):
        GRAOTrainer(llama, reward, args, rows, processing_class=tokenizer)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **small))
    with pytest.raises(ValueError, match="set router_aux_loss_coef=0"):
        GRAOTrainer(experts, reward, args, rows, processing_class=tokenizer)


def test_what_else_does_not_fit_is_refused(tiny_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="statistics must be one of group, samples; got 'batch'"):
        run(tiny_model, config(tmp_path), prompts(KINDS), statistics="batch")
    with pytest.raises(ValueError, match="grao_beta must be a number"):
        run(tiny_model, config(tmp_path), prompts(KINDS), grao_beta="0.5")


def test_data_that_do_not_fit_are_refused_before_a_model_is_loaded(tmp_path: Path):
    def refused(rows: Dataset | IterableDataset) -> str:
        with pytest.raises(ValueError) as error:
            GRAOTrainer("no such model", reward, config(tmp_path), rows)
        return str(error.value)

    without = prompts(KINDS).remove_columns("reference")
    for rows in (without, without.to_iterable_dataset(), nameless(without)):
        assert refused(rows) == (
            "train_dataset has no reference answers: its columns are prompt, kind; add reference, "
            "completion or chosen"
        )
    chosen = prompts(KINDS).rename_column("reference", "chosen").remove_columns("prompt")
    for rows in (chosen, nameless(chosen)):
        message = refused(rows)
        assert "train_dataset has no column `prompt`: its columns are chosen, kind" in message
        assert "map trl.extract_prompt over it" in message
    assert refused(prompts(KINDS).select([])) == "train_dataset has no rows"
    blank = Dataset.from_list([{"prompt": "a", "reference": each} for each in (" ", None)])
    assert refused(blank) == "every row of train_dataset has a blank reference in `reference`"
    wrong = Dataset.from_list([{"prompt": "a", "reference": "b"}, {"prompt": " ", "reference": ""}])
    assert refused(wrong) == "train_dataset, row 1, `prompt` is empty"
    hostile = Dataset.from_list([{"prompt": "a", "\x1b[2J": "b"}])
    assert "its columns are prompt, \\x1b[2J;" in refused(hostile)


def nameless(rows: Dataset) -> IterableDataset:
    """A stream whose columns are known by its rows alone."""
    return IterableDataset.from_generator(lambda: iter(rows))


def test_rows_without_a_reference_are_counted(tiny_model, tmp_path, caplog):
    rows = prompts(["live"] * 6).to_list()
    rows[2]["reference"] = None
    run(tiny_model, config(tmp_path), Dataset.from_list(rows))
    assert "1 of 6 rows of train_dataset have a blank reference in `reference`" in caplog.text


def test_evaluation_may_do_without_references(tiny_model, tmp_path, caplog):
    data = prompts(["live"] * 4).remove_columns("reference")
    args = config(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    trainer = run(tiny_model, args, prompts(KINDS), eval_dataset={"held": data})
    assert "eval_dataset['held'] has no reference answers: it evaluates samples" in caplog.text
    metrics = trainer.evaluate(data)
    assert metrics["eval_reward"] > 0 and "eval_reference/reward" not in metrics


def test_rewards_that_are_never_numbers_end_the_run(tiny_model: Path, tmp_path: Path):
    def lost(completions: list, **_: Any) -> list[float]:
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="lost gave None or NaN for every sample and every refer"):
        run(tiny_model, config(tmp_path), prompts(KINDS), reward_funcs=lost)


def test_tokens_beyond_the_embedding_are_refused_by_name(tiny_model: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer.add_tokens(["<new>"])
    rows = prompts(["live"] * 6).to_list()
    for row in rows:
        row["reference"][0]["content"] = "a <new> one"
    args, data = config(tmp_path), Dataset.from_list(rows)
    trainer = GRAOTrainer(model, reward, args, data, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"'<new>', is beyond the model's embedding of 77 rows"):
        trainer.train()
    tokenizer.pad_token = "<new>"
    with pytest.raises(ValueError, match=r"padding token '<new>' is beyond .* set tokenizer.pad"):
        GRAOTrainer(model, reward, args, data, processing_class=tokenizer)


def test_a_kl_needs_a_model_that_can_be_loaded_again(tiny_model: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config._name_or_path = ""
    args = config(tmp_path, beta=0.1)
    with pytest.raises(ValueError, match=r"beta=0.1 holds.*pass its folder, or set beta=0.0"):
        GRAOTrainer(model, reward, args, prompts(KINDS))


def test_two_processes_share_groups(tiny_model: Path, tmp_path: Path):
    """3 rows each in groups of 2: one group begins in the first process and ends in the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, str(WORKER), str(tiny_model), str(tmp_path)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    for worker in workers:
        _, said = worker.communicate(timeout=120)
        assert worker.returncode == 0, said.decode()[-2000:]
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    tokenizer, double = AutoTokenizer.from_pretrained(tiny_model), double_of(tiny_model)
    loss = 0.0
    for (rows_0, pairs_0), (rows_1, pairs_1) in zip(
        first["rollouts"], second["rollouts"], strict=True
    ):
        batch = with_rewards(tokenizer, rows_0 + rows_1, pairs_0 + pairs_1, G=2)
        loss = loss + truth(double, *batch).loss / len(first["rollouts"])
    loss.backward()
    of_two = first["loss"], loss.detach(), first["gradients"], gradients_of(double)
    assert_as_published("the same in two processes, DDP", *of_two)
    assert_same(first["gradients"], double)
    for mine, other in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(mine, other)
    # One process had nothing to learn from in one of the micro-batches, and kept step.
    assert not all(first["learnt"] + second["learnt"])
    assert first["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    message = "a row, `reference` must end in an assistant turn, got role 'user'"
    assert second["failure"] == ("UserError", f"rank 1 of 2: {message}")
    kind, said = first["failure"]  # and did not wait
    assert kind == "PeerFailed" and said.endswith(message)
    assert any(bool(whole.any()) for _, whole in first["sharded"])
    sharded = worst_error(*zip(*first["sharded"], strict=True))
    print(f"\nGRAOTrainer, FSDP2 beside the whole model: gradient {sharded:.1e}")
    for sharded, whole in first["sharded"] + second["sharded"]:
        torch.testing.assert_close(sharded, whole)
