"""Several processes that sample from one server (tests/vllm_server.py), which all give weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import VARIANTS, differences, model_of, run, run_all
from processes import Ended, launch
from test_parity import ROUNDING
from test_trainer import lines, weights
from test_vllm_transfer import stand_in
from vllm_server import FakeVLLM, serving

pytest.importorskip("openai", reason="openai, the client of a vLLM server, is not installed")

STEPS = 2
PROMPTS = 6


class Server(FakeVLLM):
    """A server that can be restarted after a number of hand-overs.

    scored: texts of a proof that it has scored.
    restarts_after: this many.
    """

    scored = 0
    restarts_after: int | None = None

    def _scored(self, model: torch.nn.Module, ids: list[int]) -> dict[str, Any]:
        answer = super()._scored(model, ids)
        self.scored += 1
        if self.scored == self.restarts_after:
            self.start()
        return answer


@pytest.fixture
def fake(tmp_path: Path) -> FakeVLLM:
    path, _ = model_of("tied", tmp_path / "models" / "tied")
    return Server(str(path))


@pytest.fixture
def options(fake: FakeVLLM) -> Iterator[dict[str, Any]]:
    with serving(fake) as url:
        yield {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}


def compare(name: str, fake: FakeVLLM, folder: Path, options: dict[str, Any]) -> Path:
    """Hold a run of two processes against one of one process; returns the former's folder."""
    for size in (1, 2):
        fake.start()
        fake.requests.clear()
        run_all([name], folder, size, steps=STEPS, options=options)
    off = differences(folder / f"{name} 1", folder / f"{name} 2")
    assert off["samples"] == off["reward"] == 0
    assert max(off["loss"], off["grad_norm"], off["weights"]) <= ROUNDING
    asked = [body for body in fake.paths("/v1/completions") if "prompt_logprobs" not in body]
    assert len(asked) == STEPS * PROMPTS  # each prompt by one of the processes
    assert max(row["sampling/logp_diff"] for row in lines(folder / f"{name} 2")) < 1e-5
    return folder / f"{name} 2"


def test_two_processes_train_as_one(fake: FakeVLLM, options, tmp_path: Path):
    output = compare("tied", fake, tmp_path, options)
    assert len(fake.paths("/collective_rpc")) == STEPS + 2
    assert len(fake.paths("/pause")) == len(fake.paths("/resume")) == STEPS + 2
    final, theirs = weights(output / "final"), fake.model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in final.items())


@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_goes_alone_or_merged(fake: FakeVLLM, options, tmp_path: Path, alone: bool):
    fake.max_lora_rank = 8 if alone else None
    compare("LoRA", fake, tmp_path, options)
    used, unused = ("/v1/load_lora_adapter", "/collective_rpc")[:: 1 if alone else -1]
    assert len(fake.paths(used)) == STEPS + 2
    assert not fake.paths(unused)


@pytest.mark.slow
def test_weights_go_by_the_transfer_while_they_are_gathered(fake, options, tmp_path, monkeypatch):
    monkeypatch.setattr("grao_fast.sampling.vllm.handover.cannot_transfer", lambda *_: "")
    stand_in(fake, tmp_path, monkeypatch)
    output = compare("tied", fake, tmp_path, options)
    assert len(fake.paths("/update_weights")) == STEPS + 2
    assert not fake.paths("/collective_rpc")
    final, theirs = weights(output / "final"), fake.model.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in final.items())


@pytest.mark.slow
def test_rollouts_are_sampled_ahead(fake: FakeVLLM, options, tmp_path: Path):
    for size in (1, 2):
        fake.start()
        ahead = options | {"async_rollouts": 1}
        run_all(["tied"], tmp_path, size, steps=3, options=ahead)
    off = differences(tmp_path / "tied 1", tmp_path / "tied 2")
    assert off["samples"] == off["reward"] == 0
    assert max(off["loss"], off["weights"]) <= ROUNDING
    assert [row["sampling/staleness"] for row in lines(tmp_path / "tied 2")] == [0, 1, 1]


@pytest.mark.slow
def test_a_server_that_is_restarted_between_steps_gets_the_weights_again(fake, options, tmp_path):
    run_all(["tied"], tmp_path, 1, steps=STEPS, options=options)
    fake.start()
    fake.scored, fake.restarts_after = 0, 3  # twice before the first step
    fake.requests.clear()
    run_all(["tied"], tmp_path, 2, steps=STEPS, options=options)
    assert len(fake.paths("/collective_rpc")) == STEPS + 3
    off = differences(tmp_path / "tied 1", tmp_path / "tied 2")
    assert off["samples"] == 0 and off["weights"] <= ROUNDING


def ended(folder: Path, options: dict[str, Any]) -> list[Ended]:
    def body(rank: int) -> None:
        variant = VARIANTS["tied"]
        variant.options.update(options)
        run(variant, folder / "output", folder / "models", steps=STEPS)

    printed = folder / "printed"
    printed.mkdir()
    return launch(body, printed)


def one_message(processes: list[Ended]) -> str:
    """The message of the error that ended both processes, which one of them printed."""
    assert [process.status for process in processes] == [1, 1]
    (said,) = [each.stderr for each in processes if "Error" in each.stderr]
    return said.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_a_server_that_keeps_old_weights_ends_all(fake, options, tmp_path: Path, bf16: bool):
    fake.keeps = lambda name: name == "lm_head.weight"
    said = one_message(ended(tmp_path, options | {"learning_rate": 0.0, "bf16": bf16}))
    assert "UserError: rank 0 of 2: the vLLM server at" in said
    assert "does not hold the policy's weights" in said and "head, which is tied" in said


@pytest.mark.slow
def test_a_server_that_fails_ends_all(fake: FakeVLLM, options, tmp_path: Path):
    fake.answers = {"/collective_rpc": 500}
    said = one_message(ended(tmp_path, options))
    assert "ConnectionError: rank 0 of 2: the vLLM server did not load the weights" in said
    assert not fake.paused
