"""GRAOTrainer under DeepSpeed's ZeRO and under FSDP2, against the specification in float64."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import free_port, launch
from published import assert_as_published
from safetensors.torch import load_file
from tiny import save_tiny_model
from transformers import AutoTokenizer

pytest.importorskip("trl")
import trl_clusters
import trl_tools
from trl_runs import double_of, truth, with_rewards

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"
HAS_DEEPSPEED = find_spec("deepspeed") is not None
NEEDS_DEEPSPEED = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed, see docs/trl.md")
KINDS = [
    pytest.param("zero2", marks=NEEDS_DEEPSPEED),
    pytest.param("zero3", marks=NEEDS_DEEPSPEED),
    "fsdp2",
]


@pytest.fixture(scope="module", autouse=True)
def deepspeed_on_the_cpu() -> Iterator[None]:
    """Import DeepSpeed before processes fork, as it is told to run without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        if HAS_DEEPSPEED:
            importlib.import_module("deepspeed")
        yield


def environment(kind: str, folder: Path) -> dict[str, str]:
    if not kind.startswith("zero"):
        return trl_clusters.FSDP2 if kind == "fsdp2" else {}
    stage, _, offload = kind.removeprefix("zero").partition("_")
    return trl_clusters.zero(int(stage), folder, offload=offload == "offload")


def in_two(kind: str, folder: Path, body: Callable[[], Any]) -> None:
    """Call `body` in two processes with what `accelerate launch` sets for the kind."""
    folder.mkdir(exist_ok=True)
    named = environment(kind, folder)

    def run(rank: int) -> None:
        os.environ.update(named)
        body()
        torch.distributed.destroy_process_group()

    for process in launch(run, folder, timeout=800):  # DeepSpeed compiles its AdamW, once
        assert process.status == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "untied", tied=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["tied", "untied", "lora"])
