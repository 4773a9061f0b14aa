"""Floating-point operations of an update, counted from shapes.

A multiply-add is two operations, and only matrix products are counted:

    a weight of N elements   2 N a token forward, 2 N for the tokens' gradient, 2 N for its own
    a pair in attention      2 (d_qk + d_v) a head forward; backward 2 (3 d_qk + 2 d_v), as the
                             scores are recomputed
    recomputed layers        forward once more (gradient_checkpointing); PyTorch stops short of
                             each layer's last product, which is counted all the same
    the head                 2 D V a row that predicts a token: logits, the row's gradient, its own;
                             2 D V more where an objective takes two passes

A pair is a query and a key that it attends to: causal, in the layer's window, in its own sequence.
Frozen weights and heads have no gradient of their own. In a mixture of experts, only the experts
that a token is routed to count. The state updates of recurrent layers are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from grao_fast.data.packing import Group, MicroBatch
from grao_fast.models.attention import head_width

Window = int | None

# Transformers' names for layers without attention.
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class ModelCost:
    """The FLOPs of a token, a pair and a row in one model, forward and backward.

    layers: the number of layers for each attention window; None is no window.
    """

    forward: float  # of all weights but the head's, a token
    update: float  # forward and backward
    pair_forward: float  # of one layer
    pair_update: float
    row_forward: float  # of the head
    row_update: float
    layers: Counter[Window]

    @classmethod
    def of(cls, causal_lm: PreTrainedModel, *, recompute: bool) -> ModelCost:
        """The cost of a model as it is trained; with `recompute`, its layers run forward twice."""
        config: Any = causal_lm.config.get_text_config()
        weights = list(_weights(causal_lm, config))
        total = sum(size for size, _ in weights)
        trained = sum(size for size, trains in weights if trains)
        layers = Counter(layer_windows(config))
        heads = config.num_attention_heads if layers else 0
        qk, v = (
            (getattr(config, n, None) or head_width(config)) if layers else 0
            for n in ("qk_head_dim", "v_head_dim")
        )
        pair_forward = 2 * heads * (qk + v)
        again = 1 if recompute else 0
        head = causal_lm.get_output_embeddings().weight
        return cls(
            forward=2 * total,
            update=2 * ((2 + again) * total + trained),
            pair_forward=pair_forward,
            pair_update=(1 + again) * pair_forward + 2 * heads * (3 * qk + 2 * v),
            row_forward=2 * head.numel(),
            row_update=2 * head.numel() * (3 if head.requires_grad else 2),
            layers=layers,
        )

    def updates(self, work: Work, *, two_passes: bool = False) -> float:
        """FLOPs of one forward and backward pass, with the head's first of two passes, if any."""
        pairs = sum(n * work.pairs[window] for window, n in self.layers.items())
        row = self.row_update + (self.row_forward if two_passes else 0.0)
        return self.update * work.tokens + self.pair_update * pairs + row * work.rows

    def scores(self, work: Work) -> float:
        """FLOPs of one forward pass, such as the reference policy's."""
        pairs = sum(n * work.pairs[window] for window, n in self.layers.items())
        return self.forward * work.tokens + self.pair_forward * pairs + self.row_forward * work.rows


@dataclass(frozen=True)
class Work:
    """The tokens, rows of the head, and pairs in a layer of each window, of some pass."""

    tokens: int
    rows: int
    pairs: Counter[Window]

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.rows + other.rows, self.pairs + other.pairs)


def group_work(
    prompt: int, sequences: Sequence[int], windows: Iterable[Window], *, share_prefix: bool
) -> Work:
    """The work of a prompt and the sequences after it, given as numbers of tokens.

    The prompt is computed once, or for each sequence. Without sequences there is no work.
    """
    windows = set(windows)
    copies = (1 if share_prefix else len(sequences)) if sequences else 0
    pairs: Counter[Window] = Counter()
    for window in windows:
        of_prompt = causal_pairs(prompt, window)
        with_prompt = (causal_pairs(prompt + length, window) for length in sequences)
        pairs[window] = copies * of_prompt + sum(each - of_prompt for each in with_prompt)
    return Work(copies * prompt + sum(sequences), sum(sequences), pairs)


def causal_pairs(length: int, window: Window) -> int:
    """Pairs of a sequence under causal attention in a window."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def layer_windows(config: Any) -> list[Window]:
    """The window of each attention layer of a Transformers config."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        attends = hasattr(config, "num_attention_heads")
        return [window] * config.num_hidden_layers if attends else []
    attending = (kind for kind in kinds if kind not in _WITHOUT_ATTENTION)
    return [window if "sliding" in kind else None for kind in attending]


def _weights(causal_lm: PreTrainedModel, config: Any) -> Iterable[tuple[float, bool]]:
    """(elements that a token is multiplied with, whether trained) of each weight below the head."""
    tables = {id(m.weight) for m in causal_lm.modules() if isinstance(m, nn.Embedding)}
    tables.add(id(causal_lm.get_output_embeddings().weight))
    for parameter in causal_lm.parameters():
        if parameter.ndim < 2 or id(parameter) in tables:
            continue
        share = 1.0
        if parameter.ndim == 3 and hasattr(config, "num_experts_per_tok"):
            # The weights of all experts, a few of which a token is multiplied with.
            share = config.num_experts_per_tok / parameter.shape[0]
        yield parameter.numel() * share, parameter.requires_grad


def batch_work(batch: MicroBatch, windows: Iterable[Window]) -> Work:
    """The work of a micro-batch as it is laid out, padding included."""
    windows = set(windows)
    if batch.segments is not None:
        works = [
            group_work(s.prefix_length, s.suffix_lengths, windows, share_prefix=True)
            for s in batch.segments
        ]
        return sum(works[1:], start=works[0])
    B, L = batch.input_ids_BL.shape
    pairs = Counter({window: B * causal_pairs(L, window) for window in windows})
    return Work(B * L, len(batch.row_T), pairs)


def update_flops(
    cost: ModelCost,
    groups: Sequence[Group],
    batches: Sequence[MicroBatch],
    *,
    share_prefix: bool,
    updates: int,
    scored: bool,
    two_passes: bool = False,
) -> dict[str, float]:
    """`flops/done`, `flops/saved_dead` and `flops/saved_prefix` of the updates of one step.

    Args:
        groups: all groups of the step, dead ones included.
        batches: its micro-batches.
        updates: forward and backward passes over all of them.
        scored: whether the policy that training began with has scored them once.
        two_passes: whether an update computes the logits once more, before its loss.

    saved_dead is the cost that dead groups and sequences would have had in this layout, and
    saved_prefix the additional cost of the live ones with a prompt before each. Neither counts
    absent sequences or padding.
    """

    def of(work: Work) -> float:
        update = cost.updates(work, two_passes=two_passes)
        return updates * update + (cost.scores(work) if scored else 0.0)

    def total(*, live: bool, shared: bool) -> float:
        flops = 0.0
        for group in groups:
            chosen = group.live_sequences if live else range(len(group.sequence_ids))
            lengths = [len(group.sequence_ids[k]) for k in chosen]
            prompt, present = len(group.prompt_ids), [length for length in lengths if length]
            flops += of(group_work(prompt, present, cost.layers, share_prefix=shared))
        return flops

    live = total(live=True, shared=share_prefix)
    return {
        "flops/done": float(sum(of(batch_work(batch, cost.layers)) for batch in batches)),
        "flops/saved_dead": total(live=False, shared=share_prefix) - live,
        "flops/saved_prefix": total(live=True, shared=False) - live,
    }
