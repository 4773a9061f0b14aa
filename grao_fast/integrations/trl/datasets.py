"""GRAOTrainer's checks of datasets, made before TRL loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from grao_fast.data.columns import REFERENCE_COLUMNS
from grao_fast.integrations.trl.references import read_row, reference_column
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger, visible_errors

logger = get_logger(__name__)


@visible_errors()
def check_datasets(train_dataset: Any, eval_dataset: Any, *, environment: bool = False) -> None:
    """Refuse datasets without prompts or references, and rows that cannot be read.

    Evaluation data may lack references, and then evaluates samples alone. Rows without a reference
    are counted; of a stream only the first row is read.

    environment: whether environments give prompts, so that data may have none.
    """
    if train_dataset is None and environment:
        raise UserError(
            "train_dataset is left to the environment, which gives prompts and no references: pass "
            f"a dataset with {', '.join(REFERENCE_COLUMNS[:-1])} or {REFERENCE_COLUMNS[-1]}"
        )
    _check("train_dataset", train_dataset, needs_references=True, needs_prompts=not environment)
    several = isinstance(eval_dataset, Mapping)
    named = (
        {f"eval_dataset[{name!r}]": each for name, each in eval_dataset.items()}
        if several
        else {"eval_dataset": eval_dataset}
    )
    for name, dataset in named.items():
        _check(name, dataset, needs_references=False, needs_prompts=not environment)


def _check(name: str, dataset: Any, *, needs_references: bool, needs_prompts: bool) -> None:
    columns = _columns_of(dataset)
    if columns is None:
        return
    listed = ", ".join(columns)
    if "prompt" not in columns and needs_prompts:
        raise UserError(
            f"{name} has no column `prompt`: its columns are {listed}; "
            + (
                "map trl.extract_prompt over it, which takes the prompt out of `chosen`"
                if "chosen" in columns
                else "add the prompts, as text or messages"
            )
        )
    column = reference_column(columns)
    if column is None and needs_references:
        raise UserError(
            f"{name} has no reference answers: its columns are {listed}; add "
            f"{', '.join(REFERENCE_COLUMNS[:-1])} or {REFERENCE_COLUMNS[-1]}"
        )
    if column is None:
        logger.warning("%s has no reference answers: it evaluates samples alone", name)
        return
    if not isinstance(dataset, Dataset):
        return
    if len(dataset) == 0:
        raise UserError(f"{name} has no rows")
    read = [each for each in ("prompt", column) if each in columns]
    rows = enumerate(dataset.select_columns(read))
    absent = sum(read_row(row, f"{name}, row {n}")[1] is None for n, row in rows)
    if absent == len(dataset) and needs_references:
        raise UserError(f"every row of {name} has a blank reference in `{column}`")
    if absent:
        logger.warning(
            "%d of %d rows of %s have a blank reference in `%s`: they count as having none",
            absent, len(dataset), name, column,
        )  # fmt: skip


def _columns_of(dataset: Any) -> list[str] | None:
    """The columns of a dataset; None if it is not one, or an empty stream."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return None  # which TRL refuses
    columns = dataset.column_names
    if columns is None:
        first = next(iter(dataset), None)
        columns = list(first) if isinstance(first, Mapping) else None
    return columns
