"""Rows are read, and prompts encoded, as they are drawn: the same as if all were read at once."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from test_trainer import CONFIG, ROWS, run, same_bits
from tiny import CHAT_TEMPLATE, character_tokenizer, write_jsonl

from grao_fast.data import fingerprint, prompts, sizes, sources
from grao_fast.data.encoding import Limits, encode_examples
from grao_fast.data.examples import load_examples, open_examples
from grao_fast.data.prompts import lengths_of, open_prompts
from grao_fast.data.sizes import column_sizes, text_size


def rows(number: int = 40) -> list[dict[str, Any]]:
    """Prompts of 6 to 18 letters, text and messages in turn, and references of up to 20."""
    return [
        {
            "prompt": [{"role": "user", "content": "ab" * (i % 7 + 3)}],
            "reference": "xy" * (i % 11),
            "answer": i,
        }
        for i in range(number)
    ]


def as_list(data: list[dict[str, Any]], folder: Path) -> Any:
    return data


def as_arrow(data: list[dict[str, Any]], folder: Path) -> Any:
    doubled = Dataset.from_list([*data[::-1], *data])
    return doubled.select(range(len(data), 2 * len(data)))  # with an index of rows


def as_file(data: list[dict[str, Any]], folder: Path) -> Any:
    return write_jsonl(folder / "rows.jsonl", data)


def as_shards(data: list[dict[str, Any]], folder: Path) -> Any:
    write_jsonl(folder / "train-0.jsonl", data[:15])
    write_jsonl(folder / "train-1.jsonl", data[15:])
    return folder


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four examples are a sample, two the largest, and a dataset of more than 30 is large."""
    monkeypatch.setattr(sizes, "_FEW", 4)
    monkeypatch.setattr(sizes, "_SAMPLE", 4)
    monkeypatch.setattr(sizes, "_LARGEST", 2)
    monkeypatch.setattr(sources, "_SOME", 4)
    monkeypatch.setattr(fingerprint, "_EXAMPLES", 30)
    monkeypatch.setattr(prompts, "_KEPT", 200)


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize("source", [as_list, as_arrow, as_file, as_shards])
def test_prompts_are_those_encoded_at_once(source: Callable, tmp_path: Path) -> None:
    tokenizer = character_tokenizer(chat_template=CHAT_TEMPLATE)
    dataset = source(rows(), tmp_path)
    # The template adds 18 characters: user: , its break, and assistant: .
    for limit in (None, 30, 26):
        limits = Limits(max_new_tokens=4, context_length=80, max_prompt_length=limit)
        whole = encode_examples(load_examples(dataset), tokenizer, limits)
        lazy = open_prompts(open_examples(dataset), tokenizer, limits)
        assert list(lazy) == whole == [lazy[place] for place in range(len(lazy))]
        assert lazy[-1] == whole[-1] and lazy[3:5] == whole[3:5]
        assert lengths_of(lazy, exact=True) == lengths_of(whole)
        assert lengths_of(lazy).prompt <= lengths_of(whole).prompt
        assert lazy._kept_tokens <= 200
    assert len(whole) < 40


