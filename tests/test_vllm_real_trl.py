"""GRAOTrainer with vLLM's own engine and server, on CPUs; see trl_vllm_worker.py.

A CPU differs from a GPU in two things that TRL needs, and the worker puts others in their place.
TRL writes weights into the engine's, which vLLM packs for oneDNN on CPUs: here it computes linear
layers by PyTorch, from weights in place. TRL sends a server weights by NCCL: here they go over TCP.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from published import assert_errors_as_published
from real_vllm import BIN, RealServer, environment, save_model, save_plugin
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (BIN / "vllm").exists(), reason="GRAO_VLLM names no folder with a vllm executable"
    ),
]

# vLLM's `dtype="auto"`, which TRL leaves it, takes bfloat16 for a model in float32.
ROUNDED = 0.03
SAME = 1e-5  # the servers of the tests compute in float32
FAR = 0.3
WORKER = Path(__file__).with_name("trl_vllm_worker.py")
TOOLS = Path(__file__).with_name("trl_vllm_tools_worker.py")
SHARDED = Path(__file__).with_name("trl_vllm_clusters_worker.py")


def needs_trl() -> None:
    """Skip a test unless vLLM's Python has what it takes."""
    imports = subprocess.run([BIN / "python", "-c", "import grao_fast, trl"], capture_output=True)
    if imports.returncode:
        pytest.skip(f"grao-fast and trl are not both installed for {BIN / 'python'}")


