"""A checkpoint is taken by the run that it belongs to, and refused, in one line, by any other."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_trainer import CONFIG, ROWS, rarely_equal, same_bits
from test_trainer import run as run_with
from tiny import CHAT_TEMPLATE, sums
from transformers import AutoModelForCausalLM, AutoTokenizer

import grao_fast
from grao_fast.distributed.folders import write_folder
from grao_fast.distributed.world import World
from grao_fast.models.adapters import load_adapters
from grao_fast.sampling.loading import load_policy
from grao_fast.training.checkpoint import CheckpointError, read_state
from grao_fast.training.weights import load_weights

pytestmark = pytest.mark.usefixtures("unchecked")

SHORT = CONFIG.replace(max_steps=2, save_steps=1, num_generations=2, max_new_tokens=4)
LONGER = SHORT.replace(max_steps=3)


def run(model, output: Path, **options):
    """`train` with a reward for which no step is without a gradient."""
    return run_with(model, output, **{"reward": rarely_equal} | options)


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["gate_proj", "q_proj"]} | options)


def shorter(prompts, completions):
    return [-float(len(text)) for text in completions]


def loaded(folder: Path, seed: int | None = None) -> dict:
    """Model and tokenizer in memory; with a seed, of other weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if seed is not None:
        torch.manual_seed(seed)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data[3, 4] += 0.01  # one element is enough
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all parameters; shared, so only to be refused."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(tiny_model, output, config=SHORT)
    return output


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter; shared, so only to be refused."""
    output = tmp_path_factory.mktemp("runs") / "adapted"
    run(tiny_model, output, config=SHORT, peft_config=lora(lora_alpha=4))
    return output


def refused(message: str, output: Path, model, **options) -> None:
    """Resuming is refused in one line, and nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=message) as error:
        options = {"config": LONGER} | options
        if not isinstance(model, Path):
            options |= {"tokenizer": model["tokenizer"]} if "tokenizer" not in options else {}
            model = model["model"]
        run(model, output, resume_from_checkpoint=True, **options)
    assert "\n" not in str(error.value)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


def test_another_base_model_of_the_same_shape(tiny_model: Path, whole: Path, adapted: Path):
    other = loaded(tiny_model, seed=1)
    refused(r"the model that training began with was .*tiny .*digest \w+\), and is", whole, other)
    other = loaded(tiny_model, seed=1)
    refused("the base model was", adapted, other, peft_config=lora(lora_alpha=4))


def test_another_size_or_vocabulary(tiny_model: Path, whole: Path, adapted: Path):
    def larger():
        model = loaded(tiny_model)
        model["model"].resize_token_embeddings(99)
        return model

    wide = r"embed_tokens.weight, was float32 \(77, 64\), and is float32 \(99, 64\)"
    refused(wide, whole, larger())
    wide = "configuration was vocab_size=77, and is vocab_size=99"
    refused(wide, adapted, larger(), peft_config=lora(lora_alpha=4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_alpha": 8}, "adapter 'default' was lora_alpha=4, and is lora_alpha=8"),
        ({"r": 3}, "adapter 'default' was r=2, and is r=3"),
        ({"use_rslora": True}, "was use_rslora=False, and is use_rslora=True"),
        ({"use_dora": True}, "was use_dora=False, and is use_dora=True"),
        ({"lora_bias": True}, "was lora_bias=False, and is lora_bias=True"),
        ({"alpha_pattern": {"q_proj": 1}}, "was alpha_pattern={}, and is .*'q_proj': 1"),
        ({"rank_pattern": {"q_proj": 1}}, "was rank_pattern={}, and is .*'q_proj': 1"),
        # of equal sizes: only the names of what is trained tell them apart
        (
            {"target_modules": ["up_proj", "q_proj"]},
            r"was with .*gate_proj\S+ and 3 more, and is with .*up_proj\S+ and 3 more here",
        ),
        ({"modules_to_save": ["norm"]}, r"was without, and is with \S+norm\S+ and 4 more"),
        (
            {"layers_to_transform": [0]},
            r"was with \S+\.1\.\S+ and 3 more, and is without",
        ),
    ],
)
def test_another_adapter(changed: dict, message: str, tiny_model: Path, adapted: Path):
    adapter = lora(**{"lora_alpha": 4} | changed)
    refused(message, adapted, tiny_model, peft_config=adapter)


