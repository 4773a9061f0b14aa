"""Tensors and options of the pass as records, and their flat form as arguments of operators.

`torch.library` takes flat argument lists only. This is the one place that knows their order: a
record's `flat()` makes the list, `from_flat` reads it, and the schemas below declare it.

Shapes: T rows, D width, V vocabulary, C terms of the loss.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rows.contract import LogitConstants
from ..rows.forms import FormRows
from ..vocab_parallel import Shard

OPERANDS_SCHEMA = "Tensor hidden_TD, Tensor head_VD, Tensor? bias_V, Tensor target_T"
TERMS_SCHEMA = (
    "Tensor terms_CT, str? ratio, str? shaping, Tensor? constants_PT, Tensor? kl_coef_T, "
    "float low, float high, float importance_cap, bool kl_times_ratio"
)
OPTIONS_SCHEMA = (
    "float slope, float inner, float? cap, SymInt workspace_bytes, str backend, ScalarType dtype, "
    "bool entropy, bool top1, str? group_name, SymInt vocab_size, bool head_float32, bool[] wants"
)
_OPERANDS, _OPTIONS = (len(each.split(", ")) for each in (OPERANDS_SCHEMA, OPTIONS_SCHEMA))


class PassOptions(NamedTuple):
    """Options of the pass."""

    constants: LogitConstants
    workspace_bytes: int
    backend: str
    dtype: torch.dtype  # of the GEMMs' operands
    entropy: bool = False
    top1: bool = False
    shard: Shard | None = None  # set where head and bias are a shard of the vocabulary
    head_float32: bool = False  # keep the head's gradient in float32, for a sum that goes on
    wants: tuple[bool, bool, bool] = (False, False, False)  # gradients of hidden, head, bias

    def flat(self) -> tuple:
        """Arguments in the order of OPTIONS_SCHEMA."""
        return (
            *self.constants,
            self.workspace_bytes,
            self.backend,
            self.dtype,
            self.entropy,
            self.top1,
            *((None, 0) if self.shard is None else self.shard),
            self.head_float32,
            list(self.wants),
        )

    @classmethod
    def from_flat(cls, arguments: tuple) -> PassOptions:
        """Read the options at the end of an operator's arguments."""
        options = arguments[-_OPTIONS:]
        slope, inner, cap, *plain, group_name, vocab_size, head_float32, wants = options
        shard = None if group_name is None else Shard(group_name, vocab_size)
        return cls(LogitConstants(slope, inner, cap), *plain, shard, head_float32, tuple(wants))


class PassInputs(NamedTuple):
    """The pass's tensors.

    A row's weight is the sum of its C terms. `forms.kl_coef_R` is on the terms' device,
    `forms.constants_PR` on hidden's. `entropy_weight_T` enters the gradients, not the loss,
    and is no argument of an operator.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    bias_V: Tensor | None
    target_T: Tensor
    terms_CT: Tensor
    entropy_weight_T: Tensor | None = None
    forms: FormRows | None = None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tensors that may have gradients."""
        return self.hidden_TD, self.head_VD, self.bias_V

    def flat(self) -> tuple:
        """Arguments in the order of OPERANDS_SCHEMA and TERMS_SCHEMA."""
        forms = self.forms
        rows = (None, None, None, None, 0.0, 0.0, 0.0, False) if forms is None else forms
        return (*self.operands, self.target_T, self.terms_CT, *rows)

    @classmethod
    def from_flat(cls, arguments: tuple) -> PassInputs:
        """Read the inputs at the beginning of an operator's arguments."""
        operands = arguments[:_OPERANDS]
        terms_CT, ratio, *rows = arguments[_OPERANDS:-_OPTIONS]
        forms = None if ratio is None else FormRows(ratio, *rows)
        return cls(*operands, terms_CT, forms=forms)


def with_nones(gradients: list[Tensor | None], arguments: int) -> tuple[Tensor | None, ...]:
    """Backward's result: gradients of the first arguments, and None for the rest of them."""
    return *gradients, *[None] * (arguments - len(gradients))


def dtypes_of(operands: tuple[Any, ...]) -> list[torch.dtype | None]:
    return [None if each is None else each.dtype for each in operands]