def test_the_gradient_is_the_specifications(
    tiny_model: Path, untied_model: Path, tmp_path: Path, kind: str, model: str
) -> None:
    """Of weights that are split over two processes; read off a step of SGD, once it is saved."""
    source, lora = untied_model if model == "untied" else tiny_model, model == "lora"
    gathers = model != "untied"
    in_two(
        kind,
        tmp_path,
        lambda: trl_clusters.one_step(
            source, tmp_path, lora=lora, ds3_gather_for_generation=gathers
        ),
    )
    ranks = saved_by(tmp_path)
    assert all(rank["shares"] for rank in ranks)
    double = double_of(source)
    assert_divided(ranks[0], kind, double)
    saved = load_file(tmp_path / "saved" / f"{'adapter_model' if lora else 'model'}.safetensors")
    whole = with_adapter(double, saved) if lora else double
    loss = specified_loss(double, source, ranks)
    loss.backward()
    assert ranks[0]["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    learnt = []  # pairs of gradients that are not rounding alone
    for name, parameter in whole.named_parameters():
        if not parameter.requires_grad:
            continue
        after = saved[name.replace(".default", "")].double()
        ours = (parameter.detach().float() - after) / trl_clusters.LR
        largest = float(parameter.grad.abs().max())
        assert float((ours - parameter.grad).abs().max()) <= 1e-5 * max(1e-2, largest), name
        if largest > 1e-4:
            learnt.append((ours, parameter.grad))
    assert len(learnt) >= 10
    values = ranks[0]["loss"], loss.detach()
    way = "the same of a LoRA adapter alone"
    if not lora:
        way = "the same under DeepSpeed, ZeRO-2 and ZeRO-3, or accelerate's FSDP2"
    assert_as_published(way, *values, *zip(*learnt, strict=True), kind=f"{kind}, {model}")


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_log_probs_leave_the_model_in_float32(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    """Ratios and the KL penalty are differences of log-probs, which bfloat16 would round.

    The policy of the KL term is still the policy itself, and adds nothing to the gradient.
    """
    options = {"bf16": True, "beta": 1e-3}
    in_two(kind, tmp_path, lambda: trl_clusters.one_step(tiny_model, tmp_path, **options))
    ranks, double = saved_by(tmp_path), double_of(tiny_model)
    assert_divided(ranks[0], kind, double)
    for rank in ranks:
        assert rank["third"].dtype == torch.float32 and rank["third"] == torch.tensor(1 / 3)
        for scores_BC in rank["scores"]:
            assert scores_BC.dtype == torch.float32
            assert (scores_BC != scores_BC.bfloat16()).all()
    specified_loss(double, tiny_model, ranks).backward()
    saved = weights_of(tmp_path)
    ours, expected = [], []
    for name, parameter in double.named_parameters():
        ours.append(((parameter.detach() - saved[name]) / trl_clusters.LR).flatten())
        expected.append(parameter.grad.flatten())
    apart = (torch.cat(ours) - torch.cat(expected)).norm()
    assert apart <= 0.03 * torch.cat(expected).norm()


def saved_by(folder: Path) -> list[dict[str, Any]]:
    """What each process saved in `one_step`."""
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def assert_divided(run: dict[str, Any], kind: str, model: torch.nn.Module) -> None:
    """accelerate took the kind; a process holds about half the weights, or all below ZeRO-3."""
    assert run["kind"] == {"fsdp2": "FSDP", "ddp": "MULTI_CPU"}.get(kind, "DEEPSPEED")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert (run["held"] <= 0.7 * total) == kind.startswith(("zero3", "fsdp2"))


def specified_loss(
    double: torch.nn.Module, source: Path, ranks: list[dict[str, Any]]
) -> torch.Tensor:
    """The specification's loss of what the processes sampled."""
    tokenizer, loss = AutoTokenizer.from_pretrained(source), torch.zeros((), dtype=torch.float64)
    rollouts = [rank["rollouts"] for rank in ranks]
    for (rows_0, pairs_0), (rows_1, pairs_1) in zip(*rollouts, strict=True):
        batch = with_rewards(tokenizer, rows_0 + rows_1, pairs_0 + pairs_1, G=2)
        loss = loss + truth(double, *batch).loss / len(rollouts[0])
    return loss


def with_adapter(double: torch.nn.Module, saved: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model under the adapter as it began: `lora_A` has no gradient in the first step."""
    from peft import get_peft_model

    whole = get_peft_model(double, trl_clusters.LORA).double()
    for name, parameter in whole.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(saved[name.replace(".default", "")])
    return whole


def in_one(folder: Path, body: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Call `body` in one process, and return the weights that it saved."""
    folder.mkdir()
    (process,) = launch(lambda _: body(), folder, size=1, timeout=400)
    assert process.status == 0, process.stderr[-3000:]
    return weights_of(folder)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "saved" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    in_one(folder, lambda: trl_clusters.some_steps(tiny_model, folder))
    return folder


def assert_ends_alike(folder: Path, alone: Path, kind: str, model: Path) -> None:
    """It was divided; the norms of its gradients and its last weights are those of one process."""
    run, expected = (json.loads((each / "run-0.json").read_text()) for each in (folder, alone))
    assert_divided(run, kind, double_of(model))
    assert run["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    weights = weights_of(folder)
    for name, whole in weights_of(alone).items():
        torch.testing.assert_close(weights[name], whole, atol=1e-5, rtol=0)


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("kind", ["zero1", "zero2_offload", "zero3_offload"])
def test_other_ways_of_deepspeed_end_alike(
    tiny_model: Path, alone: Path, tmp_path: Path, kind: str
) -> None:
    """ZeRO-1, and an optimiser in the host's memory."""
    in_two(kind, tmp_path, lambda: trl_clusters.some_steps(tiny_model, tmp_path))
    assert_ends_alike(tmp_path, alone, kind, tiny_model)
    name = json.loads((tmp_path / "run-0.json").read_text())["optimiser"]
    assert name == ("DeepSpeedCPUAdam" if kind.endswith("offload") else "AdamW")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_one_processs_and_resumes(
    tiny_model: Path, alone: Path, tmp_path: Path, kind: str
) -> None:
    """Two steps, with a KL penalty, clipping and recomputation; the second once more, resumed."""
    in_two(kind, tmp_path, lambda: trl_clusters.some_steps(tiny_model, tmp_path))
    assert_ends_alike(tmp_path, alone, kind, tiny_model)
    for written in ("saved/model.safetensors", "run-0.json"):
        (tmp_path / written).unlink()
    in_two(kind, tmp_path, lambda: trl_clusters.some_steps(tiny_model, tmp_path, resume=True))
    assert_ends_alike(tmp_path, alone, kind, tiny_model)


@pytest.mark.parametrize("kind", ["ddp", *KINDS])
def test_processes_sample_turns_behind_tools_in_step(tmp_path: Path, kind: str) -> None:
    """One has turns to sample while the other has none; the gradient is the specification's."""
    model = trl_tools.save_tool_model(tmp_path / "model")
    in_two(kind, tmp_path, lambda: trl_tools.one_step(model, tmp_path))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    double, loss = double_of(model), 0.0
    assert_divided(ranks[0], kind, double)
    for rollout in range(2):
        batches = [rank["batches"][rollout] for rank in ranks]
        groups, learned = trl_tools.groups_of(batches)
        samples, references = ([rank["scored"][2 * rollout + n] for rank in ranks] for n in (0, 1))
        # of 3 rows each, the first process's first and last begin a group, and the other's second
        rewards = [*samples[0], *samples[1]], [*references[0][:2], references[1][0]]
        samples_N2, references_N1 = (torch.tensor(each).double().view(3, -1) for each in rewards)
        rewards_NK = torch.cat([samples_N2, references_N1], dim=1)
        loss = loss + truth(double, groups, rewards_NK, learned=learned).loss / 2
    loss.backward()
    # of the samples of 2 rollouts in 2 processes, 0, 1 and 2 calls each, or none
    assert ranks[0]["calls"] == pytest.approx((3 + 6) / 12)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, parameter in double.named_parameters():
        ours = (parameter.detach() - saved[name].double()) / trl_clusters.LR
        largest = float(parameter.grad.abs().max())
        assert float((ours - parameter.grad).abs().max()) <= 1e-5 * max(1e-2, largest), name


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout")
@pytest.mark.parametrize("name", [pytest.param("zero3", marks=NEEDS_DEEPSPEED), "fsdp2"])
def test_the_examples_for_accelerate_start_it(
    tiny_model: Path, alone: Path, tmp_path: Path, name: str
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(EXAMPLES / "trl" / f"{name}.yaml"), "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", str(free_port())]
    command += [trl_clusters.__file__, "steps", str(tiny_model), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_ends_alike(tmp_path, alone, name, tiny_model)


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs a checkout")
@pytest.mark.parametrize("kind", [*KINDS, "ddp"])
def test_the_example_for_transformers_trainer(
    tiny_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step is that of one process, since it asks for the head's weight in the head's pass."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "trainers"))
    one, two = tmp_path / "one", tmp_path / "two"
    expected = in_one(one, lambda: trl_clusters.supervised_step(tiny_model, one))
    in_two(kind, two, lambda: trl_clusters.supervised_step(tiny_model, two))
    assert_divided(json.loads((two / "run-0.json").read_text()), kind, double_of(tiny_model))
    before = load_file(tiny_model / "model.safetensors")
    weights = weights_of(two)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=0)
        assert not torch.equal(weight, before[name]), name
