"""`train` from end to end on a tiny model: it learns, it is the formula, it resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.config import GRAOConfig
from grao_fast.data.examples import load_examples
from grao_fast.kernels import reference
from grao_fast.rewards import resolve_reward
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.training.coefficients import to_groups
from grao_fast.training.rollout import Rollout, sample_and_score
from grao_fast.training.step import micro_batch_loss

CONFIG = GRAOConfig(
    num_generations=4,
    max_new_tokens=8,
    prompts_per_step=4,
    max_tokens_per_microbatch=120,
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    max_steps=6,
    save_steps=2,
    temperature=1.0,
    disable_tqdm=True,
    device="cpu",
)
ROWS = [
    {"prompt": prompt, "reference": prompt[::-1], "target": "abc"[i % 3]}
    for i, prompt in enumerate(["one", "two and", "three", "4", "five of them", "six", "seven!"])
]


def letters(prompts, completions, target, **columns):
    """The share of the completion that is the target letter."""
    pairs = zip(completions, target, strict=True)
    return [text.count(letter) / max(1, len(text)) for text, letter in pairs]


def run(tiny_model, output: Path, **options):
    options = {"dataset": ROWS, "reward": letters, "config": CONFIG} | options
    return grao_fast.train(tiny_model, output_dir=output, **options)


def rarely_equal(prompts, completions):
    """A reward for steps that are to have live groups, whatever is sampled."""
    return [float(sum(map(ord, text)) % 101) for text in completions]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def lines(output: Path) -> list[dict]:
    """metrics.jsonl without the clock."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_it_learns(tiny_model, tmp_path: Path):
    def vowels(prompts, completions):
        return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]

    config = CONFIG.replace(max_steps=24, save_steps=0, num_generations=8, learning_rate=1e-2)
    result = run(tiny_model, tmp_path, reward=vowels, config=config, eval_dataset=ROWS)
    rewards = [row["reward"] for row in lines(tmp_path) if "reward" in row]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert result.after.ras > result.before.ras
    assert result.after.nag > 0.5
    assert len((tmp_path / "eval-24.jsonl").read_text().splitlines()) == len(ROWS)
    assert not same_bits(tmp_path / "final", tiny_model)


def step_groups(tiny_model, config: GRAOConfig):
    loaded = load_policy(tiny_model, config=config)
    rollout = sampled(loaded, letters, config)
    return loaded, rollout, to_groups(rollout, config.objective_options)


def sampled(loaded: LoadedPolicy, reward, config: GRAOConfig) -> Rollout:
    """A rollout of all rows."""
    return sample_and_score(
        loaded,
        resolve_reward(reward),
        loaded.encode(load_examples(ROWS), config.sampling),
        sampling=config.sampling,
        objective=config.objective_options,
        seed=5,
    )


def naive_loss(model, rollout, config: GRAOConfig) -> torch.Tensor:
    """The paper's formula: every sequence by itself, full logits, float64."""
    N, K = rollout.rewards_NK.shape
    means = []
    for prompt, completions in zip(rollout.prompts, rollout.completions, strict=True):
        for ids in [*(c.token_ids for c in completions), prompt.reference_ids]:
            tokens = torch.tensor([prompt.prompt_ids + ids])
            logits = model(tokens).logits[0, len(prompt.prompt_ids) - 1 : -1] / config.temperature
            logprobs = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            means.append(logprobs.mean())
    L = torch.stack(means).view(N, K)
    A = reference.group_advantages(rollout.rewards_NK)
    G = K - 1
    exploration = (A[:, :G] * L[:, :G]).sum(1) / G
    imitation = config.beta * A[:, G] * L[:, G]
    alignment = config.lam / G * (A[:, :G] * (L[:, :G] - L[:, G:])).sum(1)
    return -(exploration + imitation + alignment).mean()


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_a_step_is_the_formula(tiny_model, share_prefix: bool, budget: int):
    """Loss and every gradient, however the step is split, against float64 of the stock model."""
    from grao_fast.data.packing import split_by_tokens

    config = CONFIG.replace(
        share_prefix=share_prefix, temperature=0.8, reference_advantage="signed"
    )
    loaded, rollout, groups = step_groups(tiny_model, config)
    policy, total = loaded.policy, 0.0
    with policy.updating():
        for part in split_by_tokens(groups, budget, share_prefix=share_prefix):
            loss = micro_batch_loss(
                policy, policy.lay_out(part), config.objective_options, num_prompts=len(groups)
            )
            loss.loss.backward()
            total += float(loss.loss.detach())
    double = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    expected = naive_loss(double, rollout, config)
    expected.backward()
    assert abs(total - float(expected.detach())) < 1e-5
    for (name, ours), theirs in zip(
        policy.model.named_parameters(), double.parameters(), strict=True
    ):
        error = float((ours.grad - theirs.grad).abs().max())
        assert error <= 1e-5 * max(1e-2, float(theirs.grad.abs().max())), name


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
        return step == self.step


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    run(tiny_model, output, eval_dataset=ROWS[:3])
    return output


