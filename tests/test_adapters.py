"""Adapters as models: continued on their base, and never lost, doubled or half loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, sums
from transformers import AutoModelForCausalLM, AutoTokenizer

import grao_fast
from grao_fast.config import GRAOConfig
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = pytest.mark.usefixtures("unchecked")

CONFIG = GRAOConfig(
    num_generations=2,
    prompts_per_step=2,
    max_new_tokens=4,
    max_steps=1,
    save_steps=0,
    log_completions_steps=0,
    max_tokens_per_microbatch=2000,
    disable_tqdm=True,
    device="cpu",
)


def letters(prompts, completions):
    return [float(len(set(turns[0]["content"]))) for turns in completions]


def lora(**options):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", **options)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 20)[None]).logits


def adapted(base: Path, *, name: str = "default", **options):
    """A PeftModel that answers otherwise than its base."""
    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), lora(**options), adapter_name=name
    )
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter, and nothing else than peft saves; shared."""
    folder = tmp_path_factory.mktemp("adapters") / "sft"
    adapted(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "sft"))


def rewrite_config(folder: Path, **changed) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def trained_names(policy: LoadedPolicy) -> set[str]:
    return {name for name, p in policy.model.named_parameters() if p.requires_grad}


def test_an_adapters_folder_is_continued(adapter: Path, tiny_model: Path, tmp_path: Path):
    policy = load_policy(adapter, config=CONFIG)
    assert torch.equal(logits(policy.causal_lm), logits(adapted(tiny_model)))
    assert trained_names(policy) == {n for n, _ in policy.model.named_parameters() if "lora" in n}
    assert policy.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    result = grao_fast.train(
        adapter, sums(4), letters, config=CONFIG.replace(learning_rate=1e-2), output_dir=tmp_path
    )
    again = load_policy(tmp_path / "final", config=CONFIG)  # finds its base by itself
    assert torch.equal(logits(again.causal_lm), logits(result.model))
    assert not torch.equal(logits(again.causal_lm), logits(policy.causal_lm))


def test_an_adapter_answers_with_its_base(adapter: Path, tiny_model: Path):
    policy = load_policy(adapter, config=CONFIG, trained=False)
    assert torch.equal(logits(policy.causal_lm), logits(adapted(tiny_model)))
    assert trained_names(policy) == set()
    grao_fast.evaluate(adapter, sums(2), letters, base_model=tiny_model, config=CONFIG)


def test_an_adapter_with_a_name_of_its_own_is_found_below(tiny_model: Path, tmp_path: Path):
    model = adapted(tiny_model, name="policy")
    model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, config=CONFIG)
    assert list(policy.model.peft_config) == ["policy"]
    assert torch.equal(logits(policy.causal_lm), logits(model))
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"several adapters \(other, policy\): give the folder"):
        load_policy(tmp_path, config=CONFIG)
    assert list(load_policy(tmp_path / "other", config=CONFIG).model.peft_config) == ["default"]


def test_an_adapter_with_others_below_is_refused(tiny_model: Path, tmp_path: Path):
    """The one in the folder itself would be taken for all of it."""
    model = adapted(tiny_model)
    model.add_adapter("other", lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"several adapters \(default, other\).*PeftModel"):
        load_policy(tmp_path, config=CONFIG)


def test_checkpoints_below_an_adapter_are_not_taken_for_it(adapter: Path, tmp_path: Path):
    """TRL writes the adapter into the folder of its checkpoints, and we beside them."""
    below = Path(shutil.copytree(adapter, tmp_path / "run" / "checkpoint-1"))
    (below / "optimizer.pt").write_text("")
    with pytest.raises(ValueError, match=r"cannot load model .*run"):
        load_policy(tmp_path / "run", config=CONFIG)
    shutil.copytree(adapter, tmp_path / "run", dirs_exist_ok=True)
    assert list(load_policy(tmp_path / "run", config=CONFIG).model.peft_config) == ["default"]


