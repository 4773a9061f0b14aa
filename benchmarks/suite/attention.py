"""Checks and times the backends of attention over a shared prefix, one layer of it.

Shapes: H query heads, J key/value heads, L packed tokens, d head width.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from measure import peak_extra_mib, seconds
from torch import Tensor

from suite.contend import verdict
from suite.runner import Run, Skipped, attempt, free_memory

if TYPE_CHECKING:
    from attention_bytes import Shape

    from grao_fast.data.packing import Segment

Attend = Callable[..., Tensor]
# (groups, prompt, responses) of rows, as `attention_bytes.row_of` takes them, and a window.
CHECKED = [((1, 300, (140, 7, 260)), None), ((2, 190, (65, 1, 300)), 100), ((1, 20, (30,)), None)]
TIMED = [
    ((2, 512, (512,) * 9), None),
    ((1, 4096, (256,) * 9), None),
    ((1, 4096, (256,) * 9), 1024),
    ((4, 128, (1024,) * 9), None),
]
TINY_TIMED = [((1, 20, (9,) * 3), None)]


def attention(run: Run) -> str:
    """Compare values and gradients with float64, then time forward and backward."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    from attention_bytes import Shape, row_of

    shape = Shape(4, 2, 16, itemsize=4) if run.tiny else Shape(32, 8, 128)
    backends = dict(_backends(run, shape))
    for row, window in CHECKED:
        where = f"errors, {_named(row, window)}"
        if run.in_time(where):
            _check(run, where, backends, row_of(*row), replace(shape, window=window))
    headlines = []
    for row, window in TINY_TIMED if run.tiny else TIMED:
        where = _named(row, window)
        if run.in_time(where):
            _time(run, where, backends, row_of(*row), replace(shape, window=window))
            headlines.append(f"{where}: {_fastest(run.report[where])}")
            free_memory()
    if "flex" in backends and run.in_time("compilations"):
        run.report["compilations"] = found = _compilations(run, shape)
        if found["for four new lengths"]:
            run.report.setdefault("ours_failed", []).append(f"flex compiled again: {found}")
    return verdict(run, "; ".join(headlines))


def _backends(run: Run, shape: Shape) -> Iterator[tuple[str, Attend]]:
    """Yield every backend that can run here; report those that cannot."""
    from grao_fast.models.attention import flex, sdpa, varlen, varlen_kernels

    yield "sdpa", sdpa.attend
    on_cuda = run.device.type == "cuda"
    why_not = varlen_kernels.why_not(shape.width, _dtype(run), None) if on_cuda else None
    if why_not:
        run.leave_out("varlen", why_not)
    else:
        yield f"varlen ({varlen_kernels.kernel_name() if on_cuda else 'SDPA'})", varlen.attend
    if on_cuda and varlen_kernels.kernel_name() != "PyTorch's":
        yield "varlen (PyTorch's)", _without_flash_attn(varlen.attend)
    if on_cuda:
        yield "flex", flex.attend
    else:
        run.leave_out("flex", "FlexAttention has no gradients on a CPU")


def _without_flash_attn(attend: Attend) -> Attend:
    """Return `varlen.attend` as it is where flash-attn is not installed."""
    from grao_fast.models.attention import varlen_kernels

    @functools.wraps(attend)
    def without(*args: Any, **options: Any) -> Tensor:
        with patch.object(varlen_kernels, "_flash_attn", lambda: None):
            return attend(*args, **options)

    return without


def _check(
    run: Run,
    where: str,
    backends: dict[str, Attend],
    segments: tuple[Segment, ...],
    shape: Shape,
) -> None:
    """Report the errors of output and gradients; one above sqrt(eps) fails the section."""
    from grao_fast.models.attention import sdpa

    inputs = _inputs(run, segments, shape)
    truth = _pass(sdpa.attend, [x.detach().double() for x in inputs], segments, shape)
    allowed = torch.finfo(inputs[0].dtype).eps ** 0.5
    run.report[where] = found = {}
    for name, attend in backends.items():
        ours, reason = attempt(
            lambda attend=attend: _pass(attend, inputs, segments, shape),
        )
        if ours is None:
            found[name] = {"reason": reason}
        else:
            found[name] = {
                what: float((actual.double() - true).abs().amax() / true.abs().amax())
                for what, actual, true in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True)
            }
        wrong = [f"{key} {off}" for key, off in found[name].items() if not _within(off, allowed)]
        if wrong:
            run.report.setdefault("ours_failed", []).append(f"{name}, {where}: {wrong[0]}")


