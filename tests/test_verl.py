"""GRAO by verl's registries, on verl's own batches, against the specification in float64."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl")
pytest.importorskip("ray")

from omegaconf import OmegaConf
from published import assert_as_published
from tensordict import NonTensorData, TensorDict
from tiny import character_tokenizer
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from grao_fast.integrations.verl import GRAOAgentLoop, grao_advantages
from grao_fast.kernels import reference

ROOT = Path(__file__).parents[1]
N, G, P, D, V = 3, 3, 4, 8, 13
K = G + 1
LENGTHS = [3, 1, 5, 2, 4, 4, 1, 6, 2, 2, 3, 1]  # of the N * K sequences
REWARDS_NK = torch.tensor([[0.1, 0.9, 0.4, 0.7], [1.0, 1.0, 1.0, 1.0], [0.2, 0.0, 0.9, 0.3]])
SEQUENCE_T = torch.tensor([s for s, length in enumerate(LENGTHS) for _ in range(length)])
CLIP = (0.2, 0.28)


class Problem:
    """Hidden states of all tokens that count, and what the specification says of them."""

    def __init__(self, *, off_policy: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        T = len(SEQUENCE_T)
        self.hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64)
        self.head_VD = torch.randn(V, D, generator=generator, dtype=torch.float64)
        self.target_T = torch.randint(V, (T,), generator=generator)
        logprob_T = reference.token_logprobs(self.hidden_TD, self.head_VD, self.target_T)
        self.old_T = logprob_T + off_policy * torch.randn(T, generator=generator)
        self.operands = [each.requires_grad_() for each in (self.hidden_TD, self.head_VD)]

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.operands))

    def truth(self, **options: Any) -> Tensor:
        is_reference_T = SEQUENCE_T % K == K - 1
        return reference.grao_loss(
            self.hidden_TD,
            self.head_VD,
            self.target_T,
            SEQUENCE_T,
            REWARDS_NK.double(),
            old_logprob_T=self.old_T.where(~is_reference_T, torch.nan),
            clip=CLIP,
            **options,
        ).loss

    def logprob_T(self) -> Tensor:
        return reference.token_logprobs(self.hidden_TD, self.head_VD, self.target_T)


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def rows_of(values_T: Tensor, order: list[int]) -> list[Tensor]:
    """Values of each sequence's response; a reference's begins with a token of the prompt."""
    rows = []
    for s in order:
        row = values_T[s == SEQUENCE_T]
        rows.append(torch.cat([row.new_zeros(1), row]) if s % K == K - 1 else row)
    return rows


def advantages_of(order: list[int], **options: Any) -> list[Tensor]:
    """verl's advantages of each sequence, by its own batch and its own function."""
    mask = torch.nn.utils.rnn.pad_sequence(
        rows_of(torch.ones(len(SEQUENCE_T)), order), batch_first=True
    )
    rewards = torch.zeros_like(mask, dtype=torch.float64)
    lengths = [len(row) for row in rows_of(SEQUENCE_T, order)]
    for row, (s, length) in enumerate(zip(order, lengths, strict=True)):
        rewards[row, length - 1] = REWARDS_NK.flatten()[s]
    data = DataProto(TensorDict({"response_mask": mask, "token_level_rewards": rewards}, len(mask)))
    data.non_tensor_batch["uid"] = np.array([f"p{s // K}" for s in order], dtype=object)
    config = OmegaConf.create({"grao": options})
    advantages = compute_advantage(data, "grao", config=config).batch["advantages"]
    return [row[:length] for row, length in zip(advantages, lengths, strict=True)]


