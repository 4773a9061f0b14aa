"""`JSONSchema`: completions that are JSON of a given form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from grao_fast.rewards.finding import RewardError
from grao_fast.rewards.named import NamedReward, check_column, texts_of
from grao_fast.system.digests import digest_rows
from grao_fast.system.errors import one_line
from grao_fast.system.optional import import_optional

_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


class JSONSchema(NamedReward):
    """1 where a completion is JSON that a JSON schema accepts, else 0.

    The JSON is the whole completion, or the one block between ``` fences that it holds. NaN and
    Infinity are not JSON. References ($ref) are followed within the schema; nothing is downloaded.
    Needs jsonschema: `pip install "grao-fast[rules]"`.

    Args:
        schema: a JSON schema, or the path of a file with one. True accepts all JSON.
        column: of the dataset, with a schema for each row, as data or as JSON text; None in a row:
            no reward. Give either this or `schema`.
        name: in metrics.

    Raises:
        RewardError: the schema is not valid, or there is none, or two.
        UserError: jsonschema is not installed.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | str | Path | None = None,
        *,
        column: str | None = None,
        name: str = "json_schema",
    ) -> None:
        if (schema is None) == (column is None):
            raise RewardError("JSONSchema needs a schema or the column that holds them: give one")
        self._library = import_optional("jsonschema", extra="rules", option="JSONSchema")
        self._referencing = import_optional("referencing", extra="rules", option="JSONSchema")
        self._column = None if column is None else check_column(column)
        self._validators: dict[str, Any] = {}
        if isinstance(schema, (str, Path)):
            schema = _read(Path(schema).expanduser())
        self._schema = None if schema is None else self._validator(schema, "schema")
        settings = {"schema": None if schema is None else digest_rows([schema]), "column": column}
        takes = ["completions", *([] if column is None else [column])]
        super().__init__(name, takes=takes, settings=settings)

    def __call__(self, completions: Any, **columns: Any) -> list[float | None]:
        """Score completions."""
        texts = texts_of(completions)
        if self._column is None:
            validators = [self._schema] * len(texts)
        else:
            validators = [self._of_row(value) for value in columns[self._column]]
        return [
            None if validator is None else float(self._accepts(validator, text))
            for text, validator in zip(texts, validators, strict=True)
        ]

    def _of_row(self, value: Any) -> Any:
        """The validator of a row's schema, kept for the other completions of its prompt."""
        if value is None:
            return None
        key = value if isinstance(value, str) else digest_rows([value])
        if key not in self._validators:
            where = f"reward {self.__name__}: column {self._column!r}"
            schema = _loaded(value, where) if isinstance(value, str) else _without_none(value)
            self._validators[key] = self._validator(schema, where)
        return self._validators[key]

    def _validator(self, schema: Any, where: str) -> Any:
        if not isinstance(schema, (Mapping, bool)):
            raise RewardError(f"{where} must be a JSON schema, got a {type(schema).__name__}")
        kind = self._library.validators.validator_for(
            schema, default=self._library.Draft202012Validator
        )
        try:
            kind.check_schema(schema)
        except self._library.SchemaError as error:
            raise RewardError(f"{where} is not a valid JSON schema: {error.message}") from error
        return kind(schema, registry=self._referencing.Registry())

    def _accepts(self, validator: Any, text: str) -> bool:
        blocks = _FENCED.findall(text)
        try:
            data = _parsed(blocks[0] if len(blocks) == 1 else text)
            return validator.is_valid(data)
        except (ValueError, RecursionError):  # not JSON, or nested too deep
            return False
        except self._referencing.exceptions.Unresolvable as error:
            raise RewardError(
                f"reward {self.__name__}: the schema refers to what it does not hold: "
                f"{one_line(error)}"
            ) from error


def _parsed(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise json.JSONDecodeError(f"{constant} is not JSON", constant, 0)


def _loaded(text: str, where: str) -> Any:
    try:
        return _parsed(text)
    except ValueError as error:
        raise RewardError(f"{where} holds text that is not JSON: {one_line(error)}") from error


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(f"the schema {str(path)!r} cannot be read: {one_line(error)}") from error
    return _loaded(text, f"the schema {str(path)!r}")


def _without_none(schema: Any) -> Any:
    """A schema from a row without the keys of other rows, which Arrow fills with None."""
    if isinstance(schema, Mapping):
        return {key: _without_none(value) for key, value in schema.items() if value is not None}
    if isinstance(schema, (list, tuple)):
        return [_without_none(value) for value in schema]
    return schema
