"""Where rows come from: files, folders, the hub, `datasets` objects and lists."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst", ".zip"}
# "org/name-2.5" is a hub id, "name.jsonl" a file: an extension starts with a letter.
_EXTENSION = re.compile(r"\.[A-Za-z]\w{0,7}$")


@dataclass(frozen=True)
class Rows:
    """A dataset's rows, its columns, and the name that errors call it by."""

    name: str
    columns: list[str]
    rows: Sequence[Mapping[str, Any]]


def read_rows(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]], *, split: str = "train"
) -> Rows:
    """Read all rows of a dataset into memory. Raises ValueError where there are none."""
    import datasets

    name, source = "the dataset", dataset
    if isinstance(dataset, (str, Path)):
        name = str(dataset)
        source = _load(name, split)
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, source))}")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        # with_format(None): rows as plain Python, whatever view the caller had set.
        rows = Rows(name, source.column_names, list(source.with_format(None).to_list()))
    elif isinstance(source, Sequence):
        for index, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {index} must be a dict, got {type(row).__name__}")
        rows = Rows(name, list(dict.fromkeys(key for row in source for key in row)), source)
    else:
        raise ValueError(
            "dataset must be a path, a hub id, a datasets.Dataset or a list of dicts; "
            f"got {type(source).__name__}"
        )
    if len(rows.rows) == 0:
        raise ValueError(f"{name} is empty: it has no rows")
    return rows


def _load(name: str, split: str) -> Any:
    import datasets
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.exceptions import DatasetsError

    path = Path(name).expanduser()
    exists = path.exists()
    if not exists and _looks_like_path(name):
        raise ValueError(f"dataset {name!r}: no such file or folder")
    try:
        if path.is_file():
            return datasets.load_dataset(_reader(path), data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))  # written by save_to_disk
        return datasets.load_dataset(str(path) if exists else name, split=split)
    except StopIteration as error:  # what the json reader says of a file without rows
        raise ValueError(f"{name} is empty: it has no rows") from error
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error.__cause__, SchemaInferenceError):  # the same, of datasets 4
            raise ValueError(f"{name} is empty: it has no rows") from error
        # OSError: unreadable files, and a hub that cannot be reached or does not know the id.
        cause = str(error.__cause__ or error).strip().split("\n")[0]
        kind = "" if exists else " (no such file; taken for a hub id)"
        raise ValueError(f"cannot load dataset {name!r}{kind}, split {split!r}: {cause}") from error


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_EXTENSION.search(name))


def _reader(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _READERS:
        raise ValueError(
            f"no reader for files called {path.name!r}; there is one for {', '.join(_READERS)}, "
            f"compressed or not"
        )
    return _READERS[suffixes[-1]]
