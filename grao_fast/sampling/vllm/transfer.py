"""Weight transfer by vLLM's own routes over NCCL, from the trainer's GPU to the server's.

vLLM's library sends the weights, so it must be installed for the trainer too (0.32 or later). The
routes are tested on CPUs with a backend of the tests; NCCL is untested.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from grao_fast.distributed.world import World
from grao_fast.models.policy import Policy
from grao_fast.models.whole_weights import WholeWeights
from grao_fast.sampling.changes import Change, Negated
from grao_fast.sampling.vllm.client import VLLMClient
from grao_fast.sampling.vllm.requests import FAILURES
from grao_fast.system.errors import explained

_BASE = "vllm.distributed.weight_transfer.base"
_FACTORY = "vllm.distributed.weight_transfer.factory"
_NCCL = "vllm.distributed.weight_transfer.nccl_engine"


class WeightTransfer:
    """A `HandOver` of all weights, adapters merged, by a backend of vLLM's weight transfer.

    Rank 0 sends each tensor as soon as all processes have gathered it. A restarted server has lost
    its end of the connection, which ends the run.
    """

    def __init__(self, client: VLLMClient, *, backend: str, model: str, world: World) -> None:
        self.model, self._base_url = model, client.base_url
        self._client, self._backend = client, backend
        self._weights: Any = None
        self._sender: Any = None
        world.main(self._start)

    def _start(self) -> None:
        self._weights = _source()
        with explained("vLLM's weight transfer did not start", *FAILURES):
            factory = importlib.import_module(_FACTORY).WeightTransferTrainerFactory
            self._sender = factory.trainer_init(
                BACKENDS[self._backend](self._client),
                client=_Routes(self._client),
                source=self._weights,
            )

    def give(self, policy: Policy) -> None:
        weights = WholeWeights(policy)

        def send(layers: Iterator[dict[str, Tensor]]) -> None:
            self._weights.outline, self._weights.layers = weights.outline(), layers
            with explained("vLLM's weight transfer failed", *FAILURES):
                self._sender.send_weights()

        weights.read(send)

    def give_again(self) -> None:
        raise ConnectionError(
            f"the vLLM server at {self._base_url} was restarted, and its weight transfer with it: "
            "resume from the last checkpoint"
        )

    def change(self, policy: Policy) -> Change:
        return Negated(policy.causal_lm)


def cannot_transfer(policy: Policy, backend: str) -> str:
    """Why a backend cannot transfer weights; "" if it can."""
    if backend not in BACKENDS:
        return f"its weight transfer backend {backend!r} is not one of {', '.join(BACKENDS)}"
    if backend == "nccl" and policy.device.type != "cuda":
        return f"NCCL sends from a GPU, and the policy is on {policy.device}"
    try:
        importlib.import_module(_FACTORY)
    except ImportError:
        return "its weight transfer needs vLLM 0.32 or later for the trainer too"
    return ""


class _Routes:
    """The requests of vLLM's library to a server, sent by our client, which has the API key."""

    def __init__(self, client: VLLMClient) -> None:
        self._client = client

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._client.call("post", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._client.call("post", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._client.call("post", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.call("post", "/finish_weight_update")


def _source() -> Any:
    """The policy's weights as vLLM's `WeightSource`, to be read once."""
    base = importlib.import_module(_BASE)

    class Weights(base.WeightSource):
        outline: dict[str, Tensor]
        layers: Iterator[dict[str, Tensor]]

        def metadata(self) -> list[Any]:
            return [base.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.outline.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return (pair for tensors in self.layers for pair in tensors.items())

    return Weights()


def _nccl(client: VLLMClient) -> Any:
    """Where trainer (rank 0) and workers connect: this machine's address and a free port."""
    network = importlib.import_module("vllm.utils.network_utils")
    workers = client.call("get", "/get_world_size")["world_size"]
    return importlib.import_module(_NCCL).NCCLTrainerInitInfo(
        master_address=network.get_ip(),
        master_port=network.get_open_port(),
        world_size=workers + 1,
        rank=0,
    )


BACKENDS: dict[str, Callable[[VLLMClient], Any]] = {"nccl": _nccl}
