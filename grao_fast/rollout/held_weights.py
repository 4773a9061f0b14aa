"""Proof that a sampler with weights of its own holds the policy's, all of them.

A text is scored by both, token by token, at temperature 1. Small learning rates change weights by
less than anyone could see in that, so the first two weights that a sampler is given differ much: it
gets the policy with some elements of every tensor negated, and then the policy. A tensor that it
did not take over shows in one of the two, whatever the learning rate will be; so does the head that
is tied to embeddings and kept as a copy of its own. Every later hand-over is held to what the first
two have shown that rounding does.

Suffixes: n tokens of the text, B parts of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grao_fast.policy import Policy

from grao_fast.visible import get_logger

logger = get_logger(__name__)

Scorer = Callable[[list[int]], list[float]]

_TEXT = """Two trains left the station at 10:45. One of them was late, so what should a passenger \
who has to be in Lyon by noon do? She could ask: "Is there another one?" The answer was no.
def add(a: int, b: int) -> int:
    return a + b  # 3 + 4 = 7
Im Jahr 2019 schrieb die Zeitung, daß der Fluß gestiegen sei; personne ne l'a crue. Was it true?
- First, look at the map: 48.8566 N, 2.3522 E.
- Second, write it down, because nobody remembers numbers for longer than a day or two.
The quick brown fox jumps over the lazy dog, and $x^2 + y^2 = r^2$ is a circle of radius r."""
_TOKENS = 256

_STRIDE = 1021  # a prime: no row or column of a matrix is met more often than others
_AT_LEAST = 4  # elements negated in a small tensor

# Nats a token, root mean square. In float32, rounding parts vLLM and the policy by 5e-6 on
# SmolLM2-135M and by 5e-7 on a tiny model; in 16 bits by what the policy's own rounding shows.
_FLOAT32_NATS = 5e-3
_FLOOR_NATS = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}
_TIMES = 10.0  # what one measurement of rounding may be above another
_SHARE = 0.5  # of what a part would do if it had been left out


class HeldWeights:
    """Holds a sampler to the policy's weights.

    Args:
        dtype: in which the sampler computes.
        name: of the sampler, for messages.
        context_length: tokens that it holds; None: nothing says so.
    """

    def __init__(self, *, dtype: torch.dtype, name: str, context_length: int | None) -> None:
        self._dtype, self._name = dtype, name
        self._tokens = max(2, min(_TOKENS, context_length - 1)) if context_length else _TOKENS
        self._allowed = math.nan

    def first(self, policy: Policy, hand_over: Callable[[Policy], None], score: Scorer) -> None:
        """Hand over changed weights and then the policy's, and prove that each arrived whole.

        score: the sampler's log-probs of a text's tokens behind the first, at temperature 1.

        Raises ValueError that names the parts which did not, where any can be named.
        """
        lm = policy.causal_lm
        with _evaluating(lm):
            with _negated(lm.parameters()):
                hand_over(policy)
                changed = self._compare(policy, score)
            hand_over(policy)
            true = self._compare(policy, score)
            # Where both arrived, both differences are what rounding does, and much the same.
            rounding = min(changed.nats, true.nats)
            bound = min(changed.bound, true.bound, _TIMES * rounding + self._floor(lm))
            if changed.stale or changed.nats > bound:
                with _negated(lm.parameters()):
                    raise self._refusal(policy, changed, bound)
            if true.stale or true.nats > bound:
                raise self._refusal(policy, true, bound)
        self._allowed = max(_TIMES * max(changed.nats, true.nats), 5 * self._floor(lm))
        logger.info(
            "%s holds the policy's weights: their log-probs differ by %.1e nats a token",
            self._name,
            true.nats,
        )

    def again(self, policy: Policy, score: Scorer) -> None:
        """Prove it of the weights that were handed over just now; see `first`."""
        with _evaluating(policy.causal_lm):
            now = self._compare(policy, score, look_at_parts=False)
            if not now.nats <= self._allowed:
                raise self._refusal(policy, now, self._allowed)

    def _compare(self, policy: Policy, score: Scorer, *, look_at_parts: bool = True) -> _Comparison:
        """The policy as it is now beside the sampler."""
        ids = self._ids(policy)
        ours_n = _logprobs(policy, ids)
        theirs_n = torch.tensor(score(ids), dtype=torch.float32)
        off_n = theirs_n - ours_n
        if not self._sixteen_bits(policy.causal_lm, policy.autocast_dtype):
            return _Comparison(off_n, _FLOAT32_NATS, [])
        # Here rounding hides what one layer does to a token, but not what it does to all of them.
        rounding = _rms(ours_n - _logprobs(policy, ids, autocast=False))
        bound = _TIMES * (rounding + self._floor(policy.causal_lm))
        return _Comparison(off_n, bound, _stale_parts(policy, ids, off_n) if look_at_parts else [])

    def _refusal(self, policy: Policy, seen: _Comparison, bound: float) -> ValueError:
        stale = seen.stale or _stale_parts(policy, self._ids(policy), seen.off_n)
        which = ", ".join(stale[:4]) + (f" and {len(stale) - 4} more" if len(stale) > 4 else "")
        tied = _is_tied(policy.causal_lm) and _HEAD in stale
        return ValueError(
            f"{self._name} does not hold the policy's weights: their log-probs differ by "
            f"{seen.nats:.2g} nats a token where rounding explains {bound:.2g}"
            + (f"; it kept its own {which}" if stale else "")
            + (
                ", which is tied to the embeddings: serve a copy of the model that is saved with "
                "tie_word_embeddings=False, or a newer vLLM"
                if tied
                else "; give it to this run alone, restart it, or sample with use_vllm=False"
            )
        )

    def _sixteen_bits(self, lm: nn.Module, autocast: torch.dtype | None) -> bool:
        return {self._dtype, autocast or lm.dtype} != {torch.float32}

    def _floor(self, lm: nn.Module) -> float:
        return max(_FLOOR_NATS.get(dtype, 0.02) for dtype in (self._dtype, lm.dtype))

    def _ids(self, policy: Policy) -> list[int]:
        return policy.tokenizer(_TEXT, add_special_tokens=False)["input_ids"][: self._tokens]


class _Comparison:
    """off_n: sampler less policy; bound: what rounding may do; stale: parts that did not arrive."""

    def __init__(self, off_n: Tensor, bound: float, stale: list[str]) -> None:
        self.off_n, self.bound, self.stale = off_n, bound, stale
        self.nats = _rms(off_n)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


@torch.no_grad()
def _logprobs(policy: Policy, ids: list[int], *, autocast: bool = True) -> Tensor:
    """(n,) log-probs at temperature 1 of the tokens behind the first, by the model's own pass."""
    row_BL = torch.tensor([ids], device=policy.device)
    if autocast:
        with policy.autocast():
            logits_nV = policy.causal_lm(input_ids=row_BL, use_cache=False).logits[0, :-1]
    else:
        logits_nV = policy.causal_lm(input_ids=row_BL, use_cache=False).logits[0, :-1]
    return logits_nV.float().log_softmax(-1).gather(1, row_BL[0, 1:, None])[:, 0].cpu()


