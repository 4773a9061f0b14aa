"""Weights by vLLM's weight transfer, with stand-ins for its library and for NCCL.

test_vllm_real.py has the routes of vLLM's own server.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_trainer import lines, rarely_equal, run
from test_vllm_server import config
from vllm_server import FakeVLLM, serving

from grao_fast.sampling.loading import load_policy

pytest.importorskip("openai", reason="openai, the client of a vLLM server, is not installed")


@dataclass
class Init:
    master_address: str
    master_port: int
    world_size: int
    rank: int


@dataclass
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Sender:
    """Asks for what vLLM's NCCL sender asks for, in its order; the bytes go through a file."""

    folder: Path

    def __init__(self, init_info: Init, *, client, source) -> None:
        self.client, self.source = client, source
        client.init_weight_transfer_engine(asdict(init_info))

    def send_weights(self) -> None:
        self.client.start_weight_update()
        meta = self.source.metadata()
        tensors = dict(self.source)
        assert [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()] == [
            (each.name, each.dtype, each.shape) for each in meta
        ]
        file = self.folder / "sent.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)
        names = [each.name for each in meta]
        self.client.update_weights({"names": names, "file": str(file)})
        self.client.finish_weight_update()


@pytest.fixture
def fake(tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    """A server that was started for NCCL, and vLLM's library beside the trainer."""
    fake = FakeVLLM(tiny_model)
    stand_in(fake, tmp_path, monkeypatch)
    return fake


def stand_in(fake: FakeVLLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.transfer_backend = "nccl"
    monkeypatch.setattr(Sender, "folder", folder, raising=False)
    modules = {
        "base": {"WeightSource": object, "ParamMeta": ParamMeta},
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=Sender)},
        "nccl_engine": {"NCCLTrainerInitInfo": Init},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"vllm.distributed.weight_transfer.{name}", module)
    network = ModuleType("network_utils")
    vars(network).update(get_ip=lambda: "10.0.0.1", get_open_port=lambda: 4321)
    monkeypatch.setitem(sys.modules, "vllm.utils.network_utils", network)
    for parent in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer", "vllm.utils"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))


def test_every_sync_goes_by_the_routes_with_the_server_paused(
    fake: FakeVLLM, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setattr("grao_fast.sampling.vllm.handover.cannot_transfer", lambda *_: "")
    with serving(fake) as url:
        result = run(tiny_model, tmp_path, config=config(url, max_steps=2), reward=rarely_equal)
    assert fake.transfer == asdict(Init("10.0.0.1", 4321, world_size=3, rank=0))
    changing = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update",
                "/reset_prefix_cache", "/resume")  # fmt: skip
    asked = [path for path, _ in fake.requests if path in changing]
    assert asked == list(changing) * 4
    assert not fake.paths("/collective_rpc")
    names = fake.paths("/update_weights")[0]["update_info"]["names"]
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(names)
    assert max(row["sampling/logp_diff"] for row in lines(tmp_path)) < 1e-5
    theirs = fake.model.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in result.model.state_dict().items())


def test_a_restarted_server_ends_the_run(fake: FakeVLLM, tiny_model, monkeypatch):
    monkeypatch.setattr("grao_fast.sampling.vllm.handover.cannot_transfer", lambda *_: "")
    with serving(fake) as url:
        loaded = load_policy(tiny_model, config=config(url))
        loaded.sampler.sync(loaded.policy)
        fake.start()
        with pytest.raises(ConnectionError, match="was restarted, and its weight transfer with it"):
            loaded.sampler.sample(
                [[5]], num_generations=1, max_new_tokens=1, temperature=1.0, seeds=[0]
            )
        assert not fake.paused


FOLDER = {
    "a policy on a CPU": ("nccl", "NCCL sends from a GPU, and the policy is on cpu"),
    "another backend": ("sharded_rdt", "its weight transfer backend 'sharded_rdt' is not one of"),
}


@pytest.mark.parametrize("case", FOLDER)
def test_where_it_does_not_serve_a_folder_does_and_it_is_said(fake, tiny_model, case, caplog):
    fake.transfer_backend, reason = FOLDER[case]
    with serving(fake) as url, caplog.at_level("INFO"):
        loaded = load_policy(tiny_model, config=config(url))
        loaded.sampler.sync(loaded.policy)
    assert f"gets weights through a folder: {reason}" in caplog.text
    assert len(fake.paths("/collective_rpc")) == 2
