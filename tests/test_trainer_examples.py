"""The examples for other trainers, executed on a tiny model."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from published import assert_as_published
from safetensors.torch import load_file
from tiny import save_tiny_model, write_jsonl
from tolerance import gradients_of, worst_error
from transformers import AutoModelForCausalLM, Cohere2Config, GraniteConfig, PhiConfig

from grao_fast.kernels import reference
from grao_fast.objectives import WeightedTokens

FOLDER = Path(__file__).parents[1] / "examples" / "trainers"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs a checkout")

SAMPLES = [
    {
        "prompt": f"{a}+{b}=",
        "completions": [str(a + b), "no", str(a + b + 1)],
        "rewards": [1.0, -1.0, 0.0],
        "reference": f"{a + b}!",
        "reference_reward": 0.5 if a % 2 else 1.0,
    }
    for a, b in [(1, 2), (2, 3), (3, 9), (4, 4)]
]

TINY = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports an example by name, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    imported: list[str] = []

    def load(name: str) -> ModuleType:
        imported.append(name)
        return importlib.import_module(name)

    yield load
    for name in [*imported, "plain"]:
        sys.modules.pop(name, None)


@pytest.fixture
def stored(tmp_path: Path, example, capsys: pytest.CaptureFixture) -> tuple[Path, Path]:
    """A tiny model, and the weighted tokens of stored samples."""
    model = save_tiny_model(tmp_path / "model")
    samples = write_jsonl(tmp_path / "samples.jsonl", SAMPLES)
    example("store").main(str(model), str(samples), str(tmp_path / "step.safetensors"))
    assert "16 sequences with a weight" in capsys.readouterr().out
    return model, tmp_path / "step.safetensors"


def losses(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"loss (-?[\d.]+)", text)]


def test_stored_samples_in_plain_pytorch(
    stored: tuple[Path, Path], tmp_path: Path, example, capsys: pytest.CaptureFixture
) -> None:
    model, step = stored
    example("plain").main(str(model), str(step), str(tmp_path / "plain"))
    of_plain = losses(capsys.readouterr().out)
    assert len(of_plain) == 4 and of_plain == sorted(of_plain, reverse=True)
    trained = load_file(tmp_path / "plain" / "model.safetensors")
    assert any(
        not torch.equal(each, load_file(model / "model.safetensors")[name])
        for name, each in trained.items()
    )
    loss, gradients = specified(model)
    assert of_plain[0] == pytest.approx(loss, abs=2e-6)
    total, own = first_step(example("plain"), model, step)
    assert_as_published("plain PyTorch, from stored samples", total, loss, own, gradients)
    assert worst_error(own, gradients) < 1e-5


def test_fabric_trains_as_plain_pytorch(
    stored: tuple[Path, Path], tmp_path: Path, example, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("lightning_fabric")
    model, step = stored
    said = {}
    for name in ("plain", "fabric"):
        example(name).main(str(model), str(step), str(tmp_path / name))
        said[name] = losses(capsys.readouterr().out)
    assert len(said["plain"]) == 4 and said["fabric"] == said["plain"]
    plain, fabric = (load_file(tmp_path / name / "model.safetensors") for name in said)
    assert all(torch.equal(each, fabric[name]) for name, each in plain.items())


def first_step(plain: ModuleType, model: Path, step: Path) -> tuple[float, list[torch.Tensor]]:
    """The loss and gradients of the first pass over the file."""
    policy, total = plain.WithLoss(str(model)), 0.0
    for batch in plain.micro_batches(WeightedTokens.load(step)):
        loss = policy(*batch)
        loss.backward()
        total += loss.item()
    return total, gradients_of(policy)


def specified(path: Path) -> tuple[float, list[torch.Tensor]]:
    """GRAO's loss of the stored samples and its gradients, by the specification in float64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    hidden, target, sequence = [], [], []
    for n, row in enumerate(SAMPLES):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for k, text in enumerate([*row["completions"], row["reference"]]):
            ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            states = model.base_model(torch.tensor([prompt + ids])).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            target += ids
            sequence += [n * 4 + k] * len(ids)
    rewards = [[*row["rewards"], row["reference_reward"]] for row in SAMPLES]
    loss = reference.grao_loss(
        torch.cat(hidden),
        model.lm_head.weight,
        torch.tensor(target),
        torch.tensor(sequence),
        torch.tensor(rewards, dtype=torch.float64),
        reference_advantage="clip",
    ).loss
    loss.backward()
    return loss.item(), gradients_of(model)


