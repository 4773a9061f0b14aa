"""What a model and the state of PyTorch may be; and that a user's model is given back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import family_model
from tiny import sums
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import grao_fast
from grao_fast import GRAOConfig
from grao_fast.callbacks import Callback
from grao_fast.rewards import RewardError
from grao_fast.sampling.loading import load_policy

CONFIG = GRAOConfig(
    num_generations=3,
    max_new_tokens=6,
    prompts_per_step=2,
    max_steps=2,
    save_steps=0,
    learning_rate=1e-3,
    max_tokens_per_microbatch=2000,
    reference_advantage="signed",  # references have metrics in every step
    disable_tqdm=True,
    device="cpu",
)


def distinct(completions, **columns) -> list[float]:
    return [float(len(set(completion[0]["content"]))) for completion in completions]


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs of two steps, each in a folder of its own; their last metrics."""
    folders = (tmp_path_factory.mktemp("runs") / str(i) for i in count())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def run(model: nn.Module, **options: Any) -> dict[str, float]:
        arguments = {"reward": distinct, "config": CONFIG, "output_dir": next(folders)} | options
        return grao_fast.train(model, sums(4), tokenizer=tokenizer, **arguments).metrics

    return run


@pytest.fixture(scope="module")
def expected(train) -> dict[str, float]:
    """Of a run of a Llama, with nothing around it."""
    return untimed(train(family_model("Llama")))


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("time/")}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(tiny_model: Path, value: float):
    """Also in the row of a token that no check at the start reads."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
        model.model.norm.weight[0] = value
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' of LlamaForCa"):
        load_policy(model, config=CONFIG, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight'"):
        load_policy(model, config=CONFIG, tokenizer=tokenizer)


def test_logits_that_are_not_numbers_are_not_laid_to_the_layout(tiny_model: Path):
    """From finite parameters: a buffer is broken."""
    model = family_model("Llama")
    model.model.rotary_emb.inv_freq.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM gives logits .*: look at its buffers"):
        load_policy(model, config=CONFIG, tokenizer=AutoTokenizer.from_pretrained(tiny_model))


@pytest.mark.parametrize("where", ["scores", "adapter", "nowhere"])
def test_dropout_is_told_of(tiny_model: Path, where: str, caplog: pytest.LogCaptureFixture):
    model = family_model("Llama", attention_dropout=0.25 if where == "scores" else 0.0)
    adapter = None
    if where == "adapter":
        peft = pytest.importorskip("peft", reason="peft is not installed")
        adapter = peft.LoraConfig(target_modules="all-linear", lora_dropout=0.25)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for trained in (True, False):
        caplog.clear()
        load_policy(model, config=CONFIG, tokenizer=tokenizer, peft_config=adapter, trained=trained)
        said = ["has dropout (0.25)" in message for message in caplog.messages]
        assert sum(said) == (trained and where != "nowhere")
        adapter = None


def test_a_head_of_zeros_learns(train):
    """All tokens are equally likely at first, and every gradient below the head is 0."""
    model = family_model("Llama", tie_word_embeddings=False)
    nn.init.zeros_(model.lm_head.weight)
    metrics = train(model)
    assert metrics["sampling/logp_diff_max"] < 1e-5
    assert bool(model.lm_head.weight.detach().abs().max() > 0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("around", AROUND)
def test_the_state_of_torch_around_a_run_does_not_reach_it(train, expected, around: str):
    model = family_model("Llama")
    with AROUND[around]():
        metrics = untimed(train(model))
    assert metrics == expected


def test_a_compiled_model_is_taken_out_of_its_wrapper(train, expected):
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model = family_model("Llama")
    assert untimed(train(torch.compile(model, backend=refuse))) == expected
    model = family_model("Llama")
    model.compile(backend=refuse)
    assert untimed(train(model)) == expected
    assert model._compiled_call_impl is not None


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=77, d_model=16, d_kv=8, d_ff=16, num_layers=1)
    return transformers.T5ForConditionalGeneration(config)


def with_a_compiled_layer() -> nn.Module:
    """Its state_dict would hold `model.layers.1._orig_mod.` names, which load nowhere."""
    model = family_model("Llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


REFUSED = {
    "no head": (
        lambda: AutoModel.from_config(family_model("Llama").config),
        "LlamaModel has no language-model head: load it with AutoModelForCausalLM",
    ),
    "no model of Transformers": (
        lambda: nn.Linear(2, 2),
        "model is a Linear, not a causal language model of Transformers: load one with",
    ),
    "a wrapper": (
        lambda: nn.DataParallel(family_model("Llama")),
        "model is a DataParallel, .*: pass the LlamaForCausalLM inside it",
    ),
    "a compiled layer": (
        with_a_compiled_layer,
        r"model\.layers\.1 of LlamaForCausalLM is compiled",
    ),
    "an encoder": (t5, "T5ForConditionalGeneration has an encoder and a decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_causal_language_model_is_refused(train, case: str):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refusal:
        train(make())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["model", "base_model"])
@pytest.mark.parametrize(
    ("given", "what"),
    [(3, "int"), ({}, "dict"), (transformers.LlamaForCausalLM, "the class LlamaForCausalLM")],
    ids=str,
)
def test_what_is_neither_a_name_nor_a_model_is_refused(name: str, given: Any, what: str):
    models = {"model": "not read yet", "base_model": None, name: given}
    with pytest.raises(ValueError, match=f"^{name} must be a folder, .*, got {what}$"):
        grao_fast.evaluate(dataset=sums(2), reward=distinct, **models)


def test_a_model_without_values_is_refused(train):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(family_model("Llama").config)
    with pytest.raises(ValueError, match=r"parameters of LlamaForCausalLM have no values \(device"):
        train(model)


def test_parameters_made_in_inference_mode_are_refused(train):
    with torch.inference_mode():
        model = family_model("Llama")
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM were made inside torch\.inference_mode"
    ):
        train(model)


def test_callbacks_that_cannot_be_called_are_refused_at_once(train):
    class Mine(Callback):
        pass

    class Other:
        on_train_begin = on_step_end = on_save = None

    class Fewer(Callback):
        def on_step_end(self, step: int) -> None: ...  # type: ignore[override]

    for callbacks, message in (
        ([Mine], r"the class Mine: pass an instance, Mine\(\)"),
        (Mine(), "callbacks must be a list"),
        ([Other()], r"has no on_train_begin: derive its class from grao_fast\.callbacks\.Callback"),
        ([Fewer()], r"cannot be called as on_step_end\(step, metrics\): derive"),
        ([transformers.TrainerCallback()], r"cannot be called as on_train_begin\(policy, config\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train("not read yet", callbacks=callbacks)


@pytest.mark.parametrize("ids", [(4, 2), torch.tensor([4, 2]), [4, 2], 4, None], ids=str)
def test_end_of_sequence_tokens_may_be_listed_in_any_way(tiny_model: Path, ids: Any):
    """The tokenizer's own, 1, ends a completion as well."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = ids
    policy = load_policy(model, config=CONFIG, tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    several = not isinstance(ids, int) and ids is not None
    assert policy.eos_token_ids == ({1, 2, 4} if several else {1} if ids is None else {1, 4})


class Stop(Callback):
    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool | None:
        raise KeyboardInterrupt


def failing(completions, **columns) -> list[float]:
    raise RuntimeError


@pytest.mark.parametrize("where", ["reward", "callback", "backward", "nowhere"])
def test_a_users_model_is_given_back_as_it_was(train, where: str):
    """Mode, recomputation, attention and gradients, after any end of a run."""
    model = family_model("Llama").train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}

    def interrupt(gradient: torch.Tensor) -> None:
        if model.training:
            raise KeyboardInterrupt

    hook = model.model.embed_tokens.weight.register_hook(interrupt) if where == "backward" else None
    options = {"reward": failing} if where == "reward" else {}
    ends = RewardError if where == "reward" else KeyboardInterrupt
    with nullcontext() if where == "nowhere" else pytest.raises(ends):
        train(model, callbacks=[Stop()] if where == "callback" else (), **options)
    if hook:
        hook.remove()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_base_model_is_given_back_as_it_was(tiny_model: Path):
    model, base = family_model("Llama"), family_model("Llama").train()
    base.model.layers[0].eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    options = {"config": GRAOConfig(max_new_tokens=2, device="cpu"), "tokenizer": tokenizer}
    result = grao_fast.evaluate(model, sums(2), distinct, base_model=base, **options)
    assert result.nag == 0
    assert base.training and not base.model.layers[0].self_attn.training


def test_gradients_that_were_there_do_not_reach_the_first_step(train, expected):
    model = family_model("Llama")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert untimed(train(model)) == expected


INCOMPLETE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a cut file": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot load"),
    "an empty file": (lambda folder: os.truncate(folder / "model.safetensors", 0), "cannot load"),
    "a layer less": (
        lambda folder: change_config(folder, num_hidden_layers=3),
        r"holds no model\.layers\.2\.input_layernorm\.weight and 8 more",
    ),
    "other shapes": (
        lambda folder: change_config(folder, hidden_size=32),
        r"holds no model\.embed_tokens\.weight and \d+ more",
    ),
}


def change_config(folder: Path, **options: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_are_not_whole_are_refused_in_a_line(case, tiny_model, tmp_path):
    """Transformers draws at random what is not there, and says so in a table."""
    damage, message = INCOMPLETE[case]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_policy(folder, config=CONFIG)
    assert "\n" not in str(error.value)
