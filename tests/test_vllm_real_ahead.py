"""Rollouts sampled ahead by vLLM's own server, on CPUs; see test_vllm_real.py."""

from __future__ import annotations

import copy
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from real_vllm import BIN, RealServer, save_model
from test_trainer import CONFIG, lines, run

from grao_fast.sampling import Completion
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.system.threads import in_thread

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (BIN / "vllm").exists(), reason="GRAO_VLLM names no folder with a vllm executable"
    ),
]

PROMPTS = [[5, 6, 7], [9, 10]]
CONTEXT = 2048
TOKENS = 2000  # which take seconds on a fast machine too
Scorer = Callable[[list[int], Completion], torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "untied", tied=False, context=CONTEXT)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    # A CPU's random generators cannot go back, as vLLM 0.32 has those of seeded requests do when it
    # splits a prompt over several batches, also to resume a completion. Then its engine ends.
    tokens = ("--max-num-batched-tokens", "16384", "--max-model-len", str(CONTEXT))
    server = RealServer(model, tmp_path_factory.mktemp("logs") / "log", *tokens)
    try:
        yield server.start()
    finally:
        server.stop()


def config(server: RealServer, **changes: Any):
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
    return CONFIG.replace(**options | {"save_steps": 0} | changes)


def logged(output: Path, name: str) -> list[float]:
    return [row[name] for row in lines(output) if "loss" in row]


def vowels(prompts, completions):
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


def test_one_ahead_it_learns_from_samples_of_the_weights_before(server, model, tmp_path):
    options = {"async_rollouts": 1, "max_steps": 16, "num_generations": 8, "learning_rate": 5e-3}
    run(model, tmp_path, config=config(server, **options), reward=vowels)
    rewards = logged(tmp_path, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert logged(tmp_path, "sampling/staleness") == [0] + [1] * 15
    gaps = logged(tmp_path, "sampling/logp_diff")
    assert gaps[0] < 2e-6
    assert min(gaps[1:]) > 1e-3  # they are another policy's
    assert all(0.9 < w < 1.1 for w in logged(tmp_path, "sampling/importance_sampling_ratio/mean"))


def test_two_ahead_it_learns_from_samples_of_weights_that_move(server, model, tmp_path):
    options = {"async_rollouts": 2, "max_steps": 16, "num_generations": 8, "learning_rate": 5e-3}
    run(model, tmp_path, config=config(server, **options), reward=vowels)
    rewards = logged(tmp_path, "reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert logged(tmp_path, "sampling/staleness") == [0, 1] + [2] * 14


def long_samples(loaded: LoadedPolicy, server: RealServer) -> Future[list[list[Completion]]]:
    """Samples of the policy that take seconds, once the server is at work on them."""
    sampler: Any = loaded.sampler
    sampler.eos_ids = []  # none ends early
    before = generated(server)
    samples = in_thread(
        lambda: sampler.sample(
            PROMPTS, num_generations=4, max_new_tokens=TOKENS, temperature=1.0, seeds=[1, 2]
        )
    )
    while generated(server) < before + 40 and not samples.done():
        time.sleep(0.02)
    return samples


def generated(server: RealServer) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(r"^vllm:generation_tokens_total\S* (\S+)", text, re.M)))


def scorer(loaded: LoadedPolicy) -> Scorer:
    """Log-probs of completions under the policy as it is now."""
    model: Any = copy.deepcopy(loaded.model).eval()

    def score(prompt: list[int], completion: Completion) -> torch.Tensor:
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        after = logprobs[len(prompt) - 1 : -1]
        return after.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]

    return score


def tokens_of_each(
    groups: list[list[Completion]], scorers: tuple[Scorer, Scorer]
) -> list[tuple[int, int]]:
    """Tokens of each completion that the first policy sampled, and that the second did then."""
    found = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            sampled = torch.tensor(completion.logprobs)
            first, second = ((s(prompt, completion) - sampled).abs() < 1e-3 for s in scorers)
            switch = len(sampled) if first.all() else int((~first).nonzero()[0])
            found.append((switch, int(second[switch:].sum())))
    return found


def change(loaded: LoadedPolicy) -> None:
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def test_completions_in_flight_go_on_with_the_new_weights(server, model):
    """Log-probs are those of the old weights up to some token, and from there the new ones'."""
    loaded = load_policy(model, config=config(server, async_rollouts=2))
    loaded.sampler.sync(loaded.policy)
    old, samples = scorer(loaded), long_samples(loaded, server)
    change(loaded)
    loaded.sampler.sync(loaded.policy)
    assert not samples.done()
    tokens = tokens_of_each(samples.result(), (old, scorer(loaded)))
    assert all(0 < first < TOKENS and first + second == TOKENS for first, second in tokens)


def test_requests_that_are_aborted_end_at_once(server, model):
    loaded: Any = load_policy(model, config=config(server, async_rollouts=1))
    loaded.sampler.sync(loaded.policy)
    samples = long_samples(loaded, server)
    began = time.monotonic()
    loaded.sampler.abort()
    with pytest.raises(ValueError, match="cut a completion"):
        samples.result(timeout=30)
    assert time.monotonic() - began < 5
