"""Weights that are read a layer at a time are those of the files that `save_pretrained` writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from processes import launch
from safetensors.torch import load_file
from test_trainer import CONFIG
from tiny import character_tokenizer, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from grao_fast.distributed.launch import launched
from grao_fast.models import whole_weights
from grao_fast.models.policy import Policy
from grao_fast.models.whole_weights import WholeWeights
from grao_fast.sampling import weights
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.weights import WeightFolder


def read(policy: Policy) -> dict[str, Tensor]:
    """All tensors of a policy, as `WholeWeights` gives them."""
    whole = WholeWeights(policy)
    layers: list[dict[str, Tensor]] = whole.read(lambda stream: [dict(each) for each in stream])
    found = {name: tensor for layer in layers for name, tensor in layer.items()}
    outline = whole.outline()
    assert list(outline) == list(found)
    assert all((t.shape, t.dtype) == (outline[n].shape, outline[n].dtype) for n, t in found.items())
    return found


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """The tensors in the files that a model's `save_pretrained` writes."""
    model.save_pretrained(folder)
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tied: bool) -> bool:
    if tied:
        assert torch.equal(ours.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Qwen3Moe", "Phi3", "Gemma2"])
def test_a_model_is_read_as_it_is_saved(family: str, tmp_path: Path):
    tokenizer = character_tokenizer(chat_template=None)
    model = family_model(family, vocab_size=len(tokenizer), max_position_embeddings=128)
    loaded = load_policy(model, config=CONFIG, tokenizer=tokenizer)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert len(WholeWeights(loaded.policy)._units) > 2
    assert same(read(loaded.policy), saved(model, tmp_path), tied=tied)


ADAPTERS = {
    "LoRA": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "embeddings too": {"target_modules": ["q_proj", "embed_tokens"]},
    "a norm that is saved": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "new tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_merged_as_peft_does_it(kind: str, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    path = save_tiny_model(tmp_path / "model", tied=False)
    adapter = peft.LoraConfig(r=4, **ADAPTERS[kind])
    loaded = load_policy(path, config=CONFIG, peft_config=adapter)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    merged: Any = copy.deepcopy(loaded.model)
    theirs = saved(merged.merge_and_unload(), tmp_path / "saved")
    assert same(read(loaded.policy), theirs, tied=False)
    assert all(torch.equal(before[n], t) for n, t in loaded.model.state_dict().items())


def test_two_processes_write_files_of_a_layer_each(tmp_path: Path, monkeypatch):
    """Of shards, in 16 bits, and rank 0 alone has what it writes."""
    monkeypatch.setattr(weights, "_FILE", 1)
    path = save_tiny_model(tmp_path / "model")

    def body(rank: int) -> None:
        with launched("cpu", timeout=60, heartbeat_timeout=60) as world:
            config = CONFIG.replace(bf16=True, sharding="full")
            loaded = load_policy(path, config=config, world=world)
            folder = WeightFolder(str(tmp_path), loaded.tokenizer, world)
            written = folder.write(loaded.policy)
            layers = list(WholeWeights(loaded.policy)._layers())
            assert [bool(layer) for layer in layers] == [world.is_main] * 3
            if world.is_main:
                assert len(list(written.glob("*.safetensors"))) == 3
                theirs = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
                own = AutoModelForCausalLM.from_pretrained(path).bfloat16().float().state_dict()
                assert all(torch.equal(own[n], t) for n, t in theirs.state_dict().items())

    ended = launch(body, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended[0].stderr[-2000:]


def test_an_error_of_the_reader_comes_after_the_gathering(tmp_path: Path, monkeypatch):
    """In which other processes would wait."""
    loaded = load_policy(save_tiny_model(tmp_path), config=CONFIG)
    gathered: list[Tensor] = []
    monkeypatch.setattr(whole_weights, "whole", lambda tensor: gathered.append(tensor) or tensor)

    def fails(stream: Iterator[dict[str, Tensor]]) -> None:
        next(stream)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        WholeWeights(loaded.policy).read(fails)
    assert len(gathered) == len(loaded.model.state_dict())
