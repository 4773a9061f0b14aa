"""vLLM's weight transfer by NCCL, as TRL uses it, with tensors sent over TCP, which needs no GPU.

Loaded as a plugin by vLLM's workers (`register_worker`, an entry point that the tests write) and by
the script that trains (`Client`). The messages over HTTP are those of TRL and of vLLM's own engine
for NCCL; the group that both sides open, and the broadcast in it, are in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import vllm._custom_ops
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import factory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

NAME = "tcp"


class WorkerEngine(NCCLWeightTransferEngine):
    """vLLM's engine for NCCL, but for the group and the broadcast in it."""

    def init_transfer_engine(self, init_info: Any) -> None:
        self.model_update_group = StatelessProcessGroup.create(
            host=init_info.master_address,
            port=init_info.master_port,
            rank=init_info.rank_offset + self.parallel_config.rank,
            world_size=init_info.world_size,
        )

    def receive_weights(self, update_info: Any) -> None:
        for name in update_info.names:
            tensor = self.model_update_group.broadcast(torch.empty(0), src=0)
            self.model.load_weights([(name, tensor)])

    def shutdown(self) -> None:
        self.model_update_group = None


def keep_weights_in_place() -> None:
    """Have vLLM compute linear layers by PyTorch, from the weights that are loaded, as on a GPU.

    On CPUs it packs weights for oneDNN when it has loaded them. TRL could not write to them then in
    this process, and a server's tied head, which TRL sends as the embeddings alone, would stay.
    """
    vllm._custom_ops._supports_onednn = False


def register_worker() -> None:
    keep_weights_in_place()
    if NAME not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(NAME, WorkerEngine)


def open_endpoint(init_info: dict[str, Any]) -> Any:
    """In place of vLLM's `trainer_init`."""
    group = StatelessProcessGroup.create(
        host=init_info["master_address"],
        port=init_info["master_port"],
        rank=0,
        world_size=init_info["world_size"],
    )
    return SimpleNamespace(group=group)


def send(
    *, iterator: Iterator[tuple[str, torch.Tensor]], group: Any, src: int, post_iter_func: Callable
) -> None:
    """In place of vLLM's `packed_nccl_broadcast_producer`."""
    for item in iterator:
        group.group.broadcast(post_iter_func(item), src=src)
