"""Samples and references reach rewards, tables and evaluations as the same kind of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_fast import GRAOConfig, evaluate, train
from grao_fast.system.lines import read_lines

ROWS = [{"prompt": "2+2=", "reference": "<think>easy</think>4 . <eos>"}]


@pytest.fixture
def thinking(tmp_path: Path):
    """A model that writes <think>, a blank, a dot and EOS, and its tokenizer."""
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tokenizer.clean_up_tokenization_spaces = True
    # a padding token of which the model has no embedding
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=False)
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<pad of the tokenizer>"})
    head = torch.nn.Linear(64, len(tokenizer) - 1, bias=True)
    torch.nn.init.normal_(head.weight, std=1e-3)
    with torch.no_grad():
        head.bias.fill_(-20.0)
        head.bias[tokenizer.convert_tokens_to_ids(["<think>", " ", ".", "<eos>"])] = 3.0
    model.lm_head = head
    return model, tokenizer


def config(**options) -> GRAOConfig:
    return GRAOConfig(
        num_generations=4,
        max_new_tokens=6,
        prompts_per_step=1,
        max_steps=1,
        save_steps=0,
        log_completions_steps=1,
        disable_tqdm=True,
        device="cpu",
        **options,
    )


def test_rewards_and_tables_have_samples_and_references_alike(thinking, tmp_path: Path) -> None:
    model, tokenizer = thinking
    called = []

    def reward(completions, references):
        called.append((completions, references))
        return [float("<think>" in text) for text in completions]

    def run(name: str, **options) -> dict:
        train(model, ROWS * 2, reward, config=config(**options), tokenizer=tokenizer,
              output_dir=tmp_path / name)  # fmt: skip
        (row,) = read_lines(tmp_path / name / "completions.jsonl")
        completions, references = called.pop()
        assert completions == [*row["completions"], row["reference"]]
        assert references == [row["reference"]] * 5
        return row

    row = run("whole", seed=2)  # whose samples hold what is looked for
    assert row["reference"] == "<think>easy</think>4 . "
    assert row["reference_reward"] == 1.0
    assert any("<think>" in text for text in row["completions"])
    assert not any("<eos>" in text for text in row["completions"])
    assert any(" ." in text for text in row["completions"])  # no cleaning up of blanks
    cut = run("cut", max_reference_length=2)
    assert cut["reference"] == "<think>e"


def test_evaluation_scores_whole_references_as_it_does_completions(thinking) -> None:
    model, tokenizer = thinking
    result = evaluate(
        model,
        [*ROWS, {**ROWS[0], "prompt": "longer: 2+2="}],  # so that the first one is padded
        lambda completions: [float(text.endswith("<eos>")) for text in completions],
        config=GRAOConfig(max_new_tokens=3, device="cpu"),
        tokenizer=tokenizer,
    )
    row, _ = result.rows
    assert row["reference"] == "<think>easy</think>4 . " and row["reference_reward"] == 0.0


@pytest.mark.parametrize("run", [train, evaluate])
def test_a_template_refuses_before_the_model_is_loaded(run, tiny_model, monkeypatch, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('only the system may speak') }}"
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded the model")
    )
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "reference": "ho"}]
    with pytest.raises(ValueError, match=r"example 0 of 1: the chat .* only the system may speak"):
        run(
            str(tiny_model),
            rows,
            lambda completions: [0.0] * len(completions),
            config=config() if run is train else None,
            tokenizer=tokenizer,
            output_dir=tmp_path,
        )