def verl_loss(
    problem: Problem, order: list[int], advantages: list[Tensor], size: int, *, processes: int = 1
) -> Tensor:
    """The loss of some sequences, as verl's actor computes it.

    size: the sequences of the mini-batch, of all processes.
    """
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=K,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode="seq-mean-token-mean",
        clip_ratio_low=CLIP[0],
        clip_ratio_high=CLIP[1],
    )
    object.__setattr__(config.policy_loss, "loss_mode", "grao")
    prompts, responses, logprobs = [], [], []
    new_T = problem.logprob_T()
    for row, s in enumerate(order):
        prompt = P - 1 if s % K == K - 1 else P
        of_tokens = new_T[s == SEQUENCE_T]
        prompts.append(torch.zeros(prompt, dtype=torch.int64))
        responses.append(torch.zeros(len(advantages[row]), dtype=torch.int64))
        # of each place, the log-prob of the next token; NaN where no loss may look
        edge = of_tokens.new_full((P - 1,), torch.nan)
        logprobs.append(torch.cat([edge, of_tokens, edge[:1]]))
    data = TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "response_mask": nested(rows_of(torch.ones(len(SEQUENCE_T)), order)),
            "old_log_probs": nested(rows_of(problem.old_T.detach(), order)),
            "advantages": nested(advantages),
            "dp_size": NonTensorData(processes),
            "batch_num_tokens": NonTensorData(None),
            "global_batch_size": NonTensorData(size),
        },
        batch_size=len(order),
    )
    return ppo_loss(config, {"log_probs": nested(logprobs)}, data)[0]


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.2, "lam": 1.5, "statistics": "samples", "reference_advantage": "clip"},
        {"reference_advantage": "floor"},
    ],
)
def test_verl_s_loss_is_the_specification_s(off_policy: bool, options: dict[str, Any]) -> None:
    problem = Problem(off_policy=off_policy)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(N * K, generator=generator).tolist()
    advantages = advantages_of(order, **options)
    truth = problem.truth(**options)
    expected = problem.gradients(truth)
    halves = [slice(0, 5), slice(5, N * K)]  # micro-batches that split groups
    losses = [verl_loss(problem, order[h], advantages[h], N * K) for h in halves]
    actual = [sum(g) for g in zip(*map(problem.gradients, losses), strict=True)]
    way = "verl, its own loss on our advantages, in float64"
    assert_as_published(way, sum(losses), truth, actual, expected)
    # verl divides by a sequence's tokens + 1e-8 in float32, which is the number of tokens
    torch.testing.assert_close(sum(losses), truth, rtol=1e-12, atol=1e-14)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_two_ray_actors_share_the_loss() -> None:
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
    from verl_worker import LossWorker

    folder = str(Path(__file__).parent)
    ray.init(
        num_cpus=32,  # logical; verl asks for several of a worker
        include_dashboard=False,
        runtime_env={"env_vars": {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}},
    )
    try:
        pool = RayResourcePool([2], use_gpu=False)
        workers = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(LossWorker)))
        order = list(range(N * K))
        shares = workers.gradients(order, advantages_of(order))
    finally:
        ray.shutdown()
    problem = Problem(off_policy=True)
    expected = problem.gradients(problem.truth())
    for one, other, truth in zip(*shares, expected, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close((one + other) / 2, truth, rtol=1e-6, atol=1e-8)  # as DDP's


def test_a_dead_group_and_a_group_without_reference() -> None:
    order = list(range(N * K))
    advantages = advantages_of([s for s in order if s != K - 1])
    samples = REWARDS_NK[0, :-1].double()
    weights = (samples - samples.mean()) / samples.std(unbiased=False) * 1.6 / G
    for s in range(G):
        torch.testing.assert_close(
            advantages[s], (G * weights[s]).expand(LENGTHS[s]), rtol=1e-6, atol=0
        )
    assert all(not advantages[s].any() for s in range(G, G + K))  # the second prompt's are equal


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="no option 'gamma'; it takes beta, lam"):
        advantages_of(list(range(K)), gamma=1)
    with pytest.raises(ValueError, match='"tapered" needs a loss that knows it'):
        advantages_of([0, 3], reference_advantage="tapered")
    with pytest.raises(ValueError, match="prompt p0 has 2 references"):
        advantages_of([0, K - 1, K - 1])
    with pytest.raises(ValueError, match=r"set actor_rollout_ref\.actor\.loss_agg_mode=seq-mean"):
        get_policy_loss_fn("grao")(*torch.zeros(4, 1, 1), loss_agg_mode="token-mean")


class Server:
    """Answers every request with the same tokens."""

    async def generate(self, **request: Any) -> SimpleNamespace:
        return SimpleNamespace(
            token_ids=[5, 6, 1],
            log_probs=None,
            routed_experts=None,
            num_preempted=0,
            extra_fields={"min_global_steps": 4, "max_global_steps": 4},
        )


