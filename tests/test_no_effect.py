"""Nothing is accepted and ignored: options, rewards and samplers that would have no effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, ROWS, letters, lines, run

from grao_fast.callbacks import Callback
from grao_fast.config import GRAOConfig
from grao_fast.data.encoding import Encoded
from grao_fast.data.examples import Example, load_examples
from grao_fast.objectives import OBJECTIVES, make_objective
from grao_fast.sampling import Completion
from grao_fast.sampling.loading import load_policy
from grao_fast.system.errors import UserError
from grao_fast.training.metrics import group_metrics
from grao_fast.training.rollout import advantages_of

SFT = CONFIG.replace(objective="sft", num_generations=GRAOConfig.num_generations, max_steps=3)
NEVER_DEAD = ("awr", "chord", "dft", "rft", "sft", "srft", "uft")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_groups_of_equal_rewards_are_dead(name: str) -> None:
    formula = make_objective(name)
    assert formula.has_dead_groups == (name not in NEVER_DEAD)
    K = 4 if formula.needs_samples else 1
    steps = [torch.full((2, K), reward, dtype=torch.float64) for reward in (0.0, 1.0)]
    dead = [not formula.advantages(step).nan_to_num(0.0).any() for step in steps]
    assert any(dead) == formula.has_dead_groups
    assert dead[0] == dead[1] or (name, dead) == (
        "hpt",
        [False, True],
    )  # it imitates where all fail


def test_rft_leaves_groups_below_its_threshold() -> None:
    kept = make_objective("rft(threshold=0.5)")
    equal_NK = torch.tensor([[0.0], [1.0]]).expand(2, 4)
    assert kept.has_dead_groups and kept.advantages(equal_NK).any(1).tolist() == [False, True]


@pytest.mark.parametrize("option", [{"dynamic_sampling": 2}, {"curriculum": True}])
def test_dead_groups_are_not_looked_for_where_there_are_none(option: dict[str, Any]) -> None:
    (name,) = option
    for objective in ("awr", "srft", "chord", "uft", "rft(best=2)"):
        with pytest.raises(
            UserError, match=f"{name}=.* learns from all groups of equal rewards too"
        ):
            GRAOConfig(objective=objective, **option)
    for objective in ("grpo", "hpt", "rft(threshold=0.5)"):
        GRAOConfig(objective=objective, **option)


def test_bounds_need_a_second_update() -> None:
    """Unless they are those that the objective has anyway, as where a file writes defaults out."""
    for named, options in {
        "low=0.1 has": {"objective": "gspo(low=0.1)"},
        "high=0.5 has": {"objective": "gspo(low=3e-4, high=0.5)"},
        "epsilon=0.3 has": {"epsilon": 0.3},
        "epsilon=0.2 has": {"objective": "dapo", "epsilon": 0.2},  # whose upper bound is 0.28
        "epsilon=0.2 and epsilon_high=0.3 have": {"epsilon": 0.2, "epsilon_high": 0.3},
    }.items():
        with pytest.raises(UserError, match=f"^{named} no effect with num_iterations=1, where"):
            GRAOConfig(**options)
        GRAOConfig(**options, num_iterations=2)
    GRAOConfig(epsilon=0.2)
    GRAOConfig(epsilon=0.2, epsilon_high=0.2)
    GRAOConfig(objective="dapo", epsilon=0.2, epsilon_high=0.28)
    GRAOConfig(objective="gspo(low=3e-4, high=4e-4)")


def test_a_reward_and_its_options_need_something_to_score(tiny_model: Path, tmp_path: Path) -> None:
    def refused(match: str, reward: Any = None, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            run(tiny_model, tmp_path, config=SFT.replace(**options), reward=reward)

    refused("the reward has no effect with objective='sft'", letters)
    refused("the reward has no effect with objective='dft'", letters, objective="dft")
    refused(r"reward_weights=\(2.0,\) has no effect without a reward", reward_weights=(2.0,))
    refused("reward_timeout=5.0 has no effect without a reward", reward_timeout=5.0)
    refused("reward_type='pairwise' has no effect without a reward", reward_type="pairwise")
    refused("use_vllm=True has no effect where nothing is sampled", use_vllm=True)
    refused("generation_batch_size=3 has no effect where", generation_batch_size=3)
    with pytest.raises(UserError, match="the sampler has no effect where nothing is sampled"):
        run(tiny_model, tmp_path, config=SFT, reward=None, sampler=Counted())


def test_an_absent_reference_has_no_advantage() -> None:
    """SRFT imitates references that have no reward; those that are absent count in no metric."""
    objective = GRAOConfig(objective="srft").objective_options
    prompts = [Encoded(Example("a", None, {}), [3], ids, None) for ids in ([], [4], [4])]
    rewards_NK = torch.tensor([[1.0, 0.0, math.nan]] * 2 + [[1.0, 0.0, 1.0]]).double()
    advantages_NK = advantages_of(prompts, rewards_NK, objective)
    ahead = 1 / math.sqrt(2)  # of rewards 1, 0, 1
    expected = torch.tensor([math.nan, 0.5, 0.5 + ahead]).double()
    torch.testing.assert_close(advantages_NK[:, -1], expected, equal_nan=True)
    metrics = group_metrics(rewards_NK, advantages_NK, advantages_NK)
    assert float(metrics["reference/advantage"]) == pytest.approx(0.5 + ahead / 2)


class Counted:
    """A sampler that answers with one token, and counts what it is given."""

    context_length = None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sync(self, policy: Any) -> None:
        self.calls.append("sync")

    def sample(self, prompts: list[list[int]], **options: Any) -> list[list[Completion]]:
        self.calls.append("sample")
        return [[Completion([1], [-1.0], True)] for _ in prompts]


def test_a_sampler_gets_weights_when_it_answers(
    tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    """Of an objective that samples nothing, before each evaluation; at first to be checked."""
    sampler, config = Counted(), SFT.replace(save_steps=0)
    run(tiny_model, tmp_path, config=config, eval_dataset=ROWS[:2], sampler=sampler)
    assert sampler.calls == ["sync", *["sync", "sample"] * 2]
    rows = [json for json in lines(tmp_path) if "loss" in json]
    assert len(rows) == 3 and all(math.isfinite(row["loss"]) for row in rows)


class Asks(Callback):
    """Answers a prompt at the start and after every step, and notes whether with the weights."""

    def __init__(self, sampler: Keeps) -> None:
        self.sampler, self.up_to_date = sampler, []

    def on_train_begin(self, policy: Any, config: GRAOConfig) -> None:
        self.policy = policy
        self.on_step_end(0, {})

    def on_step_end(self, step: int, metrics: dict[str, float]) -> None:
        self.policy.answer([[3]], max_new_tokens=2, seed=0)
        now = head_of(self.policy.policy)
        self.up_to_date.append(torch.equal(self.sampler.weight, now))


class Keeps(Counted):
    """Keeps the weights of the latest `sync`."""

    def sync(self, policy: Any) -> None:
        super().sync(policy)
        self.weight = head_of(policy)


def head_of(policy: Any) -> torch.Tensor:
    return policy.causal_lm.get_output_embeddings().weight.detach().clone()


def test_a_callback_samples_with_the_weights_of_the_moment(
    tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    """Also where training samples nothing, and after a checkpoint has been loaded."""
    asks = Asks(Keeps())
    config, options = SFT.replace(lr_scheduler_type="constant"), {"eval_dataset": ROWS[:2]}
    options |= {"sampler": asks.sampler, "callbacks": [asks]}
    run(tiny_model, tmp_path, config=config.replace(max_steps=2), **options)
    assert asks.up_to_date == [True] * 3
    asks = Asks(Keeps())
    options |= {"sampler": asks.sampler, "callbacks": [asks], "resume_from_checkpoint": True}
    run(tiny_model, tmp_path, config=config, **options)
    assert asks.up_to_date == [True] * 2
    assert asks.sampler.calls == ["sync", *["sync", "sample"] * 2, "sample"]  # the evaluation


@pytest.mark.parametrize(
    ("begins", "stored"), [("with", False), ("without", False), ("with", True)]
)
def test_a_reward_that_only_evaluates_may_come_and_go(
    begins: str, stored: bool, tiny_model: Path, tmp_path: Path, unchecked: None
) -> None:
    """A run that scores nothing in training is resumed without its evaluations, or with some."""
    columns = {"completions": ["ab", "b"], "rewards": [1.0, 0.0], "reference_reward": 0.5}
    config = SFT.replace(objective="grao", sampler="dataset") if stored else SFT
    options = {"dataset": [row | columns for row in ROWS]} if stored else {}
    scored, unscored = {"eval_dataset": ROWS[:2]}, {"reward": None}
    first, then = (scored, unscored) if begins == "with" else (unscored, scored)
    run(tiny_model, tmp_path, config=config.replace(max_steps=2), **first, **options)
    result = run(
        tiny_model, tmp_path, config=config, resume_from_checkpoint=True, **then, **options
    )
    assert result.steps == 3 and (result.after is None) == (begins == "with")


def encoded(config: GRAOConfig, folder: Path, row: dict[str, Any], **options: Any) -> Any:
    """A row for a tiny model, whose context has 512 tokens."""
    loaded = load_policy(folder, config=config)
    examples = load_examples([row], stored=config.sampler == "dataset")
    return loaded.encode(examples, config.sampling, **options)


def test_max_new_tokens_takes_no_room_where_nothing_is_sampled(
    tiny_model: Path, unchecked: None
) -> None:
    """The default is beyond the context; an answer to a held-out prompt still needs that room."""
    config = GRAOConfig(objective="sft", device="cpu")
    (row,) = encoded(config, tiny_model, {"prompt": "a" * 500, "reference": "b" * 11})
    assert (len(row.prompt_ids), len(row.reference_ids)) == (500, 12)
    for prompt, reference, message in (
        (500, 12, "do not fit .*: set max_reference_length=12 to cut"),
        (512, 1, "leaves no room for an answer .*: set max_prompt_length=511 to drop"),
    ):
        with pytest.raises(UserError, match=message):
            encoded(config, tiny_model, {"prompt": "a" * prompt, "reference": "b" * reference})
    with pytest.raises(UserError, match="max_new_tokens=2048 leaves no room for a prompt"):
        encoded(config, tiny_model, {"prompt": "a", "reference": "b"}, trained=False)


def test_stored_completions_need_the_room_that_they_take(tiny_model: Path, unchecked: None) -> None:
    config = GRAOConfig(sampler="dataset", device="cpu")
    row = {"prompt": "a" * 500, "reference": "b", "rewards": [1.0], "reference_reward": 0.0}
    (fits,) = encoded(config, tiny_model, row | {"completions": ["c" * 11]})
    assert len(fits.completions[0].token_ids) == 12
    with pytest.raises(
        UserError, match=r"stored completion of 13 .* max_prompt_length=499 to drop"
    ):
        encoded(config, tiny_model, row | {"completions": ["c" * 12]})
