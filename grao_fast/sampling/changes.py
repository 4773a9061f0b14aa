"""Changes of a policy's weights that a sampler must show, in all of them or in one part.

Every change is undone exactly: elements are negated, or tensors swapped with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from grao_fast.system.interruption import as_outside, held

HEAD = "head"

_STRIDE = 1021  # a prime: no row or column of a matrix is met more often than others
_AT_LEAST = 4  # elements negated in a small tensor
_DEVIATION = (
    0.02  # of drawn tensors; that of an adapter's second factors is 0 before the first step
)


class Change(Protocol):
    """A change of tensors that is undone on the way out."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All that it is of."""
        ...

    def of(self, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
        """The change in some of them; inside of it once more, they are what they were."""
        ...


class Negated:
    """Some elements of every tensor with the other sign.

    So few that the model remains much the same, and rounding in it with it; one in 1,021 moves the
    log-probs of SmolLM2-135M by 4 nats a token, one matrix alone by 0.01 to 1. A tensor of zeros
    stays as it is.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.is_floating_point()]

    @contextmanager
    def of(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        chosen = [_some(tensor) for tensor in tensors]

        def negate() -> None:
            for elements in chosen:
                elements.neg_()

        with _undone_by(negate):
            yield


def _some(tensor: Tensor) -> Tensor:
    """A view of elements spread over a dense tensor."""
    stride = max(1, min(_STRIDE, tensor.numel() // _AT_LEAST))
    return tensor.data.as_strided((-(-tensor.numel() // stride),), (stride,))


class Swapped:
    """Other tensors in their place, drawn once: for an adapter, half of which is 0 at first."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        draw = torch.Generator().manual_seed(0)
        self._others = {
            id(tensor): (_DEVIATION * torch.randn(tensor.shape, generator=draw)).to(tensor)
            for tensor in self.tensors
        }

    @contextmanager
    def of(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        chosen = list(tensors)
        with _undone_by(lambda: self._swap(chosen)):
            yield

    def _swap(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            own, other = tensor.data.clone(), self._others[id(tensor)]
            tensor.data.copy_(other)
            other.copy_(own)


@contextmanager
def _undone_by(change: Callable[[], None]) -> Iterator[None]:
    """Do a change that undoes itself, and do it once more on the way out.

    No signal comes in the midst of it: the tensors may be of a user's model.
    """
    with held():
        try:
            change()
            with as_outside():
                yield
        finally:
            change()


def parts(
    lm: nn.Module, change: Change, *, at_most: int
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Names of a model's parts, each with the context of the change in that part alone.

    The head, which may be tied to embeddings; layers, and neighbouring ones together where there
    are more than `at_most`; and what lies outside of them.
    """
    changed = {id(tensor) for tensor in change.tensors}
    if id(lm.get_output_embeddings().weight) in changed:
        yield HEAD, _head(lm, change)
    seen = {id(lm.get_output_embeddings().weight)}
    stacks = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    layers = list(max(stacks, key=len, default=nn.ModuleList()))
    together = max(1, -(-len(layers) // max(at_most - 2, 1)))
    for start in range(0, len(layers), together):
        chosen = layers[start : start + together]
        tensors = [p for layer in chosen for p in layer.parameters() if id(p) in changed]
        seen.update(map(id, tensors))
        last = start + len(chosen) - 1
        name = f"layer {start}" if start == last else f"layers {start} to {last}"
        if tensors:
            yield name, change.of(tensors)
    rest = [tensor for tensor in change.tensors if id(tensor) not in seen]
    if rest:
        yield "embeddings or norms outside the layers", change.of(rest)


@contextmanager
def _head(lm: nn.Module, change: Change) -> Iterator[None]:
    """The change in the head alone, for a copy that takes its place."""
    head = lm.get_output_embeddings()
    own = head.weight
    head.weight = nn.Parameter(own.detach().clone(), requires_grad=False)
    try:
        with change.of([head.weight]):
            yield
    finally:
        head.weight = own


def is_tied(lm: nn.Module) -> bool:
    """Whether the head's weight is the embeddings'."""
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
