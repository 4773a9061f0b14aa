"""DPO and PPO of the study: pairs, tokens, and losses against their formulas."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from study.arms import Budget, Meter, Problem
from study.dpo import DPO, Pair, _used, check_tokens, make_trainer, pairs_of
from study.ppo import PPO, Learner
from study.samples import Samples, Sampling, config_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from grao_fast.demo.base_model import imitate, make_model, make_tokenizer
from grao_fast.demo.task import in_place, make_rows
from grao_fast.kernels import reference_objectives
from grao_fast.sampling import Completion

STEPS, N, G = 2, 4, 3


def problem(seed: int = 0) -> Problem:
    rows = make_rows(STEPS * N + 4, seed=seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    imitate(model, tokenizer, rows, steps=range(8), seed=seed)
    budget = Budget(steps=STEPS, prompts_per_step=N, num_generations=G, eval_steps=STEPS)
    return Problem(model, tokenizer, rows[: STEPS * N], rows[STEPS * N :], in_place, budget, seed)


def samples_of(rewards: list[list[float]]) -> Samples:
    """Groups of two samples; answer k of prompt n is "nk", the reference's k is "y"."""
    texts = [[f"{n}{k}" for k in range(2)] for n in range(len(rewards))]
    names = [str(n) for n in range(len(rewards))]
    completions = [[Completion([n, k], [0, 0], True) for k in range(2)] for n in range(len(names))]
    references = [f"{n}y" for n in names]
    ids = [[n] for n in range(len(rewards))]
    return Samples(names, references, ids, completions, texts, torch.tensor(rewards).double())


def test_pairs_are_the_best_and_the_worst_answer() -> None:
    nan = math.nan
    samples = samples_of(
        [
            [0.1, 0.5, 0.3],
            [0.2, 0.2, 0.2],
            [0.4, 0.1, 0.9],
            [nan, 0.6, 0.5],
            [0.7, 0.7, 0.0],
            [nan, nan, nan],
        ]
    )
    assert pairs_of(samples, first=10) == [
        Pair("0", "01", "00", [0, 1], [0, 0], 10),
        Pair("2", "2y", "21", None, [2, 1], 12),
        Pair("3", "31", "3y", [3, 1], None, 13),
        Pair("4", "40", "4y", [4, 0], None, 14),
    ]


def test_tokens_count_up_to_the_last_pair_of_a_step() -> None:
    pairs = [Pair("", "", "", None, None, group) for group in (0, 2, 3)]
    tokens = [1, 10, 100, 1000, 10000]
    assert _used(pairs, tokens, steps=3, batch=1) == [1, 111, 11111]
    assert _used(pairs, tokens, steps=3, batch=2) == [111, 1111, 11111]  # the first come again


def logprob_sums(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """log pi(answer | prompt) from whole logits, in float64."""
    logits = model.double()(input_ids=torch.tensor([prompt + answer])).logits[0]
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum()


def test_dpo_trains_on_what_was_sampled(tmp_path: Path) -> None:
    """TRL's tokens and loss are those of the samples and the formula."""
    pytest.importorskip("trl")
    of = problem()
    config = config_of(of, learning_rate=1e-3)
    pairs = pairs_of(Sampling(of, config).step(0))
    trainer = make_trainer(of, pairs, config, 0.3, str(tmp_path))
    torch.manual_seed(0)
    with torch.no_grad():  # else policy and base agree, and the loss is log 2 whatever beta is
        for parameter in trainer.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    policy, base = copy.deepcopy(of.model), copy.deepcopy(of.model)
    policy.load_state_dict(trainer.model.state_dict())
    losses = []
    for row in trainer.train_dataset:
        best, worst = (
            logprob_sums(policy, row["prompt_ids"], row[name])
            - logprob_sums(base, row["prompt_ids"], row[name])
            for name in ("chosen_ids", "rejected_ids")
        )
        losses.append(-logsigmoid(0.3 * (best - worst)))
    truth = torch.stack(losses).mean()
    assert abs(truth - math.log(2)) > 0.01
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)

    changed = [pairs[0]._replace(best_ids=[5, 5]), *pairs[1:]]
    with pytest.raises(ValueError, match="TRL's tokens"):
        check_tokens(trainer.train_dataset, changed, of)


