"""Makes batches on the device and times contenders there, however many of them fail.

Shapes: T rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from batches import Batch, batch_facts, make_batch, one_group
from measure import Truths, checked_errors, interleave, outputs
from peers import OURS, PEERS, Peer
from torch import Tensor

from suite.runner import Run, attempt, free_memory


def device_batch(
    shape_TDV: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    live: float = 1.0,
    head_VD: Tensor | None = None,
) -> Batch:
    """Do as `make_batch` but draw large tensors on the device; on a CPU a head takes seconds."""
    T, D, V = shape_TDV
    groups = make_batch((T, 1, 1), torch.float32, device.type, live=live)
    generator = torch.Generator(device).manual_seed(0)
    here: dict[str, Any] = {"generator": generator, "device": device}
    if head_VD is None:
        head_VD = torch.randn(V, D, dtype=dtype, **here).div_(D**0.5)
    return groups._replace(
        hidden_TD=torch.randn(T, D, dtype=dtype, **here).requires_grad_(),
        head_VD=head_VD.requires_grad_(),
        target_T=torch.randint(0, V, (T,), **here),
    )


def contend(
    run: Run, where: str, names: Iterable[str], batch: Batch, rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure errors, memory, and time beside the three GEMMs of the same round.

    Unlike in `measure.measure`, a contender that fails in any way leaves the others running: the
    reason takes the place of its figures. If it is ours, `verdict` fails in the end.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # it stops compiling, without a word, after a few shapes
    found: dict[str, dict[str, Any]] = {}
    run.report[where] = found
    truths: Truths = {}
    for name in names:
        if not run.in_time(f"{name}, {where}"):
            continue
        figures, reason = attempt(lambda name=name: _first_look(PEERS[name], batch, truths))
        found[name] = {"reason": reason} if figures is None else figures
    truths.clear()
    free_memory()
    functions = {
        name: guarded(PEERS[name], batch, figures)
        for name, figures in found.items()
        if "reason" not in figures
    }
    _, reason = attempt(lambda: take_turns(run, where, functions, batch, rounds))
    if reason:
        run.leave_out(f"times, {where}", reason)
    for name in OURS:
        if name not in found or PEERS[name].absence(batch) is not None:
            continue
        if "median" not in found[name]:
            lost = f"{name}, {where}: {found[name].get('reason', reason)}"
            run.report.setdefault("ours_failed", []).append(lost)
    return found


def verdict(run: Run, headline: str) -> str:
    """Return the headline, unless one of ours has failed."""
    if failed := run.report.get("ours_failed"):
        raise AssertionError(failed[0])
    return headline


def _first_look(peer: Peer, batch: Batch, truths: Truths) -> dict[str, Any]:
    """Return a contender's errors, which must pass, or the reason for its absence."""
    if reason := peer.absence(batch):
        return {"reason": reason}
    found = checked_errors(peer, one_group(batch), truths)
    outputs(peer, batch)  # compiles, and may find no memory
    return {"errors": found}


def guarded(peer: Peer, batch: Any, figures: dict[str, Any]) -> Callable[[], object]:
    """Return a function that runs a pass until one fails, which leaves the reason in `figures`."""

    def function() -> None:
        if "reason" not in figures:
            _, reason = attempt(lambda: outputs(peer, batch))
            if reason:
                figures["reason"] = reason

    return function


def take_turns(
    run: Run, where: str, functions: dict[str, Callable[[], object]], batch: Any, rounds: int
) -> None:
    def goes_on(turn: int) -> bool:  # quartiles take two rounds
        return turn < 2 or run.in_time(f"rounds {turn + 1} to {rounds}, {where}")

    for name, measured in interleave(functions, batch, rounds, goes_on=goes_on).items():
        figures = run.report[where][name]
        if "reason" not in figures:
            figures |= measured.summary() | batch_facts(batch)
