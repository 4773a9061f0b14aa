"""Reads rows from a source: a file, a folder, the hub, a `datasets` object or a list."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grao_fast.data.files import COMPRESSIONS, read_csv, read_json
from grao_fast.data.rows import ArrowRows, ChainedRows, ListRows, Rows
from grao_fast.data.sizes import spread
from grao_fast.system.bars import no_dataset_bar, on_terminal
from grao_fast.system.errors import UserError, first_line
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from datasets import BuilderConfig, Dataset, DatasetBuilder

logger = get_logger(__name__)

_READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
# Formats that are read here, since `datasets` would turn text into dates, numbers and nulls.
_TEXT_READERS: dict[str, Callable[..., Rows]] = {"json": read_json, "csv": read_csv}
# Options in a dataset's card: their names as arguments of the readers, and those that do not
# concern the format.
_FORMAT_OPTIONS = {
    "encoding": "encoding",
    "field": "field",
    "sep": "delimiter",
    "delimiter": "delimiter",
}
_NOT_OF_THE_FORMAT = {"name", "version", "data_dir", "data_files", "description", "features"}
_SOME = 1000  # rows of a text file that tell its columns
# An extension starts with a letter: "name.jsonl" is a file, "org/name-2.5" is a hub id.
_EXTENSION = re.compile(r"\.[A-Za-z]\w{0,7}$")


@dataclass(frozen=True)
class SourceRows:
    """The rows of a dataset, its columns, and its name for errors."""

    name: str
    columns: list[str]
    rows: Rows


def read_rows(
    dataset: str | Path | Dataset | Sequence[Mapping[str, Any]], *, split: str = "train"
) -> SourceRows:
    """Open a dataset, whose rows are read when they are asked for. UserError if there are none.

    The columns of JSON files, whose rows may differ, are those of up to a thousand rows.
    """
    import datasets

    source: Any = dataset
    name = "the dataset"
    if isinstance(dataset, (str, Path)):
        name = str(dataset)
        source = _load(name, split)
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise UserError(f"{name} has no split {split!r}; it has {', '.join(map(str, source))}")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        columns, rows = source.column_names, ArrowRows(source)
    elif isinstance(source, Rows):
        some = source.take(spread(len(source), _SOME))
        columns, rows = list(dict.fromkeys(key for row in some for key in row)), source
    elif isinstance(source, Sequence):
        for index, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise UserError(f"row {index} must be a dict, got {type(row).__name__}")
        columns = list(dict.fromkeys(key for row in source for key in row))
        rows = ListRows(source)
    elif isinstance(source, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise UserError(
            "only the dataset that is trained on may be streaming: of one that is answered whole, "
            "pass rows, as list(dataset.take(200))"
        )
    else:
        raise UserError(
            "dataset must be a path, a hub id, a datasets.Dataset or a list of dicts, "
            f"got {type(source).__name__}"
        )
    if len(rows) == 0:
        raise UserError(f"{name} is empty: it has no rows")
    return SourceRows(name, columns, rows)


def _load(name: str, split: str) -> Any:
    import datasets

    path = Path(name).expanduser()
    exists = path.exists()
    if not exists and _looks_like_path(name):
        raise UserError(f"dataset {name!r}: no such file or folder")
    reader = _reader(path) if path.is_file() else ""
    if reader in _TEXT_READERS:
        return _TEXT_READERS[reader](str(path), name=name)
    with _loading(name, split, exists):
        if reader:
            return datasets.load_dataset(reader, data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))  # written by save_to_disk
        builder = datasets.load_dataset_builder(str(path) if exists else name)
        if builder.name == "cache":
            logger.warning(
                "%s is read from the cache of `datasets`, as the hub cannot be reached: if it was "
                "JSON or CSV, text that looks like a date or number may have become one", name,
            )  # fmt: skip
        if builder.name not in _TEXT_READERS:
            builder.download_and_prepare()
            return builder.as_dataset(split=split)
    return _read_text_files(builder, name, split)


@contextmanager
def _loading(name: str, split: str, exists: bool) -> Iterator[None]:
    """Raise the errors of `datasets` as a UserError of one line that names dataset and split."""
    from datasets.exceptions import DatasetsError

    try:
        with no_dataset_bar(unless=on_terminal()):
            yield
    except (DatasetsError, OSError, ValueError) as error:
        # OSError: a file cannot be read, or the hub cannot be reached or does not know the id
        cause = first_line(error.__cause__ or error)
        kind = "" if exists else " (no such file; taken for a hub id)"
        raise UserError(f"cannot load dataset {name!r}{kind}, split {split!r}: {cause}") from error


def _read_text_files(builder: DatasetBuilder, name: str, split: str) -> Rows:
    """Open the rows of a split that consists of JSON or CSV files, which `datasets` has located."""
    from datasets import DownloadManager

    splits = builder.config.data_files or {}
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(map(str, splits))}")
    options = _reader_options(builder.config)
    parts: list[Rows] = []
    for file in splits[split]:
        with _loading(name, split, exists=True):
            local = DownloadManager().download(file)
        parts.append(_TEXT_READERS[builder.name](local, name=file, **options))
    return parts[0] if len(parts) == 1 else ChainedRows(parts)


def _reader_options(config: BuilderConfig) -> dict[str, Any]:
    """The arguments for the reader that a dataset's card gives."""
    options: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_OF_THE_FORMAT or value == field.default:
            continue
        if field.name not in _FORMAT_OPTIONS:
            raise UserError(
                f"the dataset's card sets {field.name}={value!r}, which is not supported: load the "
                "dataset with datasets.load_dataset and pass the result"
            )
        options[_FORMAT_OPTIONS[field.name]] = value
    return options


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_EXTENSION.search(name))


def _reader(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _READERS:
        raise UserError(
            f"no reader for files called {path.name!r}: convert it to {', '.join(_READERS)}, "
            f"compressed or not"
        )
    return _READERS[suffixes[-1]]
