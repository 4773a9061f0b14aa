"""What must hold to the bit, or not at all: determinism, no host syncs, compiled as in eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grao_fast.kernels import (
    group_advantages,
    linear_grao_loss,
    linear_logprobs,
    linear_weighted_cross_entropy,
    sequence_weights,
)
from suite.contend import device_batch
from suite.heads import TINY_HEAD
from suite.runner import Run, Skipped, first_line, free_memory

Pass = Callable[[], list[Tensor]]


def passes(run: Run, dtype: torch.dtype) -> dict[str, Pass]:
    """Forward and backward of every public function: outputs and gradients."""
    T, (D, V) = (512, TINY_HEAD) if run.tiny else (2048, (4096, 151936))
    batch = device_batch((T, D, V), dtype, run.device, live=0.5)
    operands = batch.hidden_TD, batch.head_VD
    beside = [each.to(run.device) for each in (batch.sequence_T, batch.rewards_NK)]
    weight_T = batch.weight_T.cpu()
    policy_T = torch.full((T,), -11.0)
    off_policy: dict[str, Any] = {
        "old_logprob_T": policy_T,
        "clip": (0.2, 0.3),
        "sampler_logprob_T": policy_T + 0.1,
        "sampler_cap": 2.0,
        "ref_logprob_T": policy_T.to(run.device),
        "kl_coef": 0.1,
        "entropy": True,
        "top1": True,
    }
    on_cpu = (batch.target_T, batch.sequence_T, batch.rewards_NK)

    def gradients(outputs: tuple[Tensor | None, ...], loss: Tensor) -> list[Tensor]:
        kept = [each.detach() for each in outputs if each is not None]
        return [*kept, *torch.autograd.grad(loss, operands)]

    def grao(*rest: Tensor, **options: Any) -> list[Tensor]:
        result = linear_grao_loss(*operands, *rest, **options)
        return gradients(result, result.loss)

    def weighted() -> list[Tensor]:
        result = linear_weighted_cross_entropy(*operands, batch.target_T, weight_T)
        return gradients(result, result.loss)

    def logprobs() -> list[Tensor]:
        result = linear_logprobs(*operands, batch.target_T, entropy=True)
        assert result.entropy_T is not None
        return gradients(result, (result.logprob_T.exp() + result.entropy_T).sum())

    def weights() -> list[Tensor]:
        advantages_NK = group_advantages(beside[1])
        return [advantages_NK, sequence_weights(advantages_NK)]

    return {
        "linear_grao_loss": partial(grao, *on_cpu),
        "linear_grao_loss, rewards on the device": partial(grao, batch.target_T, *beside),
        "linear_grao_loss, off policy": partial(grao, *on_cpu, **off_policy),
        "linear_weighted_cross_entropy": weighted,
        "linear_logprobs": logprobs,
        "group_advantages and sequence_weights": weights,
    }


def determinism(run: Run) -> str:
    """Three runs, one result, to the bit; in between memory is handed out anew."""
    same = 0
    for dtype in (torch.bfloat16, torch.float32):
        for name, function in passes(run, dtype).items():
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            if not run.in_time(what):
                continue
            first = function()
            for _ in range(2):
                free_memory()
                differing = _differing(first, function())
                if differing:
                    raise AssertionError(f"{what}: outputs {differing} have other bits")
            run.report[what] = "same bits"
            same += 1
        free_memory()
    return f"{same} passes, three runs each: the same bits"


def _differing(ones: list[Tensor], twos: list[Tensor]) -> list[int]:
    """Places where bits differ; NaN, of rows that do not count, is as good as NaN."""
    pairs = enumerate(zip(ones, twos, strict=True))
    return [place for place, (one, two) in pairs if not _same(one, two)]


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def sync(run: Run) -> str:
    """No pass makes the host wait for the device; PyTorch raises where one does."""
    if run.device.type != "cuda":
        raise Skipped("needs CUDA")
    waited: dict[str, str] = {}
    checked = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, function in passes(run, dtype).items():
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            if not run.in_time(what):
                continue
            function()  # compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            except RuntimeError as error:
                waited[what] = first_line(error)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            checked += 1
        free_memory()
    run.report |= {"checked": checked, "waited": waited}
    if waited:
        what, reason = next(iter(waited.items()))
        raise AssertionError(f"{len(waited)} of {checked} passes; {what}: {reason}")
    return f"{checked} passes, none waits for the device"


class _Head(nn.Module):
    """A head with its loss, as a trainer would compile it."""

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor) -> None:
        super().__init__()
        self.hidden_TD, self.head_VD = nn.Parameter(hidden_TD), nn.Parameter(head_VD)

    def forward(self, *rest: Tensor):
        return linear_grao_loss(self.hidden_TD, self.head_VD, *rest, entropy=True, top1=True)


def compiled(run: Run) -> str:
    """torch.compile(fullgraph=True) of a module with the loss: the same bits as without."""
    T, (D, V) = (512, TINY_HEAD) if run.tiny else (2048, (4096, 151936))
    backends = ["aot_eager", "inductor"]
    if run.device.type != "cuda":
        backends.remove("inductor")
        run.leave_out("inductor", "on a CPU it takes a C++ compiler, and long")
    done = []
    for backend in backends:
        for dtype in (torch.bfloat16, torch.float32):
            what = f"{backend}, {str(dtype).removeprefix('torch.')}"
            if not run.in_time(what):
                continue
            batch = device_batch((T, D, V), dtype, run.device, live=0.5)
            head = _Head(batch.hidden_TD.detach(), batch.head_VD.detach())
            rest = (batch.target_T, batch.sequence_T, batch.rewards_NK)
            torch._dynamo.reset()
            eager = _step(head, head, rest)
            code = torch.compile(head, fullgraph=True, backend=backend)
            if differing := _differing(eager, _step(head, code, rest)):
                raise AssertionError(f"{what}: outputs {differing} have other bits")
            run.report[what] = "same bits"
            done.append(what)
            free_memory()
    return f"the same bits: {'; '.join(done)}"


def _step(head: _Head, forward: nn.Module | Callable[..., Any], rest: tuple) -> list[Tensor]:
    head.zero_grad()
    result = forward(*rest)
    result.loss.backward()
    kept = [each.detach() for each in result if each is not None]
    gradients = [each.grad for each in head.parameters()]
    return [*kept, *(each.clone() for each in gradients if each is not None)]
