"""Tests of reading JSON and CSV files: values are unchanged, and damage is reported by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from grao_fast import load_examples
from grao_fast.data.files import read_csv, read_json

TEXTS = [
    "2024-05-01", "2024-05-01T10:00:00", "12:30:00", "None", "NA", "null", "nan", "",
    "00501", "1e5", "True", "0x10", "1_000", " padded ", "a\nb", 'say "x", y', "é中\U0001f600",
]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "with a byte order mark"])
def test_text_stays_text(tmp_path: Path, name: str, mark: bytes) -> None:
    rows = [{"prompt": "a?", "reference": "b", "answer": text} for text in TEXTS]
    path = tmp_path / name
    with path.open("w", encoding="utf-8", newline="") as file:
        if name == "rows.csv":
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif name == "rows.json":
            json.dump(rows, file, indent=1)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(mark + path.read_bytes())
    for place in (path, tmp_path):  # a file, and the folder that contains it
        assert [example.columns["answer"] for example in load_examples(place)] == TEXTS


def test_json_values_keep_their_types_and_keys(tmp_path: Path) -> None:
    answers = [7, "7", 7.5, True, None, [1, "a"], {"x": 1}, {"y": {"when": "2024-05-01"}}, 2**70]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps({"answer": answer}) for answer in answers))
    read = [row["answer"] for row in read_json(str(path))]
    assert read == answers and list(map(type, read)) == list(map(type, answers))


def test_objects_over_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps({"a": n}, indent=2) for n in range(3)))
    assert list(read_json(str(path))) == [{"a": 0}, {"a": 1}, {"a": 2}]
    path.write_text(json.dumps({"version": 1, "data": [{"a": 0}]}))
    assert list(read_json(str(path), field="data")) == [{"a": 0}]
    with pytest.raises(ValueError, match="not one JSON object with the key `rows`"):
        read_json(str(path), field="rows")


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    cell = "x" * 200_000  # longer than the csv module's default limit
    path.write_bytes(f",prompt,answer\r\n0,a?,{cell}\r\n1,b?,\r\n".encode())
    limit = csv.field_size_limit()
    rows = list(read_csv(str(path)))
    assert rows == [{"prompt": "a?", "answer": cell}, {"prompt": "b?", "answer": ""}]
    assert csv.field_size_limit() == limit


def test_a_dataset_card_says_how_its_files_are_written(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  {}\n---\n"
    (tmp_path / "rows.csv").write_bytes("prompt;reference\nà?;01\n".encode("latin-1"))
    (tmp_path / "README.md").write_text(card.format("sep: ';'\n  encoding: latin-1"))
    (example,) = load_examples(tmp_path)
    assert (example.prompt, example.reference) == ("à?", "01")
    (tmp_path / "README.md").write_text(card.format("skiprows: 1"))
    with pytest.raises(ValueError, match=r"card sets skiprows=1.* datasets.load_dataset"):
        load_examples(tmp_path)


def pack(data: bytes, path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.jsonl", data)
    else:
        compress: Any = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress
        path.write_bytes(compress(data))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zip"])
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    pack(b'{"prompt": "a", "reference": "2024-05-01"}\n' * 400, path)
    examples = load_examples(path)
    assert len(examples) == 400 and examples[-1].reference == "2024-05-01"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"cannot read .*rows\.jsonl\{suffix}: "):
        load_examples(path)


def test_every_frame_of_a_zstandard_file_is_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    path = tmp_path / "rows.jsonl.zst"
    frames = [
        zstandard.ZstdCompressor().compress(b'{"prompt": "%d", "reference": "b"}\n' % n)
        for n in range(2)
    ]
    path.write_bytes(b"".join(frames))
    assert [example.prompt for example in load_examples(path)] == ["0", "1"]
    for damaged in (b"".join(frames)[:-3], frames[0] + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*rows\.jsonl\.zst: \w"):
            load_examples(path)


def test_zstandard_is_named_where_it_is_missing(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.zst: .*`pip install zstandard`"):
        load_examples(tmp_path / "rows.jsonl.zst")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 10**5, "line 2 or after: .* nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": ', "line 3 is not JSON: Expecting value .character 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x\n', "line 2 is not JSON: .* .character 9"),
        ("a.jsonl", b'{"a": ', "line 1 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', "line 2 must be a JSON object, got list"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}\n', "line 1 .* has the key `c` twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"line 2: byte 10 \(0xe9\) is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "line 1: byte 0 .* -f UTF-16"),
        ("a.json", b'[{"a": 1},\n {"a": 2},\n 3]', "row 2 must be a JSON object, got int"),
        ("a.json", b'[{"a": 1},\n {"a": 2,}]', "line 2 is not JSON"),
        ("a.csv", b"a,b\n1,2\n1\n", "line 3 has 1 cells, but the header has 2"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2 has 3 cells, but the header has 2"),
        ("a.csv", b'a,b\n1,"2\n3\n', "line 3 is not CSV: unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", "several columns called `a`"),
        ("a.csv", b"a,b\n1,caf\xe9\n", "line 2: byte 5 .* is not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_examples(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_an_archive_of_several_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.jsonl.zip", "w") as archive:
        archive.writestr("a.jsonl", "{}")
        archive.writestr("b.jsonl", "{}")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.zip holds 2 files: unpack it"):
        load_examples(tmp_path / "rows.jsonl.zip")