def test_without_a_pair_dpo_says_so(tmp_path: Path) -> None:
    of = problem()
    with pytest.raises(ValueError, match="no pair"):
        make_trainer(of, [], config_of(of, learning_rate=1e-3), 0.1, str(tmp_path))


@pytest.mark.parametrize("arm", [DPO(), PPO(epochs=2, mini_batches=2, kl_coef=0.1)], ids=str)
def test_runs_learn_and_repeat(arm: DPO | PPO) -> None:
    if isinstance(arm, DPO):
        pytest.importorskip("trl")
    first, second = problem(), problem()
    before = copy.deepcopy(first.model.state_dict())
    curves = []
    for of in (first, second):
        meter = Meter(of)
        arm(of, learning_rate=1e-3, meter=meter)
        curves.append([point._replace(seconds=0.0) for point in meter.curve])
    after = first.model.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(value, second.model.state_dict()[name]) for name, value in after.items())
    assert curves[0] == curves[1] and [point.step for point in curves[0]] == [0, STEPS]
    assert isinstance(arm, PPO) or curves[0][-1].sampled == sum(
        Sampling(problem(), config_of(first, learning_rate=1e-3)).step(step).tokens
        for step in range(STEPS)
    )


def test_ppo_losses_are_their_formulas() -> None:
    of = problem()
    config, options = config_of(of, learning_rate=1e-2), PPO(epochs=3, value_clip=0.01, kl_coef=0.2)
    samples = Sampling(of, config).step(0)
    loaded = Sampling(of, config).loaded
    learner = Learner(loaded.policy, options, config)
    first = learner.parts(samples)[0]
    rewards = samples.rewards_NK[:, :-1].flatten()
    end_T = torch.cat([first.batch.sequence_T.diff() != 0, torch.tensor([True])])
    rewards_T = torch.where(end_T, rewards[first.batch.sequence_T], 0.0)
    # The critic's values are 0 and the policy is the initial one: returns are rewards to go.
    assert not first.values_T.any()
    truth_T = reference_objectives.ppo.gae(
        rewards_T, torch.zeros_like(rewards_T), first.batch.sequence_T, gamma=1.0, lam=0.95
    )
    torch.testing.assert_close(first.returns_T.double(), truth_T, rtol=1e-5, atol=1e-5)
    whitened_T = (truth_T - truth_T.mean()) / truth_T.std(correction=0)
    torch.testing.assert_close(first.advantages_T.double(), whitened_T, rtol=1e-4, atol=1e-4)

    learner.step(samples)  # policy and critic move; ratios are no longer 1, some are clipped
    sequences = [c.token_ids for group in samples.completions for c in group]
    logprob_T, value_T = [], []
    for place, answer in enumerate(sequences):
        ids = samples.prompt_ids[place // G] + answer
        rows = slice(len(ids) - len(answer) - 1, -1)
        logits = of.model(input_ids=torch.tensor([ids])).logits[0, rows]
        logprob_T.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
        hidden = learner.critic.body.base_model(input_ids=torch.tensor([ids])).last_hidden_state
        value_T.append(learner.critic.head(hidden[0, rows])[:, 0])
    old_T = torch.tensor([p for group in samples.completions for c in group for p in c.logprobs])
    truth = reference_objectives.ppo.ppo_loss(
        torch.cat(logprob_T), old_T, first.advantages_T, first.batch.sequence_T, low=0.2, high=0.2
    )
    with learner.actor.updating():
        torch.testing.assert_close(learner.actor_loss(first), truth, rtol=1e-4, atol=1e-5)
    values_T = torch.cat(value_T)
    error_T = (values_T - first.returns_T).square()
    held_T = (values_T.clamp(-0.01, 0.01) - first.returns_T).square()
    truth = 0.5 * torch.maximum(error_T, held_T).mean()
    torch.testing.assert_close(learner.critic_loss(first), truth, rtol=1e-4, atol=1e-6)
    # Another rollout pays kl_coef (log pi_old - log pi_0) for every token.
    later = Sampling(of, config).step(1)
    with_penalty = learner.parts(later)[0].returns_T
    learner.initial = None
    assert not torch.allclose(with_penalty, learner.parts(later)[0].returns_T)
