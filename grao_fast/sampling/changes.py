"""Temporary changes of a policy's weights, all or in part, to see whether a sampler has them.

Every change is undone exactly: elements are negated, or tensors are swapped. Of a sharded tensor
each process changes its part, so that the whole changes as it does in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grao_fast.models.sharding import local, reshard, slices_of
from grao_fast.system.interruption import as_outside, held

HEAD = "head"

_STRIDE = 1021  # a prime, so that no row or column of a matrix is favoured
_AT_LEAST = 4  # elements negated in a small tensor
_DEVIATION = 0.02  # of drawn tensors; an adapter's second factors are 0 before the first step


class Change(Protocol):
    """A change of tensors, undone when its context ends."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """All tensors that can be changed."""
        ...

    def of(self, tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
        """A context in which some of them are changed; nested in itself, it restores them."""
        ...


class Negated:
    """Negates some elements of every tensor.

    They are few, so that the model's rounding stays much the same. One in 1,021 moves the log-probs
    of SmolLM2-135M by 4 nats a token, those of one matrix alone by 0.01 to 1. A tensor of zeros
    does not change.
    """

    def __init__(self, lm: nn.Module) -> None:
        reshard(lm)
        self._lm = lm
        self.tensors = [tensor for tensor in lm.parameters() if tensor.is_floating_point()]

    @contextmanager
    def of(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        chosen = [_some(tensor) for tensor in tensors]

        def negate() -> None:
            reshard(self._lm)
            for elements in chosen:
                elements.neg_()

        with _undone_by(negate):
            yield


def _some(tensor: Tensor) -> Tensor:
    """A view of some elements, spread over a dense tensor; of a sharded one, those that are here.

    It is sharded by its first dimension, so that this process has consecutive elements.
    """
    stride = max(1, min(_STRIDE, tensor.numel() // _AT_LEAST))
    here = local(tensor.detach())
    if not here.numel():
        return here
    begins = slices_of(tensor)[0].start * (tensor.numel() // tensor.shape[0]) if tensor.dim() else 0
    first = -begins % stride
    count = max(0, -(-(here.numel() - first) // stride))
    return here.as_strided((count,), (stride,), here.storage_offset() + (first if count else 0))


class Swapped:
    """Swaps in tensors that are drawn once, for adapters, half of whose factors are 0 at first."""

    def __init__(self, model: nn.Module, belongs: Callable[[str], bool]) -> None:
        """belongs: whether the parameter of a name is one of the adapter."""
        reshard(model)
        self._model = model
        self.tensors = [p for name, p in model.named_parameters() if belongs(name)]
        draw = torch.Generator().manual_seed(0)
        self._others: dict[int, Tensor] = {}
        for tensor in self.tensors:
            drawn = _DEVIATION * torch.randn(tensor.shape, generator=draw)
            self._others[id(tensor)] = drawn[slices_of(tensor)].to(
                local(tensor.detach()), copy=True
            )

    @contextmanager
    def of(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        chosen = list(tensors)
        with _undone_by(lambda: self._swap(chosen)):
            yield

    def _swap(self, tensors: Iterable[Tensor]) -> None:
        reshard(self._model)
        for tensor in tensors:
            here, other = local(tensor.detach()), self._others[id(tensor)]
            own = here.clone()
            here.copy_(other)
            other.copy_(own)


@contextmanager
def _undone_by(change: Callable[[], None]) -> Iterator[None]:
    """Apply a self-inverse change, and apply it again when the block ends.

    Signals wait while it is applied, since the tensors may belong to a user's model.
    """
    with held():
        try:
            change()
            with as_outside():
                yield
        finally:
            change()


def parts(
    lm: PreTrainedModel, change: Change, *, at_most: int
) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """The parts of a model by name, each with a context that changes this part alone.

    Parts are the head, which may be tied to embeddings; the layers, neighbours joined so that there
    are at most `at_most` parts; and all parameters outside of these.
    """
    reshard(lm)
    changed = {id(tensor) for tensor in change.tensors}
    head = lm.get_output_embeddings()
    seen = {id(head.weight)}
    stacks = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    layers = list(max(stacks, key=len, default=nn.ModuleList()))
    together = max(1, -(-len(layers) // max(at_most - 2, 1)))
    found: list[tuple[str, AbstractContextManager[None]]] = []
    if id(head.weight) in changed:
        found.append((HEAD, _head(head)))
    for start in range(0, len(layers), together):
        chosen = layers[start : start + together]
        tensors = [p for layer in chosen for p in layer.parameters() if id(p) in changed]
        seen.update(map(id, tensors))
        last = start + len(chosen) - 1
        name = f"layer {start}" if start == last else f"layers {start} to {last}"
        if tensors:
            found.append((name, change.of(tensors)))
    rest = [tensor for tensor in change.tensors if id(tensor) not in seen]
    if rest:
        found.append(("embeddings or norms outside the layers", change.of(rest)))
    yield from found


@contextmanager
def _head(head: nn.Linear) -> Iterator[None]:
    """Compute with a head whose weight is changed as by `Negated`; the embeddings stay.

    The weight is whole only while the model computes.
    """

    def compute(head: nn.Linear, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weight_VD = head.weight.detach().clone()
        _some(weight_VD).neg_()
        return nn.functional.linear(args[0], weight_VD, head.bias)

    hook = head.register_forward_hook(compute)
    try:
        yield
    finally:
        hook.remove()


def is_tied(lm: nn.Module) -> bool:
    """Whether the head's weight is the embeddings'."""
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
