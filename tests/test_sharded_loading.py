"""Loading into shards: what one process loads, to the bit, in a process's share of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_loads import compare, in_processes, load, measure
from tiny import character_tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from grao_fast.distributed.world import World
from grao_fast.system.errors import UserError

SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
EMBEDDINGS = "model.embed_tokens.weight"
EXPERTS: dict[str, Any] = dict(
    head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[]
)


def saved(folder: Path, config: Any, **options: Any) -> Path:
    """A random model of that config in a folder, with a tokenizer of characters."""
    tokenizer = character_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


def stored_as(folder: Path, change: Any) -> Path:
    """The model in a folder with `change` applied to the tensors of its file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def each_case(world: World, folder: Path, cases: list[tuple[str, dict[str, Any]]]) -> None:
    for name, options in cases:
        try:
            compare(world, folder / name, options)
        except Exception as error:  # of any kind: it is raised again with the name of the case
            raise AssertionError(f"case {name} {options}: {error}") from error


def measure_and_refuse(world: World, folder: Path, missing: str) -> None:
    for name in ("layers", "experts"):
        measure(world, folder / name)
    expect_error(world, folder / "missing", missing)
    expect_error(world, folder / "quantised", "is quantised, and cannot be sharded")


def expect_error(world: World, model: Path, message: str) -> None:
    try:
        load(model, world)
    except (UserError, SystemExit) as error:  # of this process, or of another that failed first
        assert message in str(error), error
    else:
        raise AssertionError("it loaded")


def test_what_processes_load_is_what_one_loads(tmp_path: Path):
    """Tied and untied, several files, fused experts, scaled embeddings, transposed weights, names
    without the prefix, a tied weight stored twice, and files that are not safetensors; LoRA, drawn
    in every process, and DoRA, PiSSA and saved modules, which rank 0 makes; an adapter's folder."""
    saved(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))
    saved(tmp_path / "files", LlamaConfig(**SIZES), max_shard_size="20KB")
    saved(tmp_path / "qwen_moe", Qwen3MoeConfig(**SIZES, **EXPERTS))
    saved(tmp_path / "mixtral", MixtralConfig(**SIZES, num_local_experts=3))
    saved(tmp_path / "gemma", Gemma3TextConfig(**SIZES, head_dim=8))
    saved(tmp_path / "gpt2", GPT2Config(n_embd=32, n_layer=2, n_head=4, eos_token_id=1))
    bare = saved(tmp_path / "bare", LlamaConfig(**SIZES, tie_word_embeddings=True))
    stored_as(bare, lambda of: {key.removeprefix("model."): value for key, value in of.items()})
    twice = saved(tmp_path / "twice", LlamaConfig(**SIZES, tie_word_embeddings=True))
    stored_as(twice, lambda of: {**of, "lm_head.weight": of[EMBEDDINGS].clone()})
    other = saved(tmp_path / "other", LlamaConfig(**SIZES, tie_word_embeddings=True))
    stored_as(other, lambda of: {**of, "lm_head.weight": of[EMBEDDINGS] + 1})
    pickle(saved(tmp_path / "pickled", LlamaConfig(**SIZES)))
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert len(names) == 10
    cases = [*((name, {}) for name in names), *adapters(tmp_path)]
    in_processes(2, tmp_path, lambda world: each_case(world, tmp_path, cases))


def test_so_do_replicas_of_two_shards_each(tmp_path: Path):
    saved(tmp_path / "qwen_moe", Qwen3MoeConfig(**SIZES, **EXPERTS))
    pickle(saved(tmp_path / "pickled", LlamaConfig(**SIZES)))
    saved(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))
    cases = [("qwen_moe", {}), ("pickled", {}), *adapters(tmp_path)[:1]]
    in_processes(4, tmp_path, lambda world: each_case(world, tmp_path, cases))


def test_memory_of_a_process_and_errors(tmp_path: Path):
    """A process allocates its shards and no more than one tensor beside them; what a model lacks
    is named as in one process."""
    saved(tmp_path / "layers", LlamaConfig(**SIZES | {"num_hidden_layers": 8}))
    saved(tmp_path / "experts", Qwen3MoeConfig(**SIZES, **EXPERTS | {"num_experts": 4}))
    missing = saved(tmp_path / "missing", LlamaConfig(**SIZES))
    stored_as(missing, lambda of: {k: v for k, v in of.items() if k != "model.norm.weight"})
    with pytest.raises(UserError, match=r"holds no model\.norm\.weight") as alone:
        load(missing, World())
    config = saved(tmp_path / "quantised", LlamaConfig(**SIZES)) / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    )
    message = str(alone.value)
    in_processes(2, tmp_path, lambda world: measure_and_refuse(world, tmp_path, message))


def pickle(folder: Path) -> None:
    """Store the model's tensors as torch.save does, not as safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapters(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Cases of new adapters on model "tied", and of one that is continued."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(folder / "tied")
    continued = lora(target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, continued).save_pretrained(folder / "adapter")
    new = [
        lora(target_modules=["q_proj", "down_proj"], r=4, task_type="CAUSAL_LM"),
        lora(target_modules=["v_proj"], use_dora=True),
        lora(target_modules=["v_proj"], init_lora_weights="pissa"),
        lora(target_modules=["v_proj"], modules_to_save=["norm"]),
    ]
    cases = [("tied", {"peft_config": config, "bf16": config.r == 4}) for config in new]
    return [*cases, ("adapter", {})]