@pytest.mark.parametrize("step", [1, 3, 4])
def test_resume_is_bit_identical(tiny_model, tmp_path: Path, uninterrupted: Path, step: int):
    run(tiny_model, tmp_path, eval_dataset=ROWS[:3], callbacks=[StopAt(step)])
    result = run(tiny_model, tmp_path, eval_dataset=ROWS[:3], resume_from_checkpoint=True)
    assert result.steps == 6
    assert same_bits(tmp_path / "final", uninterrupted / "final")
    trained = [row for row in lines(tmp_path) if "loss" in row]
    assert trained == [row for row in lines(uninterrupted) if "loss" in row]
    assert result.after.nag is not None


def test_held_out_samples_repeat_and_leave_the_run_alone(
    tiny_model, tmp_path: Path, uninterrupted: Path
):
    options = {
        "eval_dataset": ROWS[:3],
        "metric": letters,
        "config": CONFIG.replace(num_generations_eval=3, eval_steps=3),
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run(tiny_model, whole, **options)
    assert same_bits(whole / "final", uninterrupted / "final")
    run(tiny_model, stopped, **options, callbacks=[StopAt(4)])
    resumed = run(tiny_model, stopped, **options, resume_from_checkpoint=True)
    assert (resumed.before, resumed.after) == (result.before, result.after)
    assert set(resumed.before.pass_at_k) == {1, 2, 3}
    for step in (3, 6):
        rows = [(folder / f"eval-{step}.jsonl").read_text() for folder in (whole, stopped)]
        assert rows[0] == rows[1] and '"samples"' in rows[0]
    assert "eval/pass_at_3" in lines(whole)[-1]


def test_a_module_can_be_resumed_as_a_module(tiny_model, tmp_path: Path, uninterrupted: Path):
    from transformers import AutoTokenizer

    def module():
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(tiny_model)}

    options = {"dataset": ROWS, "reward": letters, "config": CONFIG, "output_dir": tmp_path}
    grao_fast.train(**module(), **options, callbacks=[StopAt(2)])
    grao_fast.train(**module(), **options, resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert same_bits(tmp_path / "final", uninterrupted / "final")


def test_another_dataset_cannot_be_resumed(tiny_model, uninterrupted: Path):
    with pytest.raises(ValueError, match="another dataset"):
        run(tiny_model, uninterrupted, dataset=ROWS[:5], resume_from_checkpoint=True)


def test_an_adapter_trains_and_resumes(tiny_model, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    torch.manual_seed(1)  # the seed of the config decides, not what was drawn before
    run(tiny_model, tmp_path / "whole", **options)
    run(tiny_model, tmp_path / "parts", **options, callbacks=[StopAt(3)])
    run(tiny_model, tmp_path / "parts", **options, resume_from_checkpoint=True)
    adapters = [
        peft.load_peft_weights(str(tmp_path / name / "final")) for name in ("whole", "parts")
    ]
    assert any(
        float(value.abs().max()) > 0 for key, value in adapters[0].items() if "lora_B" in key
    )
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def test_equal_rewards_cost_nothing_and_are_said(tiny_model, tmp_path: Path, caplog):
    def constant(prompts, completions):
        return [0.1] * len(completions)

    config = CONFIG.replace(max_steps=2, save_steps=0)
    with caplog.at_level("INFO"):
        run(tiny_model, tmp_path, reward=constant, config=config)
    rows = lines(tmp_path)
    assert [row["loss"] for row in rows] == [0.0, 0.0]
    assert [row["tokens"] for row in rows] == [0, 0]
    assert [row["frac_reward_zero_std"] for row in rows] == [1.0, 1.0]
    assert "the loss is 0" in caplog.text
    assert same_bits(tmp_path / "final", tiny_model)


def test_absent_rewards_and_references_are_left_out(tiny_model, tmp_path: Path):
    def sometimes(prompts, completions):
        return [None if i % 3 == 0 else float(len(text)) for i, text in enumerate(completions)]

    rows = [{**row, "reference": None if i % 2 else row["reference"]} for i, row in enumerate(ROWS)]
    config = CONFIG.replace(max_steps=2, save_steps=0)
    result = run(tiny_model, tmp_path, dataset=rows, reward=sometimes, config=config)
    assert torch.isfinite(torch.tensor([result.metrics["loss"], result.metrics["grad_norm"]])).all()
    assert result.metrics["grad_norm"] > 0


def test_a_pairwise_reward_gives_the_reference_zero(tiny_model, tmp_path: Path):
    def longer(prompts, completions, references):
        return [
            float((len(a) > len(b)) - (len(a) < len(b)))
            for a, b in zip(completions, references, strict=True)
        ]

    config = CONFIG.replace(max_steps=2, save_steps=0, reward_type="pairwise")
    run(tiny_model, tmp_path, reward=longer, config=config)
    assert [row["reference/reward"] for row in lines(tmp_path)] == [0.0, 0.0]


def test_a_module_in_bfloat16_is_refused(tiny_model, tmp_path: Path):
    """At the paper's learning rate its parameters would hardly move."""
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"bfloat16.*dtype=torch\.float32"):
        run(model, tmp_path, tokenizer=tokenizer)


def test_a_new_run_does_not_mix_with_an_old_one(tiny_model, uninterrupted: Path):
    with pytest.raises(ValueError, match="already holds checkpoint-6"):
        run(tiny_model, uninterrupted)
    with pytest.raises(ValueError, match="already holds checkpoint-6"):
        run(tiny_model, uninterrupted, resume_from_checkpoint=uninterrupted / "checkpoint-4")


def test_a_resumed_run_takes_the_new_learning_rate(tiny_model, tmp_path: Path, caplog):
    run(tiny_model, tmp_path, callbacks=[StopAt(2)])
    config = CONFIG.replace(learning_rate=1e-5, lr_scheduler_type="constant")
    run(tiny_model, tmp_path, config=config, resume_from_checkpoint=True)
    rates = [row["learning_rate"] for row in lines(tmp_path)]
    assert rates[:2] == pytest.approx([3e-3, 3e-3 * 5 / 6])
    assert rates[2:] == [1e-5] * 4
    assert "other options than the checkpoint's: learning_rate, lr_scheduler_type" in caplog.text


def test_another_eval_dataset_gives_no_nag(tiny_model, tmp_path: Path, caplog):
    run(tiny_model, tmp_path, eval_dataset=ROWS[:3], callbacks=[StopAt(2)])
    result = run(tiny_model, tmp_path, eval_dataset=ROWS[3:6], resume_from_checkpoint=True)
    assert result.before is None
    assert result.after.nag is None
    assert "eval_dataset is not the one" in caplog.text


def test_a_finished_run_can_be_resumed(tiny_model, tmp_path: Path):
    first = run(tiny_model, tmp_path, eval_dataset=ROWS[:3])
    written = (tmp_path / "metrics.jsonl").read_text()
    again = run(tiny_model, tmp_path, eval_dataset=ROWS[:3], resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text() == written
    assert again.steps == 6
    assert again.metrics["loss"] == first.metrics["loss"]
    assert again.after.metrics() == first.after.metrics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": letters}, "metric is measured on eval_dataset"),
        ({"config": CONFIG.replace(eval_steps=2)}, "eval_steps=2 needs an eval_dataset"),
        ({"config": CONFIG.replace(report_to=["wandbb"])}, "report_to does not know 'wandbb'"),
    ],
)
def test_what_would_have_no_effect_is_refused(tiny_model, tmp_path: Path, options, message: str):
    with pytest.raises(ValueError, match=message):
        run(tiny_model, tmp_path, **options)
