"""GRAOTrainer's checks of datasets, made before training, as far as rows can be read by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor

from grao_fast.data.columns import REFERENCE_COLUMNS
from grao_fast.integrations.trl.references import read_row, reference_column
from grao_fast.integrations.trl.rewards import REWARD_COLUMN, given_reward, refuse_unscored
from grao_fast.integrations.trl.turns import check_turns
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
    for name, dataset in _of_evaluation(eval_dataset).items():
        _check(name, dataset, needs_references=False, needs_prompts=not environment)


@visible_errors()
def check_rows_for_rewards(
    train_dataset: Any, eval_dataset: Any, needing: Mapping[str, Sequence[str]], *, tools: bool
) -> None:
    """Refuse references that no reward could score, and text that would have to call tools.

    needing: as in `refuse_unscored`.
    """
    for name, dataset in {"train_dataset": train_dataset, **_of_evaluation(eval_dataset)}.items():
        if not isinstance(dataset, (Dataset, IterableDataset)) or dataset.column_names is None:
            continue
        columns = dataset.column_names
        column = reference_column(columns)
        if needing and column is not None and REWARD_COLUMN not in columns:
            refuse_unscored(needing, f"the references of {name}")
        if not isinstance(dataset, Dataset):
            continue
        if tools and len(dataset):  # a column's rows are all text, or all messages
            check_is_messages(dataset[0].get("prompt"), f"{name}, row 0")
        if needing and column is not None:
            _check_given(name, dataset, column, needing)


def check_is_messages(prompt: Any, where: str) -> None:
    """Raise UserError for a prompt that is text, where the model has tools."""
    if isinstance(prompt, str):
        raise UserError(
            f"{where}: tools are called in messages, and `prompt` is text: give messages"
        )


def check_have_tokens(prompt_mask_BP: Tensor) -> None:
    """Raise UserError for a prompt without tokens, which nothing predicts a completion from."""
    without = (~prompt_mask_BP.bool().any(1)).nonzero()[:, 0].tolist()
    if without:
        raise UserError(
            f"row {without[0]} of the batch: the prompt has no tokens; leave the row out"
        )


def _check_given(
    name: str, dataset: Dataset, column: str, needing: Mapping[str, Sequence[str]]
) -> None:
    read = [each for each in ("prompt", column, REWARD_COLUMN) if each in dataset.column_names]
    for n, row in enumerate(dataset.select_columns(read)):
        if row[REWARD_COLUMN] is None and read_row(row, f"{name}, row {n}")[1] is not None:
            refuse_unscored(needing, f"the reference of {name}, row {n},")


def _of_evaluation(dataset: Any) -> dict[str, Any]:
    """Datasets for evaluation, one or several, by their names in messages."""
    if isinstance(dataset, Mapping):
        return {f"eval_dataset[{name!r}]": each for name, each in dataset.items()}
    return {"eval_dataset": dataset}


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
    read = [each for each in ("prompt", column, column and REWARD_COLUMN) if each in columns]
    if not isinstance(dataset, Dataset) or not read:
        return
    if len(dataset) == 0:
        raise UserError(f"{name} has no rows")
    rows = enumerate(dataset.select_columns(read))
    absent = sum(not _has_reference(row, f"{name}, row {n}") for n, row in rows)
    if absent == len(dataset) and needs_references:
        raise UserError(f"every row of {name} has a blank reference in `{column}`")
    if absent and column is not None:
        logger.warning(
            "%d of %d rows of %s have a blank reference in `%s`: they count as having none",
            absent, len(dataset), name, column,
        )  # fmt: skip


def _has_reference(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row has a reference; UserError if it cannot be trained on."""
    _, reference = read_row(row, where)
    check_turns(reference, f"{where}, `{reference_column(row)}`")
    given_reward(row, where)
    return reference is not None


def _columns_of(dataset: Any) -> list[str] | None:
    """The columns of a dataset; None if it is not one, or an empty stream."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return None  # which TRL refuses
    columns = dataset.column_names
    if columns is None:
        first = next(iter(dataset), None)
        columns = list(first) if isinstance(first, Mapping) else None
    return columns