def test_the_tokenizer_beside_an_adapter_goes_before_the_bases(copied: Path, tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(copied)
    assert load_policy(copied, config=CONFIG).tokenizer.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("how", ["folder", "PeftModel"])
def test_a_peft_config_for_an_adapter_is_refused(how: str, adapter: Path, tiny_model: Path):
    model = adapter if how == "folder" else adapted(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ValueError, match=r"leave peft_config out to continue .*merge it first"):
        load_policy(model, config=CONFIG, tokenizer=tokenizer, peft_config=lora())


@pytest.mark.parametrize("second", [None, "all-linear", ["v_proj"]])
def test_layers_that_an_earlier_adapter_left_are_refused(second, tiny_model: Path):
    """Whether a second adapter would go into the first one's layers or beside them."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    load_policy(model, config=CONFIG, peft_config=peft.LoraConfig(target_modules=["q_proj"]))
    config = second and peft.LoraConfig(target_modules=second)
    with pytest.raises(ValueError, match=r"still holds the layers of an adapter.*result\.model"):
        load_policy(model, config=CONFIG, peft_config=config)


def test_a_peft_model_whose_adapter_was_unloaded_is_a_model_again(tiny_model: Path):
    model = adapted(tiny_model)
    base = model.unload()
    assert load_policy(base, config=CONFIG, peft_config=lora()).model is not model


def test_an_adapter_that_transformers_loaded_is_refused(adapter: Path):
    model = AutoModelForCausalLM.from_pretrained(adapter)  # the base, with the adapter inside
    with pytest.raises(ValueError, match="still holds the layers of an adapter"):
        load_policy(model, config=CONFIG)
    load_policy(model, config=CONFIG, trained=False)


def test_an_adapter_within_an_adapter_is_refused(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.warns(UserWarning, match="second time"):
        model = peft.get_peft_model(adapted(tiny_model), lora())
    with pytest.raises(ValueError, match="adapter within an adapter"):
        load_policy(model, config=CONFIG, tokenizer=tokenizer)


def test_an_adapter_loaded_for_inference_is_refused(adapter: Path, tiny_model: Path):
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), adapter
    )
    with pytest.raises(ValueError, match="is_trainable=True"):
        load_policy(model, config=CONFIG)
    load_policy(model, config=CONFIG, trained=False)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not say which base model it is of"),
        ("", "does not say which base model it is of"),
        ("/no/such/base", r"of base model '/no/such/base', which does not exist"),
    ],
)
def test_a_base_that_is_not_there_is_named(base: str | None, message: str, copied: Path):
    rewrite_config(copied, base_model_name_or_path=base)
    with pytest.raises(ValueError, match=message):
        load_policy(copied, config=CONFIG)


def test_an_adapter_whose_file_is_cut_is_refused_in_a_line(copied: Path):
    os.truncate(copied / "adapter_model.safetensors", 300)
    with pytest.raises(ValueError, match=r"cannot put adapter .* on base model") as error:
        load_policy(copied, config=CONFIG)
    assert "\n" not in str(error.value)


def test_an_adapter_of_an_adapter_is_refused(adapter: Path, copied: Path):
    """Transformers would load the inner one by itself, and its layers would be trained."""
    rewrite_config(copied, base_model_name_or_path=str(adapter))
    with pytest.raises(ValueError, match="which is itself an adapter: merge that one first"):
        load_policy(copied, config=CONFIG)


def test_a_folder_of_model_and_adapter_is_refused(copied: Path):
    save_tiny_model(copied)
    with pytest.raises(ValueError, match=r"weights of a model and adapter_config\.json"):
        load_policy(copied, config=CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"does not fit base .*lacks .*lora_A"),
        ("unexpected", r"does not fit base .*has no place for .*up_down"),
        ("rank", r"cannot put adapter .* on base .*size mismatch"),
        ("target", r"cannot put adapter .* on base .*no_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_key(change: str, message: str, copied: Path):
    file = copied / "adapter_model.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights[min(weights)]
    elif change == "unexpected":
        weights[min(weights).replace("down_proj", "up_down")] = torch.ones(1)
    elif change == "rank":
        rewrite_config(copied, r=3)
    else:
        rewrite_config(copied, target_modules=["no_proj"])
    save_file(weights, file)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(copied, config=CONFIG)
    assert "\n" not in str(error.value)


def test_code_that_a_model_brings_is_not_run(tiny_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    path.write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="pass both"):
        load_policy(folder, config=CONFIG)


def test_a_base_taken_apart_at_random_is_refused(adapter: Path, copied: Path, tiny_model: Path):
    """The saved adapter would be put on a base that is another one each time it is loaded."""
    random = lora(init_lora_weights="pissa_niter_4")
    with pytest.raises(ValueError, match="use 'pissa', which is deterministic"):
        load_policy(tiny_model, config=CONFIG, peft_config=random)
    rewrite_config(copied, init_lora_weights="pissa_niter_4", base_model_name_or_path="nowhere")
    with pytest.raises(ValueError, match=r"adapter .*path_initial_model_for_weight_conversion"):
        load_policy(copied, config=CONFIG, trained=False)  # before its base is looked for


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoraConfig(task_type="SEQ_CLS", r=2), "task_type is SEQ_CLS, and must be CAUSAL_LM"),
        ({"r": 2}, "must be a configuration of peft, such as LoraConfig, got dict"),
        ([peft.LoraConfig(r=2)], "such as LoraConfig, got list"),
        (peft.LoraConfig, "such as LoraConfig, got type"),
    ],
)
def test_another_adapter_than_of_a_language_model_is_refused(config, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        load_policy(tiny_model, config=CONFIG, peft_config=config)


def test_an_adapter_that_prepends_tokens_is_refused_before_its_base_is_loaded(copied: Path):
    peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path="nowhere"
    ).save_pretrained(copied)
    with pytest.raises(ValueError, match="PromptTuningConfig prepends virtual tokens"):
        load_policy(copied, config=CONFIG)


def test_a_quantised_base_stays_where_it_is(tiny_model: Path, monkeypatch):
    """Transformers raises where a model that bitsandbytes has quantised is moved."""
    from transformers.utils.quantization_config import QuantizationMethod

    def refuse(*args, **options):
        raise ValueError("`.to` is not supported for this model")

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setattr(model, "to", refuse)
    with pytest.raises(ValueError, match="not supported"):
        load_policy(model, config=CONFIG, trained=False)
    monkeypatch.setattr(
        model, "quantization_method", QuantizationMethod.BITS_AND_BYTES, raising=False
    )
    load_policy(model, config=CONFIG, trained=False)


@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens"]])
def test_a_base_to_which_tokens_were_added_is_as_large_again(modules_to_save, tiny_model, tmp_path):
    """peft saves the embeddings with the adapter, and could not load them into fewer rows."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.resize_token_embeddings(90)
    model = peft.get_peft_model(base, lora(modules_to_save=modules_to_save))
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        model.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, config=CONFIG)
    assert torch.equal(logits(policy.causal_lm), logits(model))


def test_added_tokens_without_their_head_are_refused(tiny_model: Path, tmp_path: Path):
    save_tiny_model(tmp_path / "base")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "base").config
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(90)
    adapter = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
        peft.get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="90 rows, and it holds no head of as many"):
        load_policy(tmp_path / "adapter", config=CONFIG)