def test_an_adapter_where_there_was_none_and_none_where_there_was(tiny_model, whole, adapted):
    is_lora = r"the adapter was none, and is 'default' \(LORA\)"
    refused(is_lora, whole, tiny_model, peft_config=lora())
    refused(r"the adapter was 'default' \(LORA\), and is none", adapted, tiny_model)


def test_other_frozen_layers(tiny_model: Path, whole: Path):
    model = loaded(tiny_model)
    model["model"].model.layers[0].requires_grad_(False)
    refused(r"was with \S*layers\.0\.\S+ and 8 more, and is without", whole, model)


def test_the_same_weights_computed_otherwise(tiny_model: Path, whole: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    refused("configuration was rms_norm_eps=1e-06, and is rms_norm_eps=0.5", whole, folder)


def test_another_chat_template(tiny_model: Path, whole: Path):
    model = loaded(tiny_model)
    model["tokenizer"].chat_template = CHAT_TEMPLATE + " "
    refused("the tokenizer, or its chat template,", whole, model)


def test_another_reward_or_shorter_run_is_refused_before_the_model_is_loaded(whole: Path):
    nowhere = whole / "no-model"
    refused("the reward was rarely_equal, and is shorter", whole, nowhere, reward=shorter)
    refused("the reward was rarely_equal, and is rarely_equal, shorter", whole, nowhere,
            reward=[rarely_equal, shorter])  # fmt: skip
    config = SHORT.replace(max_steps=1)
    refused("has done 2 steps, and this run has 1: raise max_steps", whole, nowhere, config=config)


def test_fewer_epochs_than_are_done(tiny_model: Path, whole: Path):
    config = SHORT.replace(max_steps=-1, num_train_epochs=0.1)
    refused(r"has done 2 steps, and this run has 1: .*num_train_epochs", whole, tiny_model,
            config=config)  # fmt: skip


def test_a_checkpoint_of_another_format(tiny_model: Path, whole: Path, tmp_path: Path):
    def fill(folder: Path) -> None:
        shutil.copytree(whole / "checkpoint-2", folder, dirs_exist_ok=True)
        state = {"step": 2, "data": "0123", "config": {}, "versions": {}}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "manifest.json").unlink()

    write_folder(tmp_path / "checkpoint-2", fill, World())
    refused("is of format 1, and this version", tmp_path, tiny_model)


def test_what_stays_the_same_may_look_otherwise(tiny_model: Path, whole: Path, tmp_path: Path):
    """The model elsewhere; rows with sets in another order; other dropout, batch and rate."""
    moved = Path(shutil.copytree(tiny_model, tmp_path / "elsewhere"))

    def rows(texts: str):
        return [row | {"set": set(texts), "object": object()} for row in ROWS]

    options = {"peft_config": lora(lora_dropout=0.1)}
    run(tiny_model, tmp_path / "run", config=SHORT, dataset=rows("abcdefgh"), **options)
    result = run(moved, tmp_path / "run", config=LONGER.replace(learning_rate=1e-4),
                 dataset=rows("hgfedcba"), peft_config=lora(lora_dropout=0.2),
                 resume_from_checkpoint=True)  # fmt: skip
    assert result.steps == 3


