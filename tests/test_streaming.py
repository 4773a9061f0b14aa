"""Streaming datasets: their own order, epoch after epoch, and the same after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict
from test_trainer import CONFIG, ROWS, rarely_equal, run, same_bits
from tiny import CHAT_TEMPLATE, character_tokenizer

import grao_fast
from grao_fast.callbacks import Callback
from grao_fast.data import streaming
from grao_fast.data.encoding import Limits
from grao_fast.data.examples import load_examples
from grao_fast.data.fingerprint import fingerprint
from grao_fast.data.streaming import StreamedPrompts, draw_prompts, open_dataset

LETTERS = "abcdefghij"


def stream(*, shuffled: bool = False, letters: str = LETTERS) -> IterableDataset:
    """Prompts of 1 to 10 letters, in two shards."""
    rows = [{"prompt": letter * (n + 1), "reference": "x"} for n, letter in enumerate(letters)]
    dataset = Dataset.from_list(rows).to_iterable_dataset(num_shards=2)
    return dataset.shuffle(seed=7, buffer_size=4) if shuffled else dataset


def prompts(dataset: Any, **limits: int) -> StreamedPrompts:
    tokenizer = character_tokenizer(chat_template=CHAT_TEMPLATE)
    drawn = draw_prompts(open_dataset(dataset), tokenizer, Limits(max_new_tokens=4, **limits))
    assert isinstance(drawn, StreamedPrompts)
    drawn.kept = 3
    return drawn


def texts(drawn: StreamedPrompts, places: range) -> list[Any]:
    return [drawn[place].example.prompt for place in places]


def test_epochs_follow_each_other_without_prompts_that_are_too_long() -> None:
    drawn = prompts(stream(), max_prompt_length=4)
    assert texts(drawn, range(10)) == ["a", "bb", "ccc", "dddd"] * 2 + ["a", "bb"]
    assert drawn[7:10] == [drawn[7], drawn[8], drawn[9]]
    assert (drawn.lengths.prompt, drawn.lengths.reference) == (4, 2)
    with pytest.raises(AssertionError, match="prompt 6 has passed: those from 7 on"):
        drawn[6]
    with pytest.raises(TypeError, match="no length"):
        len(drawn)
    epochs = texts(prompts(stream(shuffled=True)), range(20))
    assert sorted(epochs[:10]) == sorted(epochs[10:]) and epochs[:10] != epochs[10:]
    with pytest.raises(ValueError, match="no prompt of the streaming dataset is short enough"):
        prompts(stream().skip(3), max_prompt_length=1)[0]


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_place_can_be_gone_on_from(shuffled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_MARK", 4)
    expected = texts(prompts(stream(shuffled=shuffled), max_prompt_length=8), range(30))
    drawn = prompts(stream(shuffled=shuffled), max_prompt_length=8)
    assert drawn.state(0) is None
    for place in range(1, 26):
        assert drawn[place + 1].example.prompt == expected[place + 1]  # one ahead
        state = json.loads(json.dumps(drawn.state(place)))
        assert place - 4 < state["place"] <= place
        again = prompts(stream(shuffled=shuffled), max_prompt_length=8)
        again.load(state)
        assert again.state(place) == state
        assert (state["dataset"] is None) == shuffled
        assert texts(again, range(place, place + 4)) == expected[place : place + 4]
    other = prompts(stream(letters=LETTERS[::-1]), max_prompt_length=8)
    with pytest.raises(ValueError, match=r"gives another row \d+ in epoch 2 than the run had"):
        other.load(state)


class _Stop(Callback):
    def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
        return step == 3


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_resumed_run_goes_on_reading(tiny_model: Path, tmp_path: Path, shuffled: bool) -> None:
    def source() -> IterableDataset:
        dataset = Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2)
        return dataset.shuffle(seed=1, buffer_size=3) if shuffled else dataset

    config = CONFIG.replace(max_steps=5, save_steps=5)
    run(tiny_model, tmp_path / "whole", dataset=source(), config=config)
    halves = {"dataset": IterableDatasetDict({"train": source()}), "config": config}
    run(tiny_model, tmp_path / "halves", callbacks=[_Stop()], **halves)
    run(tiny_model, tmp_path / "halves", resume_from_checkpoint=True, **halves)
    assert same_bits(tmp_path / "whole/final", tmp_path / "halves/final")
    state = json.loads((tmp_path / "halves/checkpoint-3/state.json").read_text())
    assert state["draws"]["stream"]["place"] <= 12 and state["prompts"] is None


def test_what_a_stream_cannot_do_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    epochs = CONFIG.replace(max_steps=-1)
    with pytest.raises(ValueError, match=r"has no length, .* set max_steps"):
        run(tiny_model, tmp_path, dataset=stream(), reward=rarely_equal, config=epochs)
    with pytest.raises(ValueError, match=r"has no length, .* set max_steps"):
        grao_fast.check(tiny_model, stream(), rarely_equal, config=epochs)
    with pytest.raises(ValueError, match=r"only the dataset that is trained on .*take\(200\)"):
        load_examples(stream())
    with pytest.raises(ValueError, match="no split 'train'; it has test"):
        open_dataset(IterableDatasetDict({"test": stream()}))
    with pytest.raises(ValueError, match="the streaming dataset is empty"):
        open_dataset(stream().take(0))
    with pytest.raises(ValueError, match="no reference answers"):
        open_dataset(stream().remove_columns("reference"), require_references=True)
    assert fingerprint(open_dataset(stream())) == fingerprint(open_dataset(stream()))
    other = fingerprint(open_dataset(stream(letters="abcd")))
    assert fingerprint(open_dataset(stream())) != other


def test_a_streamed_row_has_the_tools_of_its_own() -> None:
    """Arrow gives the tools of all rows the keys of each other's."""
    rows = [
        {
            "prompt": [{"role": "user", "content": name}],
            "reference": "b",
            "tools": [{"type": "function", "function": {"name": name, "parameters": {name: {}}}}],
        }
        for name in ("x", "y")
    ]
    dataset = Dataset.from_list(rows)
    whole = open_dataset(dataset, split="train")
    streamed = open_dataset(dataset.to_iterable_dataset(), split="train")
    read = [streamed.read(n, row) for n, row in enumerate(streamed.dataset)]
    assert list(streamed.head) == read == list(whole)
