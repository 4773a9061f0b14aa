"""Proof that a sampler with its own copy of the weights has all of the policy's.

Both score a text, token by token, at temperature 1. An update with a small learning rate changes
log-probs too little to be seen, so before the first step the sampler is given two sets of weights
that differ strongly: the policy with a change in every tensor, and then the policy. A tensor that
was not taken over shows in one of the two, and so does a tied head that the sampler keeps as a
separate copy. Later hand-overs must agree within the rounding that the first two have shown.

With several processes, all run the policy's passes, whose weights they gather together; rank 0's
log-probs decide.

Suffixes: n tokens of the text, B parts of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from grao_fast.models.policy import Policy
from grao_fast.models.sharding import reshard
from grao_fast.sampling.changes import HEAD, Change, Negated, is_tied, parts
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

Scorer = Callable[[list[int]], list[list[float]]]

_TEXT = """Two trains left the station at 10:45. One of them was late, so what should a passenger \
who has to be in Lyon by noon do? She could ask: "Is there another one?" The answer was no.
def add(a: int, b: int) -> int:
    return a + b  # 3 + 4 = 7
Im Jahr 2019 schrieb die Zeitung, daß der Fluß gestiegen sei; personne ne l'a crue. Was it true?
- First, look at the map: 48.8566 N, 2.3522 E.
- Second, write it down, because nobody remembers numbers for longer than a day or two.
The quick brown fox jumps over the lazy dog, and $x^2 + y^2 = r^2$ is a circle of radius r."""
_TOKENS = 256

# Nats a token, root mean square. In float32, vLLM and the policy differ by 8e-6 on SmolLM2-135M and
# by 2e-7 on a tiny model; in 16 bits the bound comes from the policy's own rounding.
_FLOAT32_NATS = 5e-3
_FLOOR_NATS = {torch.float32: 2e-6, torch.bfloat16: 0.02, torch.float16: 0.003}
_TIMES = 10.0  # factor by which measurements of rounding may differ
_TIMES_LATER = 30.0  # the same, after training has changed the policy
_SHARE = 0.5  # of the effect that a part would have if it had not arrived
_DEVIATIONS = 6.0  # standard errors that such a share must exceed
_ULP = 2.0**-23


class HeldWeights:
    """Checks that a sampler has the policy's weights.

    Args:
        tokenizer: of the policy.
        dtype: in which the sampler computes.
        name: of the sampler, for messages.
        context_length: tokens that it holds; None: unlimited.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        name: str,
        context_length: int | None,
    ) -> None:
        self._dtype, self._name = dtype, name
        tokens = max(2, min(_TOKENS, context_length - 1)) if context_length else _TOKENS
        self._ids: list[int] = tokenizer(_TEXT, add_special_tokens=False)["input_ids"][:tokens]
        self._shown = math.nan

    @property
    def is_proved(self) -> bool:
        """Whether `first` has succeeded."""
        return not math.isnan(self._shown)

    def first(
        self,
        policy: Policy,
        hand_over: Callable[[Policy], None],
        score: Scorer,
        *,
        change: Change | None = None,
    ) -> None:
        """Hand over changed weights and then the policy's, and prove that both arrived.

        Every process must call it.

        score: log-probs of a text's tokens behind the first, at temperature 1, by each engine that
            holds the weights; the same in all processes.
        change: of the tensors that are handed over; None: all of the model's.

        Raises UserError that names the parts which did not, if they can be told.
        """
        change = change or Negated(policy.causal_lm)
        with _evaluating(policy.causal_lm):
            with change.of(change.tensors):
                hand_over(policy)
                changed = self._compare(policy, score, change)
            hand_over(policy)
            true = self._compare(policy, score, change)
            # If both arrived, both differ by rounding alone, which the model amplifies.
            rounding = min(changed.nats / changed.magnified, true.nats / true.magnified)
            for seen in (changed, true):
                bound = _TIMES * rounding * seen.magnified + self._floor(policy)
                bound = min(seen.bound, bound)
                if seen.stale or not seen.nats <= bound:
                    here = change.of(change.tensors) if seen is changed else nullcontext()
                    with here:
                        self._refuse(policy, seen, bound, change)
        self._shown = max(true.nats, self._floor(policy) / 2)
        logger.info(
            "%s holds the policy's weights: their log-probs differ by %.1e nats a token, and by "
            "%.1e with a change in every tensor",
            self._name,
            true.nats,
            changed.nats,
        )

    def again(self, policy: Policy, score: Scorer) -> None:
        """Prove that the weights which were just handed over arrived; see `first`."""
        with _evaluating(policy.causal_lm):
            seen = self._compare(policy, score, None)
            bound = min(seen.bound, _TIMES_LATER * self._shown)
            if not seen.nats <= bound:
                self._refuse(policy, seen, bound, None)

    def _compare(self, policy: Policy, score: Scorer, change: Change | None) -> _Comparison:
        """Compare the policy as it is now with the sampler, of several engines the most distant."""
        ids = self._ids
        ours_n = _logprobs(policy, ids)
        off_n = max((torch.tensor(scored_n) - ours_n for scored_n in score(ids)), key=_rms_or_inf)
        # The effect of a relative change of the embeddings by one rounding.
        magnified = max(_rms(_logprobs(policy, ids, noise=_ULP) - ours_n), _ULP)
        if self._dtypes(policy) == {torch.float32}:
            return _Comparison(off_n, magnified, bound=_FLOAT32_NATS, stale=[])
        # Rounding in 16 bits hides the effect of one layer on a token, but not on all of them.
        rounding = _rms(ours_n - _logprobs(policy, ids, autocast=False))
        bound = _TIMES * (rounding + self._floor(policy))
        stale = [] if change is None else _stale_parts(policy, ids, off_n, change)
        return _Comparison(off_n, magnified, bound, stale)

    def _refuse(
        self, policy: Policy, seen: _Comparison, bound: float, change: Change | None
    ) -> None:
        error = self._refusal(policy, seen, bound, change)

        def refuse() -> None:
            raise error

        policy.world.main(refuse)

    def _refusal(
        self, policy: Policy, seen: _Comparison, bound: float, change: Change | None
    ) -> UserError:
        stale = seen.stale
        if change is not None and not stale:
            stale = _stale_parts(policy, self._ids, seen.off_n, change)
        which = first_of(stale, shown=4)
        tied = is_tied(policy.causal_lm) and HEAD in stale
        return UserError(
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

    def _floor(self, policy: Policy) -> float:
        """The least bound on rounding, of the coarser dtype."""
        return max(_FLOOR_NATS.get(dtype, 0.02) for dtype in self._dtypes(policy))

    def _dtypes(self, policy: Policy) -> set[torch.dtype]:
        """The dtypes in which both compute; TF32 counts as float16, which rounds alike."""
        ours = policy.autocast_dtype or policy.causal_lm.dtype
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return {self._dtype, torch.float16 if tf32 and ours == torch.float32 else ours}


@dataclass
class _Comparison:
    """Differences between a sampler and the policy.

    off_n: the sampler's log-probs less the policy's.
    magnified: the effect on log-probs of one rounding of the embeddings.
    bound: on the root mean square of rounding errors.
    stale: parts that did not arrive, if they were looked for.
    """

    off_n: Tensor
    magnified: float
    bound: float
    stale: list[str]

    @property
    def nats(self) -> float:
        return _rms(self.off_n)


def _rms(values_n: Tensor) -> float:
    return float(values_n.square().mean().sqrt())


def _rms_or_inf(values_n: Tensor) -> float:
    return float(values_n.square().mean().sqrt().nan_to_num(math.inf))


@torch.no_grad()
def _logprobs(
    policy: Policy, ids: list[int], *, autocast: bool = True, noise: float = 0.0
) -> Tensor:
    """(n,) log-probs at temperature 1 of all tokens but the first, by the model's own pass."""
    lm, row_BL = policy.causal_lm, torch.tensor([ids], device=policy.device)

    def disturb(module: nn.Module, args: tuple, out_BLD: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        drawn_BLD = torch.randn(out_BLD.shape, generator=draw).to(out_BLD)
        return out_BLD * (1 + noise * drawn_BLD)

    hook = lm.get_input_embeddings().register_forward_hook(disturb) if noise else None
    try:
        with policy.autocast() if autocast else nullcontext():
            logits_nV = lm(input_ids=row_BL, use_cache=False).logits[0, :-1]
    finally:
        if hook is not None:
            hook.remove()
    logprob_n = logits_nV.float().log_softmax(-1).gather(1, row_BL[0, 1:, None])[:, 0].cpu()
    return policy.world.main(lambda: logprob_n)


def _stale_parts(policy: Policy, ids: list[int], off_n: Tensor, change: Change) -> list[str]:
    """The parts whose absence explains `off_n`, by least squares.

    The effect that each part would have if it had not arrived is a vector over tokens, and `off_n`
    is fitted by these. In bfloat16, a layer of SmolLM2-135M that did not arrive gets a coefficient
    of 0.95 to 1.01, the head 1.00, and parts that arrived at most 0.04.
    """
    ours_n = _logprobs(policy, ids, autocast=False)
    names, effects = [], []
    for name, changed in parts(policy.causal_lm, change, at_most=len(ids) // 4):
        with changed:
            effects.append(_logprobs(policy, ids, autocast=False) - ours_n)
        names.append(name)
    effect_nB, off_n = torch.stack(effects, 1).double(), off_n.double()
    if not bool(effect_nB.isfinite().all() and off_n.isfinite().all()):
        return []
    share_B = torch.linalg.lstsq(effect_nB, off_n[:, None], driver="gelsd").solution[:, 0]
    left_n = off_n - effect_nB @ share_B
    n, B = effect_nB.shape
    variance = left_n.square().sum() / max(n - B, 1)
    covariance_BB = variance * torch.linalg.pinv(effect_nB.T @ effect_nB, hermitian=True)
    sure_B = share_B > _DEVIATIONS * covariance_BB.diagonal().sqrt()
    return [names[i] for i in torch.nonzero((share_B > _SHARE) & sure_B).flatten().tolist()]


@contextmanager
def _evaluating(lm: nn.Module) -> Iterator[None]:
    training = lm.training
    lm.eval()
    try:
        yield
    finally:
        reshard(lm)
        lm.train(training)
