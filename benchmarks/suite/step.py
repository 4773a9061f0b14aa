"""The head of one GRAO step of a Qwen2.5-7B-shaped model, as a trainer hands it over.

Shapes: T rows (tokens, prompts' included), D width, V vocabulary, N prompts, K = G + 1.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from batches import Batch, exact_weights
from measure import Outputs, errors, peak_extra_mib, quartiles, seconds, truth
from peers import PEERS
from torch import Tensor

from grao_fast.kernels import linear_grao_loss
from suite.runner import Run, attempt, free_memory

N, G = 16, 8
SHAPE = (3584, 152064, 512)  # D, V, longest completion
TINY = (32, 517, 12)
DEAD_PROMPTS = 5  # their completions are all right, or all wrong


def step(run: Run) -> str:
    """Seconds, memory and errors of a step's loss and gradients: ours at once, naive as it fits."""
    D, V, longest = TINY if run.tiny else SHAPE
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    batch, prompt_T = step_batch(D, V, longest, dtype, run.device)
    T, live = batch.weight_T.numel(), int((batch.weight_T != 0).sum())
    run.report["batch"] = {"T": T, "D": D, "V": V, "live": live, "prompts": N, "samples": G}
    contenders = {
        "ours": lambda part: linear_grao_loss(*part[:5], num_prompts=N).loss,
        "naive": PEERS["naive"].loss,
        "naive_live_rows": lambda part: PEERS["naive"].loss(_live_rows(part)),
    }
    true = truth(batch)
    functions: dict[str, Callable[[], Outputs]] = {}
    for name, loss in contenders.items():
        look = functools.partial(_first_look, loss, batch, prompt_T, true)
        seen, reason = attempt(look)
        if seen is None:
            run.report[name] = {"reason": reason}
        else:
            functions[name], run.report[name] = seen
    del true
    free_memory()
    if "ours" not in functions:
        raise AssertionError(f"ours: {run.report['ours']['reason']}")
    _take_turns(run, functions)
    off, allowed = run.report["ours"]["errors"], torch.finfo(dtype).eps ** 0.5
    if max(off.values()) > allowed:
        raise AssertionError(f"ours is off by {off} of its size, {allowed:.2g} passes")
    figures = [
        f"{name} {1000 * each['median']:.0f} ms ({each['parts']} part(s))"
        for name in functions
        for each in [run.report[name]]
    ]
    return f"T={T}, {live / T:.0%} live: " + ", ".join(figures)


def _take_turns(run: Run, functions: dict[str, Callable[[], Outputs]]) -> None:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(2 if run.tiny else 7):
        # Quartiles take two rounds.
        if turn >= 2 and not run.in_time(f"rounds from {turn + 1}"):
            break
        for name, function in functions.items():
            times[name].append(seconds(function, run.device))
    for name, each in times.items():
        run.report[name] |= quartiles(each)


def step_batch(
    D: int, V: int, longest: int, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Tensor]:
    """A batch of N prompts, prompts of all lengths, completions of ragged ones; and each row's
    prompt. About a third of the rows count: prompt rows and dead groups do not."""
    generator = torch.Generator().manual_seed(0)
    K = G + 1
    shortest = max(1, longest // 16)
    prompt_N = torch.randint(longest // 8, longest + 1, (N,), generator=generator)
    spread_NK = torch.randn(N, K, generator=generator).mul(0.6).exp() * longest / 2.5
    length_S = spread_NK.long().clamp(shortest, longest).flatten()
    rewards_NK = torch.randint(0, 2, (N, K), generator=generator).float()
    rewards_NK[:, 0], rewards_NK[:, 1] = 0, 1
    rewards_NK[:DEAD_PROMPTS] = 1

    pieces = torch.stack([prompt_N.repeat_interleave(K), length_S], 1).flatten()
    marks = torch.stack([torch.full((N * K,), -1), torch.arange(N * K)], 1).flatten()
    sequence_T = marks.repeat_interleave(pieces)
    prompt_T = torch.arange(2 * N * K).div(2 * K, rounding_mode="floor").repeat_interleave(pieces)
    T = sequence_T.numel()
    here: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(0)}
    batch = Batch(
        torch.randn(T, D, dtype=dtype, **here).requires_grad_(),
        torch.randn(V, D, dtype=dtype, **here).div_(D**0.5).requires_grad_(),
        torch.randint(0, V, (T,), **here),
        sequence_T,
        rewards_NK,
        exact_weights(sequence_T, rewards_NK).to(device, torch.float32),
    )
    return batch, prompt_T


def _first_look(
    loss: Callable[[Batch], Tensor], batch: Batch, prompt_T: Tensor, true: Outputs
) -> tuple[Callable[[], Outputs], dict[str, Any]]:
    """A whole step in as few micro-batches as memory has room for; its memory, and its errors."""
    parts = 1
    while True:
        function = functools.partial(_accumulate, loss, batch, prompt_T, parts)
        _, reason = attempt(function)
        if reason is None:
            break
        if reason != "out of memory" or parts == N:
            raise RuntimeError(reason)
        parts *= 2
    peak = peak_extra_mib(function, batch.hidden_TD.device)
    figures = {"parts": parts, "peak_extra_mib": peak, "errors": errors(function(), true)}
    return function, figures


def _accumulate(
    loss: Callable[[Batch], Tensor], batch: Batch, prompt_T: Tensor, parts: int
) -> Outputs:
    """Loss and gradients, summed over micro-batches of N / parts whole prompts."""
    K = G + 1
    size = N // parts
    edges = torch.searchsorted(prompt_T, torch.arange(0, N + 1, size)).tolist()
    total = torch.zeros((), device=batch.hidden_TD.device)
    dhidden: list[Tensor] = []
    dhead_VD: Tensor | None = None
    for part, (start, stop) in enumerate(itertools.pairwise(edges)):
        rows = slice(start, stop)
        first = part * size
        sequence_R = batch.sequence_T[rows]
        piece = batch._replace(
            hidden_TD=batch.hidden_TD[rows].detach().requires_grad_(),
            target_T=batch.target_T[rows],
            sequence_T=torch.where(sequence_R < 0, -1, sequence_R - first * K),
            rewards_NK=batch.rewards_NK[first : first + size],
            weight_T=batch.weight_T[rows],
        )
        value = loss(piece)
        dhidden_RD, dpart_VD = torch.autograd.grad(value, (piece.hidden_TD, piece.head_VD))
        total = total + value.detach()
        dhidden.append(dhidden_RD)
        dhead_VD = dpart_VD if dhead_VD is None else dhead_VD.add_(dpart_VD)
    assert dhead_VD is not None
    return Outputs(total, torch.cat(dhidden), dhead_VD)


def _live_rows(batch: Batch) -> Batch:
    live_T = batch.weight_T != 0
    return batch._replace(
        hidden_TD=batch.hidden_TD[live_T],
        target_T=batch.target_T[live_T],
        weight_T=batch.weight_T[live_T],
    )