def _stale_parts(policy: Policy, ids: list[int], off_n: Tensor) -> list[str]:
    """The parts whose absence explains `off_n`.

    What each would do if it had been left out is a vector over tokens; `off_n` is fitted by them.
    """
    lm = policy.causal_lm
    ours_n = _logprobs(policy, ids, autocast=False)
    names, effects = [], []
    for name, negated in _parts(lm, at_most=len(ids) // 4):
        with negated:
            effects.append(_logprobs(policy, ids, autocast=False) - ours_n)
        names.append(name)
    effect_nB = torch.stack(effects, 1).double()
    share_B = torch.linalg.lstsq(effect_nB, off_n[:, None].double(), driver="gelsd").solution[:, 0]
    left_n = off_n.double() - effect_nB @ share_B
    # a part that does less than what remains unexplained cannot be told from it
    loud_B = effect_nB.square().sum(0).sqrt() > 6 * left_n.square().mean().sqrt()
    return [names[i] for i in torch.nonzero((share_B > _SHARE) & loud_B).flatten().tolist()]


_HEAD = "head"


def _parts(lm: nn.Module, *, at_most: int) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Names of the model's parts, with a context in which each is negated: head, layers, the rest.

    Where there are more layers than can be told apart, neighbours go together.
    """
    yield _HEAD, _head_negated(lm)
    seen = {id(lm.get_output_embeddings().weight)}
    stacks = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    layers = list(max(stacks, key=len, default=nn.ModuleList()))
    together = -(-len(layers) // max(at_most - 2, 1))
    for start in range(0, len(layers), max(together, 1)):
        chosen = layers[start : start + together]
        parameters = [p for layer in chosen for p in layer.parameters()]
        seen.update(map(id, parameters))
        last = start + len(chosen) - 1
        yield (
            f"layer {start}" if together == 1 else f"layers {start} to {last}",
            _negated(parameters),
        )
    rest = [p for p in lm.parameters() if id(p) not in seen]
    if rest:
        yield "embeddings or norms outside the layers", _negated(rest)


def _is_tied(lm: nn.Module) -> bool:
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@contextmanager
def _negated(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Some elements of every tensor with the other sign: exactly undone on the way out."""
    chosen = [_some(parameter) for parameter in parameters]
    for elements in chosen:
        elements.neg_()
    try:
        yield
    finally:
        for elements in chosen:
            elements.neg_()


def _some(parameter: Tensor) -> Tensor:
    """A view of elements spread over a dense tensor."""
    stride = max(1, min(_STRIDE, parameter.numel() // _AT_LEAST))
    return parameter.data.as_strided((-(-parameter.numel() // stride),), (stride,))


@contextmanager
def _head_negated(lm: nn.Module) -> Iterator[None]:
    """The head alone, though it may be tied to the embeddings."""
    head = lm.get_output_embeddings()
    own = head.weight
    head.weight = nn.Parameter(own.detach().clone(), requires_grad=False)
    try:
        with _negated([head.weight]):
            yield
    finally:
        head.weight = own


@contextmanager
def _evaluating(lm: nn.Module) -> Iterator[None]:
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