def test_a_model_that_came_as_far_by_itself_goes_on(tiny_model: Path, tmp_path: Path):
    """In a notebook: the same object again, which holds the checkpoint's weights by now."""
    model = loaded(tiny_model)
    options = {"tokenizer": model["tokenizer"], "config": SHORT}
    run(model["model"], tmp_path, **options)
    options["config"] = LONGER
    run(model["model"], tmp_path, **options, resume_from_checkpoint=True)
    assert not same_bits(tmp_path / "final", tiny_model)
    # from the first checkpoint no more: the object cannot say what the run began with
    kl = {"tokenizer": model["tokenizer"], "config": LONGER.replace(kl_coef=0.1, max_steps=4)}
    with pytest.raises(CheckpointError, match="the model that training began with"):
        run(model["model"], tmp_path, **kl, resume_from_checkpoint=True)


def test_a_template_that_writes_the_date_can_be_resumed(tiny_model, tmp_path, monkeypatch):
    """Also where tomorrow's prompts have more tokens than today's."""
    from transformers.utils import chat_template_utils

    def on(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 12, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    def go(steps: int, resume: bool):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.chat_template = "{{ strftime_now('%-d %B') }} " + CHAT_TEMPLATE
        return grao_fast.train(
            tiny_model, sums(4), lambda completions: [1.0] * len(completions), tokenizer=tokenizer,
            eval_dataset=sums(2), config=SHORT.replace(max_steps=steps), output_dir=tmp_path,
            resume_from_checkpoint=resume,
        )  # fmt: skip

    on(9)
    go(1, resume=False)
    on(10)
    assert go(2, resume=True).after.nag is not None


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "value"])
@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_every_key_of_a_checkpoint_is_accounted_for(kind, change, tiny_model, request, tmp_path):
    folder = Path(shutil.copytree(request.getfixturevalue(kind) / "checkpoint-2", tmp_path / "c"))
    file = next(folder.glob("*model.safetensors"))
    weights = load_file(file)
    key = next(key for key in sorted(weights) if "q_proj" in key)
    if change == "missing":
        del weights[key]
    elif change == "unexpected":
        weights[key.replace("q_proj", "z_proj")] = weights[key].clone()
    elif change == "shape":
        weights[key] = torch.cat([weights[key], weights[key]])
    else:
        weights[key] = weights[key] + 1
    save_file(weights, file, metadata={"format": "pt"})
    adapter = lora(lora_alpha=4) if kind == "adapted" else None
    policy = load_policy(tiny_model, config=SHORT, peft_config=adapter)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    message = {
        "missing": "lacks .*q_proj",
        "unexpected": "has no place for .*z_proj",
        "shape": r"q_proj\S* (of|has) shape",
        "value": "differ from those",
    }[change]
    with pytest.raises(ValueError, match=message) as error:
        load_weights(policy, folder, read_state(folder))
    assert "\n" not in str(error.value)
    if change != "value":
        assert all(torch.equal(v, before[n]) for n, v in policy.model.state_dict().items())


def test_an_adapters_checkpoint_of_another_name_is_refused(adapted: Path, tiny_model: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = peft.get_peft_model(base, lora(), adapter_name="other")
    with pytest.raises(ValueError, match="cannot load adapter 'other'") as error:
        load_adapters(model, adapted / "checkpoint-2")
    assert "\n" not in str(error.value)


def test_a_named_adapter_is_resumed(tiny_model: Path, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def go(output: Path, config, **options):
        model = loaded(tiny_model)
        torch.manual_seed(0)
        named = peft.get_peft_model(model["model"], lora(), adapter_name="policy")
        return run(named, output, tokenizer=model["tokenizer"], config=config, **options)

    go(tmp_path, SHORT)
    before = load_file(tmp_path / "checkpoint-2/policy/adapter_model.safetensors")
    assert go(tmp_path, LONGER, resume_from_checkpoint=True).steps == 3
    after = load_file(tmp_path / "final/policy/adapter_model.safetensors")
    assert before.keys() == after.keys()
    # a step of at most the learning rate from where it was
    off = max(float((after[key] - before[key]).abs().max()) for key in before)
    assert 0 < off <= 1.01 * LONGER.learning_rate