def test_sft_by_transformers_trainer(tmp_path: Path, example) -> None:
    model = save_tiny_model(tmp_path / "model")
    rows = [{"prompt": f"{a}+1=", "reference": str(a + 1)} for a in range(16)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    module = example("huggingface")
    module.main(str(model), str(path), str(tmp_path / "run"))
    state = json.loads(next((tmp_path / "run").glob("*/trainer_state.json")).read_text())
    assert state["global_step"] == 20
    # the loss of a batch, beside the model's own
    policy = AutoModelForCausalLM.from_pretrained(model)
    trainer = module.OnePassTrainer(
        policy, module.TrainingArguments(str(tmp_path / "other"), report_to="none")
    )
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 1, 0]]),
        "labels": torch.tensor([[-100, 6, 7, 8], [-100, -100, 1, -100]]),
    }
    double = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    logits = double(batch["input_ids"]).logits[:, :-1]  # the model's own loss is in float32
    truth = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    # Transformers passes None, a tensor, or an int; a step that fails leaves the head as it was
    assert trainer.compute_loss(policy, dict(batch), num_items_in_batch=8).item() == pytest.approx(
        truth.item() * 4 / 8, rel=1e-6
    )
    with pytest.raises(RuntimeError):
        trainer.compute_loss(policy, batch | {"attention_mask": torch.ones(2, 9)})
    assert policy(batch["input_ids"]).logits.ndim == 3
    losses = trainer.compute_loss(policy, dict(batch)), truth
    for each in losses:
        each.backward()
    gradients = gradients_of(policy), gradients_of(double)
    way = "Transformers' Trainer, SFT (against cross-entropy in float64)"
    assert_as_published(way, *(each.detach() for each in losses), *gradients)
    assert losses[0].item() == pytest.approx(truth.item(), rel=1e-6)
    assert worst_error(*gradients) < 1e-5


def test_sft_by_transformers_trainer_with_a_bias_and_several_processes(
    tmp_path: Path, example, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's bias counts; the loss is multiplied where Transformers counts over processes."""
    config = PhiConfig(**TINY, tie_word_embeddings=False)
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(policy.lm_head.bias)
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, 6, 7, 8]])
    trainer = one_pass(example, policy, tmp_path)
    truth = policy(ids, labels=labels).loss.item()
    assert loss_of(trainer, ids, labels) == pytest.approx(truth, rel=1e-5)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    for averages, times in ((True, 2), (False, 1)):
        trainer.args.average_tokens_across_devices = averages
        loss = loss_of(trainer, ids, labels, num_items_in_batch=torch.tensor(6))
        assert loss == pytest.approx(truth * 3 / 6 * times, rel=1e-5)
        assert loss_of(trainer, ids, labels) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(logits_scaling=3.0, **TINY), Cohere2Config(logit_scale=0.3, **TINY)],
    ids=lambda config: config.model_type,
)
def test_sft_by_transformers_trainer_refuses_a_model_that_changes_logits(
    tmp_path: Path, example, config
) -> None:
    policy = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([[5, 6, 7, 8]])
    with pytest.raises(AssertionError, match="would scale or cap the loss"):
        loss_of(one_pass(example, policy, tmp_path), ids, ids)


def one_pass(example, policy: torch.nn.Module, folder: Path) -> Any:
    module = example("huggingface")
    args = module.TrainingArguments(str(folder), report_to="none", use_cpu=True)
    return module.OnePassTrainer(policy, args)


def loss_of(trainer: Any, ids: torch.Tensor, labels: torch.Tensor, **options: Any) -> float:
    inputs = {"input_ids": ids, "labels": labels}
    return trainer.compute_loss(trainer.model, inputs, **options).item()


@pytest.mark.slow
def test_stored_samples_in_a_sharded_loop(
    stored: tuple[Path, Path], tmp_path: Path, example, capsys: pytest.CaptureFixture
) -> None:
    model, step = stored
    example("plain").main(str(model), str(step), str(tmp_path / "plain"))
    of_plain = losses(capsys.readouterr().out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*launch, str(FOLDER / "sharded.py"), str(model), str(step), str(tmp_path / "sharded")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    of_sharded = losses(run.stdout)
    assert of_sharded == pytest.approx(of_plain, abs=2e-6)
    trained = load_file(tmp_path / "plain" / "model.safetensors")
    sharded = load_file(tmp_path / "sharded" / "model.safetensors")
    apart = max(float((sharded[name] - each).abs().max()) for name, each in trained.items())
    loss = max(abs(one - other) for one, other in zip(of_sharded, of_plain, strict=True))
    print(f"\nsharded beside plain, four steps: losses {loss:.0e}, weights {apart:.0e}")
    assert apart < 1e-5


def test_examples_are_short() -> None:
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 50, path.name