def facts(
    folder: Path,
    model: Path,
    *parts: str,
    port: int | None = None,
    processes: int = 1,
    worker: Path = WORKER,
) -> list[dict[str, Any]]:
    """What the worker measured in each part, or with several processes, in each process."""
    command = [str(BIN / "python")]
    if processes > 1:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    needs_trl()
    done = subprocess.run(
        [*command, worker, model, folder, *parts, *(["--port", str(port)] if port else [])],
        cwd=folder,
        # compiling the model takes longer than all else
        env=environment(TORCH_COMPILE_DISABLE="1", VLLM_HOST_IP="127.0.0.1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [f"{part}-{rank}.json" for part in parts for rank in range(processes)]
    return [json.loads((folder / file).read_text()) for file in files]


def check_weighed(found: dict[str, Any], most: float) -> None:
    """Importance weights are those of the policy of each step; some are beyond their bounds."""
    assert len(found["ratio"]) == 3
    assert max(found["ratio"]) < most
    assert max(found["bounded"]) > 0 and min(found["bounded"]) < 1


def check_gradients(found: dict[str, Any], kind: str) -> None:
    """Each step's gradient is the specification's."""
    way = "GRAOTrainer with a real vLLM, by its importance weights"
    eps = torch.finfo(torch.float32).eps
    assert_errors_as_published(way, gradient=max(found["gradient"]), eps=eps, kind=kind)


def check_tools(found: dict[str, Any], most: float | None) -> None:
    """Tools were called, by the model's own words, and gradients are the specification's."""
    assert sum(found["calls"]) >= 2 and found["failures"] == [0.0, 0.0]
    if most is not None:
        assert max(found["weights"]) < most
    check_gradients(found, "with tools")


def check_arrived(found: dict[str, Any], most: float) -> None:
    """vLLM has the last weights, and they are far from the first."""
    assert found["greedy"] < most
    assert found["stale_greedy"] > FAR


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tied", tied=True)


def test_an_engine_in_the_process_that_trains(model: Path, tmp_path: Path):
    plain, regex, lora, refused = facts(tmp_path, model, "plain", "regex", "lora", "refused")
    check_weighed(plain, ROUNDED)
    for found in (plain, regex):
        check_gradients(found, "in the process that trains")
        assert (found["length"], found["share"]) == (64, 0.05)
        assert found["model"] == "LlamaForCausalLM"
    for found in (plain, regex, lora):
        check_arrived(found, ROUNDED)
    assert all(re.fullmatch("[a-f]{3}", text) for text in regex["texts"])
    assert max(lora["ratio"]) < ROUNDED and not lora["merged"]
    assert "Sleep mode is not supported on current platform" in refused["asleep"]
    assert "server can't be reached" in refused["nobody"]


def test_an_engine_shared_by_two_processes(model: Path, tmp_path: Path):
    both = facts(tmp_path, model, "two", processes=2)
    for found in both:
        check_weighed(found, ROUNDED)
        check_arrived(found, ROUNDED)
        assert found["parts"] == 2
    assert both[0]["completions"] != both[1]["completions"]


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[int]:
    """The port of vLLM's server, which takes weights over TCP."""
    plugin = folder / "plugin"
    plugin.mkdir()
    transfer = ("--weight-transfer-config", '{"backend": "tcp"}')
    server = RealServer(
        model, folder / "log", *transfer, *options, plugin=save_plugin(plugin, "tcp_transfer")
    )
    try:
        yield server.start().port
    finally:
        server.stop()


def test_a_server(model: Path, tmp_path: Path):
    """By host and port, then by its address; TRL's own client refuses a CPU."""
    parts = ("without_nccl", "plain", "regex", "lora")
    with serving(model, tmp_path) as port:
        without_nccl, plain, regex, lora = facts(tmp_path, model, *parts, port=port)
    assert "NCCL weight-transfer engine, which needs a CUDA device" in without_nccl["error"]
    check_weighed(plain, SAME)
    for found in (plain, regex):
        check_gradients(found, "a server")
    for found in (plain, regex, lora):
        check_arrived(found, SAME)
    assert all(re.fullmatch("[a-f]{3}", text) for text in regex["texts"])
    assert max(lora["ratio"]) < SAME and not lora["merged"]


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by vLLM's Python, since TRL, whose chat template it has, may be installed there alone.

    Heads have 32 dimensions, the fewest that vLLM's CPU attention takes.
    """
    needs_trl()
    folder = tmp_path_factory.mktemp("tools")
    save = f"import trl_tools; trl_tools.save_tool_model(trl_tools.Path({str(folder)!r}), width=64)"
    subprocess.run([BIN / "python", "-c", save], cwd=WORKER.parent, env=environment(), check=True)
    return folder


def test_turns_of_a_form(tool_model: Path, tmp_path: Path):
    """With tools, with an environment, and with each mode of importance weights."""
    parts = ("tools", "environment", "modes")
    tools, environment, modes = facts(tmp_path, tool_model, *parts, worker=TOOLS)
    check_tools(tools, ROUNDED)
    check_tools(environment, None)
    for mode, found in modes.items():
        assert max(found["weights"]) < ROUNDED, mode
        assert 0 < found["bounded"][0] < 1, mode
        check_gradients(found, mode)


@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_engines_beside_sharded_weights(
    tool_model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """In two processes, each with an engine of its own, to which TRL gathers the weights."""
    if kind != "fsdp2":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        found = subprocess.run([BIN / "python", "-c", "import deepspeed"], capture_output=True)
        if found.returncode:
            pytest.skip(f"deepspeed is not installed for {BIN / 'python'}")
    both = facts(tmp_path, tool_model, kind, processes=2, worker=SHARDED)
    total = sum(weight.numel() for weight in load_file(tool_model / "model.safetensors").values())
    for found in both:
        check_arrived(found, ROUNDED)
        assert found["kind"] == ("FSDP" if kind == "fsdp2" else "DEEPSPEED")
        assert (found["held"] < 0.7 * total) == (kind != "zero2")
        assert found["gradient"] < 1e-5 and max(found["weights"]) < ROUNDED
        assert min(found["calls"]) >= 2
    assert both[0]["calls"] != both[1]["calls"]


def test_tools_of_two_processes_with_one_server(tool_model: Path, tmp_path: Path):
    """Which sample other numbers of turns behind tools' results, each for its own prompts."""
    with serving(tool_model, tmp_path, "--max-model-len", "2048") as port:
        both = facts(tmp_path, tool_model, "tools", port=port, processes=2, worker=TOOLS)
    for found in both:
        check_tools(found, SAME)
    assert both[0]["calls"] != both[1]["calls"]
