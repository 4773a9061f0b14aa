"""The judge by vLLM's own server, which serves SmolLM2-135M-Instruct on CPUs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_vllm import BIN, RealServer

from grao_fast.rewards import Judge, RewardError
from grao_fast.rewards.measured import join_metrics

MODEL = os.environ.get("GRAO_SMOLLM2", "")
KEY = "sk-of-the-tests"
WORDS = {"structured_outputs": {"choice": ["A", "B", "EQUAL"]}}

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.real,
    pytest.mark.skipif(not MODEL, reason="GRAO_SMOLLM2 names no model folder"),
    pytest.mark.skipif(
        not (BIN / "vllm").exists(), reason="GRAO_VLLM names no folder with a vllm executable"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    log = tmp_path_factory.mktemp("judge") / "vllm.log"
    real = RealServer(Path(MODEL), log, "--served-model-name", "judge", "--api-key", KEY)
    try:
        yield real.start()
    finally:
        real.stop()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAO_TEST_KEY", KEY)


def judge_at(server: RealServer, **options) -> Judge:
    options = {"model": "judge", "api_key_env": "GRAO_TEST_KEY", "max_tokens": 16} | options
    options["timeout"] = 300.0
    return Judge("the correct answer", base_url=f"{server.url}/v1", **options)


def ask(judge: Judge) -> list[float | None]:
    prompts = ["What is 1 + 1?", "Name a colour."]
    return asyncio.run(judge(prompts, ["2", "Five."], ["Eleven.", "Red."]))


def test_a_model_that_is_held_to_the_words_always_gives_a_verdict(server):
    judge = judge_at(server, extra_body=WORDS, prices=(1.0, 1.0))
    judge.check_ready()
    assert set(ask(judge)) <= {-1.0, 0.0, 1.0}
    metrics = join_metrics([judge.take_metrics()])
    assert metrics["requests"] == 4
    assert metrics["failed"] == metrics["unparsable"] == 0
    assert metrics["prompt_tokens"] > 4 * 100
    assert 4 <= metrics["completion_tokens"] <= 16
    tokens = metrics["prompt_tokens"] + metrics["completion_tokens"]
    assert metrics["cost"] == pytest.approx(tokens / 1e6)


def test_without_them_each_answer_is_a_verdict_or_counted(server):
    judge = judge_at(server, max_tokens=8)
    rewards = ask(judge)
    try:
        metrics = join_metrics([judge.take_metrics()])
    except RewardError as error:
        assert rewards == [None, None]
        assert "an answer holds no verdict" in str(error)
    else:
        assert (metrics["unparsable"] > 0) == (None in rewards)


def test_a_wrong_model_or_key_is_one_line(server, monkeypatch):
    with pytest.raises(RewardError, match=r"`gpt-0` does not exist.*one that is served: judge$"):
        judge_at(server, model="gpt-0").check_ready()
    with pytest.raises(RewardError, match="name the environment variable"):
        judge_at(server, api_key_env=None).check_ready()
    monkeypatch.setenv("GRAO_TEST_KEY", "another")
    with pytest.raises(RewardError, match="correct the key in the environment variable"):
        judge_at(server).check_ready()