@pytest.mark.usefixtures("small_sample")
def test_only_what_must_be_known_is_encoded_first(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grao_fast")
    data = rows(400)
    data[77]["prompt"][0]["content"] = "a" * 300
    tokenizer = character_tokenizer(chat_template=CHAT_TEMPLATE)
    limits = Limits(max_new_tokens=4, context_length=280)
    with pytest.raises(ValueError, match=r"example 77: a prompt of 318 tokens .*=276 to drop"):
        open_prompts(open_examples(data), tokenizer, limits)
    caplog.clear()
    limits = Limits(max_new_tokens=4, context_length=280, max_prompt_length=200)
    lazy = open_prompts(open_examples(data), tokenizer, limits)
    assert len(lazy) == 399
    (line,) = [text for text in caplog.messages if text.startswith("tokenising")]
    assert "of 400 examples" in line and int(line.split()[1]) <= 4 + 4
    assert "dropped 1 of 400 prompts" in caplog.text


@pytest.mark.usefixtures("small_sample")
def test_a_row_that_cannot_be_used_is_named_when_it_is_drawn(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(chat_template=CHAT_TEMPLATE)
    data = rows()
    data[7]["prompt"] = 5
    data[22] |= {"prompts": "x"}
    data[35]["prompt"][0]["role"] = "\ud800"
    path = write_jsonl(tmp_path / "rows.jsonl", data)
    with path.open("a") as file:
        file.write('{"prompt": "a", "refer\n\n{"prompt": "b"}\n')
    lazy = open_prompts(open_examples(path), tokenizer, Limits(max_new_tokens=4))
    for place, message in (
        (7, "row 7, `prompt` must be text or messages, got int"),
        (22, "row 22 has a column `prompts`"),
        (35, "row 35, `prompt`: character 0"),
        (40, "rows.jsonl, line 41 is not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            lazy[place]
    assert lazy[41].example.prompt == "b"
    path.write_text("")
    with pytest.raises(ValueError, match=r"rows\.jsonl has been written to since"):
        lazy[5]


@pytest.mark.usefixtures("small_sample")
def test_a_missing_reference_is_found_when_it_is_drawn() -> None:
    examples = open_examples([*rows(20), {"prompt": "a"}, *rows(20)])
    assert examples[20].reference is None
    examples.compared = True
    with pytest.raises(ValueError, match="no reference in row 20, which a pairwise reward"):
        examples[20]


def test_cells_of_several_lines_are_found_again(tmp_path: Path) -> None:
    path, cells = tmp_path / "rows.csv", ['a\nb "c", d', "e\u2028f", "", "\r\ng"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "reference"], lineterminator="\n\n")
        writer.writeheader()
        writer.writerows({"prompt": f"{n}\n", "reference": cell} for n, cell in enumerate(cells))
    examples = open_examples(path)
    assert [examples[place].prompt for place in (3, 0, 2, 1)] == ["3\n", "0\n", "2\n", "1\n"]
    assert [example.reference for example in examples] == [cells[0], cells[1], None, cells[3]]


@pytest.mark.usefixtures("small_sample")
def test_a_large_dataset_is_known_by_its_bytes(tmp_path: Path) -> None:
    for source in (as_list, as_arrow, as_file, as_shards):
        folder = tmp_path / source.__name__
        folder.mkdir()
        first = fingerprint.fingerprint(open_examples(source(rows(), folder)))
        assert fingerprint.fingerprint(open_examples(source(rows(), folder))) == first
        changed = rows()
        changed[21]["answer"] = 22
        assert fingerprint.fingerprint(open_examples(source(changed, folder))) != first
        few = open_examples(source(rows(30), folder))
        assert fingerprint.fingerprint(few) == fingerprint.fingerprint(load_examples(rows(30)))


VALUES = [
    None,
    {"a": "é", "b": [1.5, None], "c": {"d": "xyz"}},
    {"a": None, "b": [], "c": None},
    {"a": "long" * 9, "b": None, "c": {"d": ""}},
]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_sizes_of_columns_are_those_of_their_values(kind: pa.DataType) -> None:
    struct = pa.struct({"a": kind, "b": pa.list_(pa.float64()), "c": pa.struct({"d": kind})})
    lists = [VALUES, None, [], VALUES[2:], VALUES[:1]]
    column = pa.chunked_array([pa.array(lists[:2], pa.list_(struct))]).slice(1)
    column = pa.chunked_array([*column.chunks, pa.array(lists, pa.list_(struct))])
    sizes = column_sizes(column)
    assert sizes.tolist()[2:] == [0, 0, *sizes.tolist()[4:]]
    for size, value in zip(sizes, column.to_pylist(), strict=True):
        assert len("".join(texts(value)).encode()) <= size <= text_size(value)
    maps = pa.chunked_array([pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string()))])
    assert column_sizes(maps).tolist() == [text_size([("k", "v")]), 0]


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_a_run_draws_the_same_prompts_from_any_source(
    tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = CONFIG.replace(max_steps=3, save_steps=0)
    run(tiny_model, tmp_path / "whole", config=config)
    request.getfixturevalue("small_sample")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    run(tiny_model, tmp_path / "drawn", dataset=path, config=config)
    assert same_bits(tmp_path / "whole/final", tmp_path / "drawn/final")
    assert np.isfinite(json.loads((tmp_path / "drawn/metrics.jsonl").read_text().split("\n")[0])
                       ["loss"])  # fmt: skip
