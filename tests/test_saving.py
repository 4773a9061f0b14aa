"""That a model can be saved is known before it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from short_runs import CONFIG, run
from test_trainer import ROWS, same_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import grao_fast
from grao_fast.config import GRAOConfig
from grao_fast.models.saving import save_pretrained

TWO_STEPS = CONFIG.replace(max_steps=2, save_steps=1)

# What Transformers refuses to save, as published models have it.
INVALID: dict[str, dict[str, Any]] = {
    "sampling beside greedy decoding": {
        "do_sample": False,
        "temperature": 0.6,
        "top_p": 0.9,
    },
    "options of beam search without beams": {"num_beams": 1, "length_penalty": 2.0},
    "a negative token": {"pad_token_id": -1},
}


def generation_of(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "generation_config.json").read_text())
    return {name: value for name, value in facts.items() if not name.startswith("_")}


@pytest.mark.parametrize("options", INVALID.values(), ids=list(INVALID))
def test_a_generation_configuration_is_saved_as_it_stands(tiny_model, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    kept = model.generation_config
    for name, value in options.items():
        setattr(kept, name, value)
    save_pretrained(model, tmp_path)
    assert generation_of(tmp_path) == generation_of(tiny_model) | options
    assert model.generation_config is kept
    assert same_bits(tmp_path, tiny_model)


def test_a_model_with_an_invalid_one_trains_and_says_so(tiny_model, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.update(**INVALID["sampling beside greedy decoding"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    run(model, tmp_path, tokenizer=tokenizer, config=TWO_STEPS)
    for name in ("checkpoint-1", "checkpoint-2", "final"):
        assert generation_of(tmp_path / name)["temperature"] == 0.6
    said = [r.message for r in caplog.records if "generation_config.json" in r.message]
    assert len(said) == 1
    assert "`temperature`" in said[0]


def unsavable(tiny_model: Path, what: str) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    given = {"model": model, "tokenizer": tokenizer}
    if what == "config":
        model.config.temperature = 0.3
    elif what == "generation":
        model.generation_config.num_return_sequences = 3
    elif what == "tokenizer":
        tokenizer.init_kwargs["reader"] = object()
    elif what == "weights":
        layers = model.model.layers
        layers[0].self_attn.q_proj.weight = layers[1].self_attn.q_proj.weight
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        given["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj"])
        given["peft_config"].revision = object()
    return given


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("config", r"LlamaForCausalLM cannot be saved.*temperature"),
        ("generation", r"generation_config.*could not be loaded again.*num_return_sequences"),
        ("tokenizer", r"Tokenizer\w* cannot be saved"),
        ("weights", r"LlamaForCausalLM cannot be saved.*shared tensors"),
        ("adapter", r"PeftModel\w* cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_not_trained(tiny_model, tmp_path, what, named):
    asked = []

    def reward(prompts, completions):
        asked.append(completions)
        return [0.0] * len(completions)

    given = unsavable(tiny_model, what)
    with pytest.raises(ValueError, match=named) as refusal:
        grao_fast.train(dataset=ROWS, reward=reward, config=TWO_STEPS, output_dir=tmp_path, **given)
    assert "\n" not in str(refusal.value)
    assert asked == []
    assert list(tmp_path.iterdir()) == []


class Silent(GeneralTracker):
    name = "silent"
    requires_logging_directory = False
    main_process_only = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.open = (line for line in ())  # as a connection, it cannot be copied

    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass


def test_a_tracker_given_as_an_object_is_saved_by_name(tiny_model: Path, tmp_path: Path):
    config = TWO_STEPS.replace(report_to=[Silent()])
    run(tiny_model, tmp_path, config=config)
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["config"]["report_to"] == ["silent"]
    run(tiny_model, tmp_path, config=config.replace(max_steps=3), resume_from_checkpoint=True)


def test_options_are_plain_data():
    assert GRAOConfig(use_vllm=True, vllm_sync_dir=Path("/dev/shm")).vllm_sync_dir == "/dev/shm"
    numbers = GRAOConfig(bf16=np.bool_(True), reward_weights=[np.float32(1)])
    assert json.loads(json.dumps(numbers.to_dict()))["reward_weights"] == [1.0]
    with pytest.raises(ValueError, match="report_to takes trackers of accelerate, got 5"):
        GRAOConfig(report_to=[5])


def test_a_folder_of_a_model_is_no_output_dir(tiny_model: Path):
    before = weights(tiny_model)
    config = (tiny_model / "config.json").read_text()
    with pytest.raises(ValueError, match=r"holds a model \(model\.safetensors\)"):
        run(tiny_model, tiny_model)
    assert (tiny_model / "config.json").read_text() == config
    assert before.keys() == weights(tiny_model).keys()
