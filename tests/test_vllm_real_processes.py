"""Several processes with vLLM's own server, on CPUs; see test_vllm_real.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import differences, run_all
from real_vllm import BIN, RealServer, save_model
from test_parity import ROUNDING
from test_trainer import lines
from test_vllm_real import ENGINE, run_script

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (BIN / "vllm").exists(), reason="GRAO_VLLM names no folder with a vllm executable"
    ),
]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_two_processes_train_as_one_with_a_server(tmp_path: Path, name: str):
    """The weights that they gather arrive, and completions are those of one process."""
    model = save_model(tmp_path / "models" / name, tied=name == "tied")
    server = RealServer(model, tmp_path / "log")
    try:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        server.start()
        for size in (1, 2):
            run_all([name], tmp_path, size, steps=3, options=options)
    finally:
        server.stop()
    off = differences(tmp_path / f"{name} 1", tmp_path / f"{name} 2")
    assert off["samples"] == off["reward"] == 0
    assert max(off["loss"], off["weights"]) <= ROUNDING
    assert max(row["sampling/logp_diff"] for row in lines(tmp_path / f"{name} 2")) < 2e-6
    said = server.log.read_text()
    assert said.count("POST /collective_rpc") == 2 * (3 + 2)  # both runs, twice before a first step


@pytest.mark.parametrize("share", [1, 2])
def test_two_processes_train_as_one_with_engines(tmp_path: Path, share: int):
    """With an engine each, or one whose two parts sample the prompts of both."""
    model = save_model(tmp_path / "model", tied=False)
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        options = ENGINE.format(64) + ", log_completions_steps=1"
        if size == 2:
            options += f", vllm_tensor_parallel_size={share}"
        done = run_script(model, folder, options, processes=size)
        assert done.returncode == 0, done.stderr[-3000:]
    off = differences(tmp_path / "1" / "output", tmp_path / "2" / "output")
    assert off["samples"] == off["reward"] == 0
    assert max(off["loss"], off["weights"]) <= ROUNDING
    assert max(row["sampling/logp_diff"] for row in lines(tmp_path / "2" / "output")) < 2e-6
    assert "Traceback" not in done.stderr