def loop_with(**rollout: Any) -> GRAOAgentLoop:
    options = {
        "n": K,
        "prompt_length": 64,
        "response_length": 12,
        "calculate_log_probs": False,
        "val_kwargs": {"n": 1},
    } | rollout
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": options}})
    return GRAOAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=Server(),
        tokenizer=character_tokenizer(),
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(OmegaConf.create({})),
    )


def outputs_of(**columns: Any) -> list[Any]:
    async def run() -> list[Any]:
        loop = loop_with()
        columns["raw_prompt"] = [{"role": "user", "content": "3+4=?"}]
        return [
            await loop.run({}, session_id=k, uid="p", global_steps=7, **columns) for k in range(K)
        ]

    return asyncio.run(run())


@pytest.mark.parametrize("columns", [{"reference": "7"}, {"extra_info": {"reference": "7"}}])
def test_the_last_response_is_the_reference(columns: dict[str, Any]) -> None:
    *samples, answer = outputs_of(**columns)
    assert [sample.response_ids for sample in samples] == [[5, 6, 1]] * G
    assert all(sample.response_mask == [1, 1, 1] for sample in samples)
    tokenizer = character_tokenizer()
    assert answer.response_mask == [0, 1, 1]
    assert answer.response_ids[1:] == [*tokenizer("7")["input_ids"], tokenizer.eos_token_id]
    assert answer.prompt_ids + answer.response_ids[:1] == samples[0].prompt_ids
    assert answer.extra_fields["min_global_steps"] == 7
    assert answer.as_dict()["response_mask"].tolist() == [0, 1, 1]


def test_a_prompt_without_a_reference_gets_a_sample() -> None:
    assert [output.response_mask for output in outputs_of(reference=None)] == [[1, 1, 1]] * K


def test_a_long_reference_is_cut_aloud(caplog: pytest.LogCaptureFixture) -> None:
    answer = outputs_of(reference="7" * 20)[-1]
    assert len(answer.response_ids) == len(answer.response_mask) == 12
    assert "a reference of 21 tokens is cut to 11" in caplog.text


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"n": 1}, "rollout.n is 1"),
        ({"val_kwargs": {"n": K}}, "validation must have fewer"),
        ({"calculate_log_probs": True}, "calculate_log_probs=False"),
    ],
)
def test_options_that_do_not_fit_are_refused(rollout: dict[str, Any], message: str) -> None:
    async def make() -> None:
        loop_with(**rollout)

    with pytest.raises(ValueError, match=message):
        asyncio.run(make())


def test_it_needs_the_v1_trainer() -> None:
    async def run() -> None:
        await loop_with().run({}, raw_prompt=[], reference="7")

    with pytest.raises(ValueError, match=r"trainer\.use_v1=True"):
        asyncio.run(run())


def test_the_example_s_settings_are_verl_s(tmp_path: Path) -> None:
    import shlex

    import hydra
    import verl.trainer

    script = (ROOT / "examples" / "verl" / "run.sh").read_text(encoding="utf-8")
    command = script[script.index("python -m") :].replace("\\\n", " ")
    settings = [word for word in shlex.split(command) if "=" in word]
    folder = Path(verl.trainer.__path__[0]) / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose("ppo_trainer", overrides=settings)
    assert config.algorithm.adv_estimator == "grao"
    rollout = config.actor_rollout_ref.rollout
    assert rollout.agent.default_agent_loop == "grao" and rollout.n == 9
    loop_with(**{name: rollout[name] for name in ("n", "calculate_log_probs", "val_kwargs")})
    mask, rewards = torch.ones(2, 3), torch.rand(2, 3)
    mask[1, 0] = 0  # a reference
    grao_advantages(rewards, mask, ["p", "p"], config.algorithm)


def test_the_example_s_rows_and_reward() -> None:
    names = {}
    for file in ("prepare.py", "reward.py"):
        exec((ROOT / "examples" / "verl" / file).read_text(encoding="utf-8"), names)
    rows = names["rows"](6, seed=0)
    scores = [
        names["compute_score"]("sums", row["reference"], row["reward_model"]["ground_truth"])
        for row in rows
    ]
    assert scores == [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert names["compute_score"]("sums", "I do not know", "3") == 0
