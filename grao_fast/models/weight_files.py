"""Reading parts of a model's tensors from safetensors files, by the names that the model has.

Transformers renames tensors of some model types as it loads them, and merges those of a mixture's
experts into one. Its own rules for the type are applied here to the part that is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

Part = tuple[slice, ...]

NONE_IF_ABSENT = {  # for `cached_file`
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


def safetensors_of(name: str, revision: str | None) -> list[str]:
    """Paths of the safetensors files of a folder or hub id; empty if there are none."""
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    file = cached_file(name, SAFE_WEIGHTS_NAME, **at, **NONE_IF_ABSENT)
    if file is not None:
        return [file]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **at, **NONE_IF_ABSENT)
    if index is None:
        return []
    files, _ = get_checkpoint_shard_files(name, index, **at)
    return files or []


@dataclass
class _Experts:
    """The tensors of a mixture's experts that are one tensor in the model.

    keys: of those tensors in the files, by the converter's pattern, in the order of the experts.
    """

    converter: WeightConverter
    keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class WeightFiles:
    """Safetensors files, open for reading until `close`.

    model: as `from_pretrained` returned it for these files, on any device, "meta" included; it has
        the rules by which its tensors are renamed and converted.
    """

    def __init__(self, paths: Iterable[str], model: PreTrainedModel) -> None:
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}  # by key
        for path in paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        self._model = model
        self._keys: dict[str, str] = {}  # by name in the model
        self._experts: dict[str, _Experts] = {}
        self._name_all(model)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the files hold a tensor of that name in the model and of that shape."""
        experts = self._experts.get(name)
        if experts is not None:  # `from_pretrained` has compared the other dimensions
            return all(len(keys) == shape[0] for keys in experts.keys.values())
        key = self._keys.get(name)
        return key is not None and tuple(self._files[key].get_slice(key).get_shape()) == shape

    def read(self, name: str, part: Part) -> Tensor:
        """Read a part of a tensor, one slice for each dimension."""
        if name in self._keys:
            return self._read(self._keys[name], part)
        experts = self._experts[name]
        converter = experts.converter
        merged: Any = {
            pattern: [self._read(key, ()) for key in keys[part[0]]]
            for pattern, keys in experts.keys.items()
        }
        for operation in converter.operations:
            merged = operation.convert(
                merged,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        (tensor,) = merged.values()
        return tensor[(slice(None), *part[1:])]

    def _read(self, key: str, part: Part) -> Tensor:
        file = self._files[key]
        return file.get_slice(key)[part] if part else file.get_tensor(key)

    def _name_all(self, model: PreTrainedModel) -> None:
        """Find the name in the model of every key, as Transformers' loader does."""
        rules: Any = getattr(model, "_weight_conversions", None) or ()
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        names = model.state_dict()
        for key in sorted(self._files, key=dot_natural_key):
            prefix = model.base_model_prefix
            name, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if name not in names and key in names:
                name, pattern = key, None
            if pattern is None:
                self._keys[name] = key
            elif _merges_experts(of_pattern[pattern]):
                experts = self._experts.setdefault(name, _Experts(of_pattern[pattern]))
                experts.keys[pattern].append(key)


def _merges_experts(converter: WeightConverter) -> bool:
    """Whether a converter does nothing but stack experts, each from whole tensors of its own."""
    first, *rest = converter.operations
    return (
        len(converter.target_patterns) == 1
        and isinstance(first, MergeModulelist)
        and first.dim == 0
        and all(isinstance(step, Concatenate) and step.dim != 0 for step in rest)
    )
