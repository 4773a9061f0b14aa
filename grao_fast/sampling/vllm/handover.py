"""Ways to give a vLLM server the policy's weights; a run chooses one and logs it.

All processes of a run take part in gathering weights, and rank 0 alone talks to the server.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Literal, Protocol

from grao_fast.distributed.world import World
from grao_fast.models.adapters import is_peft_model
from grao_fast.models.policy import Policy
from grao_fast.sampling.changes import Change, Negated, Swapped
from grao_fast.sampling.vllm.client import VLLMClient
from grao_fast.sampling.vllm.transfer import WeightTransfer, cannot_transfer
from grao_fast.sampling.weights import WeightFolder
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


class HandOver(Protocol):
    """A way to hand weights over, used by all processes together while the server pauses.

    model: the name to ask for afterwards.
    """

    model: str

    def give(self, policy: Policy) -> None:
        """Give the server the policy's weights; returns when it has them."""
        ...

    def give_again(self) -> None:
        """Give a restarted server the last weights again."""
        ...

    def change(self, policy: Policy) -> Change:
        """A change of all tensors that are handed over, for the check that they arrive."""
        ...


class WholeModel:
    """Hands over all weights, adapters merged, as a checkpoint that workers load in place."""

    def __init__(
        self, client: VLLMClient, folder: WeightFolder, *, model: str, world: World
    ) -> None:
        self._client, self._folder, self.model, self._world = client, folder, model, world
        self._last: Path | None = None

    def give(self, policy: Policy) -> None:
        self._last = self._folder.write(policy)
        self.give_again()

    def give_again(self) -> None:
        self._world.main(self._load)

    def _load(self) -> None:
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(self._last)}}
        try:
            self._client.call("post", "/collective_rpc", arguments)
        except ConnectionError as error:
            raise ConnectionError(
                f"the vLLM server did not load the weights in {str(self._last)!r}; vllm_sync_dir "
                f"must be a folder that it sees under that path, and may read: {error}"
            ) from error

    def change(self, policy: Policy) -> Change:
        return Negated(policy.causal_lm)


class AdapterAlone:
    """Hands over a LoRA adapter, under a new name each time, since caches go by the name."""

    def __init__(self, client: VLLMClient, folder: WeightFolder, *, world: World) -> None:
        self._client, self._folder, self._world = client, folder, world
        self._run, self._count = uuid.uuid4().hex[:12], 0
        self._last: Path | None = None
        self.model = ""

    def give(self, policy: Policy) -> None:
        self._last = self._folder.write_adapter(policy)
        self.give_again()

    def give_again(self) -> None:
        self.model = self._world.main(self._load)

    def _load(self) -> str:
        """Load the adapter, and unload the one before; returns its name."""
        self._count += 1
        name = f"grao-fast-{self._run}-{self._count}"
        try:
            self._client.call(
                "post", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._last)}
            )
        except (ConnectionError, ValueError) as error:
            raise ConnectionError(
                f"the vLLM server did not load the adapter in {str(self._last)!r}; vllm_sync_dir "
                f"must be a folder that it sees under that path, and may read: {error}"
            ) from error
        # A restarted server no longer has the old adapter, and would answer as if without a route.
        if self.model in {card["id"] for card in self._client.call("get", "/v1/models")["data"]}:
            self._client.call("post", "/v1/unload_lora_adapter", {"lora_name": self.model})
        return name

    def change(self, policy: Policy) -> Change:
        return Swapped(policy.model, lambda name: ".lora_" in name)


def choose_hand_over(
    policy: Policy, client: VLLMClient, folder: WeightFolder, *, model: str
) -> HandOver:
    """Choose the adapter alone if the server accepts it, else the whole model.

    The whole model goes by vLLM's weight transfer if the server was started with a backend that
    works here, else through a folder. Every process must call it.
    """
    world = policy.world
    kind, backend = world.main(lambda: _choice(policy, client))
    if kind == "adapter":
        return AdapterAlone(client, folder, world=world)
    if kind == "folder":
        return WholeModel(client, folder, model=model, world=world)
    return WeightTransfer(client, backend=backend, model=model, world=world)


def _choice(policy: Policy, client: VLLMClient) -> tuple[Literal["adapter", "folder", "send"], str]:
    """The way to hand over, and the backend that sends."""
    info = client.info()
    if is_peft_model(policy.model):
        reason = _merged_because(policy.model, info)
        if not reason:
            logger.info("the vLLM server at %s gets the adapter alone", client.base_url)
            return "adapter", ""
        logger.info("the vLLM server gets the adapter merged into its model: %s", reason)
    transfer = info["vllm_config"].get("weight_transfer_config")
    if not transfer:
        return "folder", ""
    backend = transfer["backend"]
    if reason := cannot_transfer(policy, backend):
        logger.info("the vLLM server gets weights through a folder: %s", reason)
        return "folder", ""
    logger.info("the vLLM server gets weights by its weight transfer, over %s", backend)
    return "send", backend


def _merged_because(model: Any, info: dict[str, Any]) -> str:
    """Why an adapter cannot be handed over alone; "" if it can."""
    lora = info["vllm_config"].get("lora_config")
    if not lora:
        return "it was started without --enable-lora"
    if not (info.get("vllm_env") or {}).get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        return "it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    if len(model.peft_config) > 1:
        return f"there are several, {', '.join(model.peft_config)}"
    (config,) = model.peft_config.values()
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        return f"vLLM serves LoRA, not {config.peft_type}"
    largest = max(config.r, *(getattr(config, "rank_pattern", None) or {}).values(), config.r)
    if largest > lora["max_lora_rank"]:
        return f"its rank is {largest}, and the server's --max-lora-rank {lora['max_lora_rank']}"
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() != "gaussian":
        return f"init_lora_weights={init!r} changes the model under it"
    others = [n for n, p in model.named_parameters() if p.requires_grad and not _is_factor(n)]
    if config.use_dora or others:
        return f"{'DoRA' if config.use_dora else others[0]} is trained too"
    return ""


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
