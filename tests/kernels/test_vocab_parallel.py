"""A head sharded over two processes gives the results of a whole one."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import backward
from interpreter import interpreter_fault
from problem import GRADIENTS, make_problem
from tolerance import assert_accurate
from torch import Tensor

PROCESSES = 2
WORKER = Path(__file__).with_name("parallel_worker.py")
OFF_POLICY = {
    "old_logprob_T": torch.linspace(-9, -3, 24),
    "clip": (0.2, 0.3),
    "sampler_logprob_T": torch.linspace(-8, -3, 24),
    "sampler_cap": 2.0,
    "ref_logprob_T": torch.linspace(-3, -9, 24),
    "kl_coef": 0.01,
    "entropy": True,
    "top1": True,
}
TRUNCATED = {
    "old_logprob_T": OFF_POLICY["old_logprob_T"],
    "clip": (0.2, 0.3),
    "ratio": "truncated",
}


def case(function: str, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """257 logits, so that the second process has one fewer than the first."""
    problem = make_problem(bias=True, **changes.pop("problem", {}))
    operands = {name: getattr(problem, name).to(dtype) for name in GRADIENTS}
    return {
        "function": function,
        "operands": operands,
        "vocab_size": operands["head_VD"].shape[0],
        "target_T": problem.target_T,
        "sequence_T": problem.sequence_T,
        "rewards_NK": problem.rewards_NK,
        "weight_T": torch.linspace(-1, 1, 24).where(torch.arange(24) % 5 > 0, 0),
        "options": problem.options | changes.pop("options", {}),
        **changes,
    }


def first_half_masked() -> dict[str, Any]:
    """All logits of the first process are -inf."""
    masked = case("weighted")
    masked["operands"]["bias_V"][:129] = -math.inf
    masked["target_T"] = masked["target_T"] % 128 + 129
    return masked


TRANSFORM = {"temperature": 0.7, "logit_scale": 2.0, "softcap": 5.0, "logits": 3.0}
CASES = {
    "grao": case("grao"),
    "grao_bf16": case("grao", torch.bfloat16),
    "grao_fp16": case("grao", torch.float16),
    "grao_transform": case("grao", problem=TRANSFORM),
    "grao_off_policy": case("grao", options=OFF_POLICY),
    "grao_in_chunks": case("grao", options={"workspace_mib": 0.004}),
    "grao_compiled": case("grao", compiled=True),
    "grao_dtensor": case("grao", dtensor=True),
    "shaped": case("policy", form="chord", off_policy=TRUNCATED),
    "weighted": case("weighted"),
    "weighted_logits_of_1e4": case("weighted", problem={"logits": 1e4}),
    "weighted_masked_half": first_half_masked(),
    "weighted_accumulate": case("weighted", accumulate=True),
    "weighted_dtensor": case("weighted", dtensor=True),
    "logprobs": case("logprobs"),
    "logprobs_transform": case("logprobs", problem=TRANSFORM),
    "logprobs_in_chunks": case("logprobs", options={"workspace_mib": 0.004}),
    "logprobs_compiled": case("logprobs", compiled=True),
    "logprobs_dtensor": case("logprobs", dtensor=True),
}


def launch(folder: Path, cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of both processes, which save them in `folder`."""
    torch.save(cases, folder / "cases.pt")
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", str(WORKER), str(folder)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(PROCESSES)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    return [torch.load(folder / f"result-{rank}.pt") for rank in range(PROCESSES)]


# Backends differ only in the two halves of a row function; one backend runs all cases.
ON_TRITON = ("grao", "grao_bf16", "grao_off_policy", "weighted_masked_half", "logprobs_transform")
RUNS = {name: ("torch", name) for name in CASES}
RUNS |= {f"{name}_interpreted": ("triton", name) for name in ON_TRITON}


def triton_fault() -> str | None:
    """Why the cases on Triton's interpreter cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return interpreter_fault()


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All results, made in processes of their own, so this one need not interpret Triton."""
    backends = ("torch",) if triton_fault() else ("torch", "triton")
    cases = {
        run: {**CASES[name], "options": CASES[name]["options"] | {"backend": backend}}
        for run, (backend, name) in RUNS.items()
        if backend in backends
    }
    return launch(tmp_path_factory.mktemp("spread"), cases)


def alone(one: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of one process with the whole head, on the backend that needs no Triton."""
    operands = {name: x.to(dtype, copy=True) for name, x in one["operands"].items()}
    operands = {name: x.requires_grad_() for name, x in operands.items()}
    outputs = backward(one, operands, backend="torch", workspace_mib=512)
    if one.get("accumulate"):
        outputs["head_grad_VD"] = 1 + outputs.pop("dhead_VD")
    return outputs


SCALARS = ("loss", "exploration", "imitation", "alignment", "kl")


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_give_what_one_gives(run: str, spread) -> None:
    """Up to the rounding of another order; other tests compare a whole head with float64."""
    backend, name = RUNS[run]
    if backend == "triton" and (fault := triton_fault()):
        pytest.skip(fault)
    one = CASES[name]
    dtype = one["operands"]["head_VD"].dtype
    expected, naive = alone(one, torch.float32), alone(one, dtype)
    results = [process["results"][run] for process in spread]
    assert results[0].keys() == expected.keys()
    scale = max((expected[key].abs().max() for key in SCALARS if key in expected), default=0)
    for key, value in expected.items():
        parts = [result[key] for result in results]
        if key in ("dhead_VD", "dbias_V", "head_grad_VD"):
            parts = [torch.cat(parts)]
        else:
            assert torch.equal(parts[0].nan_to_num(7), parts[1].nan_to_num(7)), key
        if key in SCALARS:  # sums of terms that may be far larger
            assert (parts[0] - value).abs() <= 8 * torch.finfo(dtype).eps * scale, key
            continue
        assert_accurate(key, parts[0], naive[key], value, dtype)


def test_what_does_not_fit_is_refused(spread) -> None:
    for rank, process in enumerate(spread):
        said = process["errors"]
        assert f"head_VD has {3 + rank} rows in process {rank} of 2" in said["rows"]
        assert "it must have 5" in said["rows"]
        assert "leaves the last of 2 processes without rows" in said["empty"]
        assert "DTensor.from_local(hidden_TD" in said["plain_hidden"]
        assert "under FSDP, gather the head first" in said["plain_hidden"]
        assert "it must be [Shard(0)]" in said["placement"]
        assert "leave out vocab_parallel" in said["both"]
        assert "hidden_TD is a DTensor and head_VD is not" in said["hidden_alone"]
        assert "must be in [0, 10), got 10 in row 1" in said["target"]
