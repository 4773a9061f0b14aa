"""A real `vllm serve`, for the tests marked `vllm`; GRAO_VLLM names its executable's folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from tiny import save_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

BIN = Path(os.environ.get("GRAO_VLLM") or "/nowhere")
STARTED_WITHIN = 180.0  # seconds; 25 on idle cores


def save_model(folder: Path, *, tied: bool, context: int = 512) -> Path:
    """The tiny model with heads of 32 dimensions, the fewest that vLLM's CPU attention takes."""
    save_tiny_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.hidden_size, config.head_dim, config.tie_word_embeddings = 128, 32, tied
    config.max_position_embeddings = context
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def environment(**changes: str) -> dict[str, str]:
    """One thread, a cache of 1 GiB, no network."""
    small = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | small | changes


def save_plugin(folder: Path, name: str = "folder_transfer") -> Path:
    """A folder for PYTHONPATH, from which vLLM takes a module of the tests as a plugin."""
    shutil.copy(Path(__file__).with_name(f"{name}.py"), folder)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    entry = f"[vllm.general_plugins]\n{name} = {name}:register_worker\n"
    (info / "entry_points.txt").write_text(entry)
    return folder


class RealServer:
    """`vllm serve MODEL` on a port of its own; `start` and `stop` as often as needed."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *options: str,
        dev_mode: bool = True,
        plugin: Path | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.env = environment(
            VLLM_SERVER_DEV_MODE=str(int(dev_mode)), VLLM_ALLOW_RUNTIME_LORA_UPDATING="1"
        ) | ({"PYTHONPATH": str(plugin)} if plugin else {})
        self.command = [
            str(BIN / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(self.port),
            "--logprobs-mode", "processed_logprobs", "--enforce-eager", "--dtype", "float32",
            "--max-model-len", "512", *options,
        ]  # fmt: skip
        self.process: subprocess.Popen | None = None

    def start(self) -> RealServer:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env=self.env,
                cwd=self.log.parent,
                start_new_session=True,
            )
        deadline = time.monotonic() + STARTED_WITHIN
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("vLLM did not start:\n" + self.log.read_text()[-3000:])
            time.sleep(0.3)
        return self

    def stop(self) -> None:
        """Kill it, its engine and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
