"""What TRL's own tests ask of GRPOTrainer's models and adapters, asked of GRAOTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SIZES, family_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")

from trl_beside import OfGRAO, group_of, letters, make, moved, stepping, texts, weights
from trl_runs import CHECKPOINTING, assert_same, double_of, truth
from trl_tools import save_tool_model

from grao_fast.models.head import LogitTransform


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tool_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("form", ["a config", "a model", "a model and a KL penalty", "recomputed"])
def test_an_adapter_alone_moves(llama: Path, tmp_path: Path, form: str):
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    options: dict[str, Any] = {"max_steps": 2, "lr_scheduler_type": "constant"}
    if form.startswith("a model"):
        model = get_peft_model(model, adapter)
        options |= {"beta": 0.1} if "KL" in form else {}
    else:
        options |= {"peft_config": adapter, CHECKPOINTING: form == "recomputed"}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    trainer = make(OfGRAO, model, tmp_path, letters, texts(), processing_class=tokenizer, **options)
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == {name for name in trainer.began if ".default." in name}
    copies = [name for name in trainer.began if ".ref." in name]
    assert bool(copies) == ("KL" in form)


def test_a_copy_of_the_head_is_what_learns(llama: Path, tmp_path: Path):
    """Its KL penalty is to the model's own head."""
    adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    options = {"beta": 0.1, "max_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}
    trainer, gradients = stepping(llama, tmp_path, peft_config=adapter, **options)
    double = double_of(llama)
    truth(double, *group_of(trainer)).loss.backward()
    (name,) = (
        each for each in gradients if each.endswith("lm_head.modules_to_save.default.weight")
    )
    gradient = double.lm_head.weight.grad
    torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-5, atol=1e-6)
    assert all(".default." in each for each in gradients)
    first, second = (entry["kl"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-6


def test_virtual_tokens_are_refused(llama: Path, tmp_path: Path):
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig prepends virtual tokens"):
        make(OfGRAO, llama, tmp_path, letters, texts(), peft_config=tuning)


def saved_family(name: str, llama: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = family_model(name, **sizes, max_position_embeddings=256, **MODELS[name])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Cohere2": {},
    "Gemma2": {},
    "Qwen3Moe": {},
    "Glm4Moe": MIXTURE | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "NemotronH": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
}
OF_EXPERTS = ("Qwen3Moe", "Glm4Moe", "GptOss")


@pytest.mark.parametrize("name", MODELS)
def test_families_that_trl_trains(llama: Path, tmp_path: Path, name: str):
    folder = saved_family(name, llama, tmp_path / "model")
    options = {"router_aux_loss_coef": 0.0} if name in OF_EXPERTS else {}
    trainer, gradients = stepping(folder, tmp_path, **options)
    eager = {"experts_implementation": "eager"} if name in OF_EXPERTS else {}  # in float64
    double = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    transform = LogitTransform.from_config(double.config.get_text_config())
    logits = {"logit_scale": transform.logit_scale, "softcap": transform.softcap}
    truth(double, *group_of(trainer), **logits).loss.backward()
    assert_same(list(gradients.values()), double)


def test_an_adapter_of_experts_is_held_to_its_copy(llama: Path, tmp_path: Path):
    folder = saved_family("GptOss", llama, tmp_path / "model")
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    adapter = LoraConfig(target_parameters=names)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), adapter)
    trainer = make(
        OfGRAO,
        model,
        tmp_path,
        letters,
        texts(),
        beta=0.1,
        router_aux_loss_coef=0.0,
        max_steps=2,
        lr_scheduler_type="constant",
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == {name for name in trainer.began if ".default." in name}
    first, second = (entry["kl"] for entry in trainer.state.log_history[:2])
    assert first == pytest.approx(0.0, abs=1e-6) and second > 1e-6


def test_code_beside_a_model_runs_if_it_is_trusted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(llama)
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(OWN_CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    settings["auto_map"] = {name: f"modeling_own.{each}" for name, each in classes.items()}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="custom code"):
        make(OfGRAO, folder, tmp_path, letters, texts())
    trainer = make(OfGRAO, folder, tmp_path, letters, texts(), trust_remote_code=True)
    assert type(trainer.model).__name__ == "OwnForCausalLM"
    trainer.began = {name: each.detach().clone() for name, each in weights(trainer)}
    trainer.train()
    assert moved(trainer) == set(trainer.began)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