def _within(off: float | str | None, allowed: float) -> bool:
    return isinstance(off, float) and off <= allowed


def _time(
    run: Run,
    where: str,
    backends: dict[str, Attend],
    segments: tuple[Segment, ...],
    shape: Shape,
) -> None:
    """Report median seconds and peak memory, in rounds in which all take turns."""
    from attention_bytes import attention_flops, bytes_of

    inputs = _inputs(run, segments, shape)
    run.report[where] = report = {
        "tokens": segments[-1].stop,
        "bytes_on_paper": asdict(bytes_of(segments, shape)),
        "flops": attention_flops(segments, shape),
    }
    times: dict[str, list[float]] = {}
    for turn in range(3 if run.tiny else 12):
        if turn > 2 and not run.in_time(f"rounds from {turn}, {where}"):
            break
        for name, attend in backends.items():
            figures = report.setdefault(name, {})
            if "reason" in figures:
                continue

            def one(attend: Attend = attend) -> None:
                _pass(attend, inputs, segments, shape)

            if turn == 0:  # compiles
                peak, reason = attempt(lambda one=one: (one(), peak_extra_mib(one, run.device))[1])
                figures |= {"reason": reason} if reason else {"peak_extra_mib": peak}
            else:
                times.setdefault(name, []).append(seconds(one, run.device))
    for name, own in times.items():
        report[name] |= {"median": statistics.median(own), "rounds": len(own)}
        report[name]["flop_per_s"] = report["flops"] / report[name]["median"]
    for name in backends:
        if "reason" in report[name]:
            lost = f"{name}, {where}: {report[name]['reason']}"
            run.report.setdefault("ours_failed", []).append(lost)


def _compilations(run: Run, shape: Shape) -> dict[str, Any]:
    """Return how often FlexAttention was compiled in all, and for rows of new lengths."""
    from attention_bytes import row_of
    from torch._dynamo.utils import counters

    from grao_fast.models.attention import flex

    before = counters["stats"]["unique_graphs"]
    for length in (61, 130, 511, 1025):
        segments = row_of(1, 200, (length, 40))
        _pass(flex.attend, _inputs(run, segments, shape), segments, shape)
    after = counters["stats"]["unique_graphs"]
    return {"in all": after, "for four new lengths": after - before}


def _inputs(run: Run, segments: tuple[Segment, ...], shape: Shape) -> list[Tensor]:
    """Return queries, keys, values and the gradient of the output, drawn on the device."""
    generator = torch.Generator(run.device).manual_seed(0)
    L = segments[-1].stop
    return [
        torch.randn(
            1,
            heads,
            L,
            shape.width,
            generator=generator,
            device=run.device,
            dtype=_dtype(run),
        )
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]


def _pass(
    attend: Attend, inputs: list[Tensor], segments: tuple[Segment, ...], shape: Shape
) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    *leaves, grad = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    options = {"scaling": shape.width**-0.5, "dropout": 0.0, "softcap": None}
    out = attend(*leaves, segments, window=shape.window, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _named(row: tuple[int, int, tuple[int, ...]], window: int | None) -> str:
    groups, prompt, responses = row
    of = f"{len(responses)} of {responses[0]}" if len(set(responses)) == 1 else f"{responses}"
    within = "" if window is None else f", window {window}"
    return f"{groups} x (prompt {prompt}, responses {of}){within}"


def _fastest(report: dict[str, Any]) -> str:
    """Return all times, the best first."""
    times = {
        name: figures["median"]
        for name, figures in report.items()
        if isinstance(figures, dict) and "median" in figures
    }
    ranked = sorted(times, key=lambda name: times[name])
    return ", ".join(f"{name} {1000 * times[name]:.2f} ms" for name in ranked)


def _dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.device.type == "cuda" else torch.float32
