"""Ways by which a vLLM server gets the policy's weights; one is chosen for a run, and logged."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any, Protocol

from grao_fast.models.adapters import is_peft_model
from grao_fast.models.policy import Policy
from grao_fast.sampling.changes import Change, Negated, Swapped
from grao_fast.sampling.vllm.client import VLLMClient
from grao_fast.sampling.vllm.transfer import WeightTransfer, cannot_transfer
from grao_fast.sampling.weights import WeightFolder
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


class HandOver(Protocol):
    """One way. The server has no request under way while it is used.

    model: the name to ask for afterwards.
    """

    model: str

    def give(self, policy: Policy) -> None:
        """Returns when the server has the policy's weights."""
        ...

    def give_again(self) -> None:
        """What was given last, to a server that was restarted."""
        ...

    def change(self, policy: Policy) -> Change:
        """Of all that is given; for the proof that it arrives."""
        ...


class WholeModel:
    """All weights, an adapter merged, as a checkpoint that the server's workers load in place."""

    def __init__(self, client: VLLMClient, folder: WeightFolder, *, model: str) -> None:
        self._client, self._folder, self.model = client, folder, model
        self._last: Path | None = None

    def give(self, policy: Policy) -> None:
        self._last = self._folder.write(policy)
        self.give_again()

    def give_again(self) -> None:
        arguments = {"method": "reload_weights", "kwargs": {"weights_path": str(self._last)}}
        try:
            self._client.call("post", "/collective_rpc", arguments)
        except ConnectionError as error:
            raise ConnectionError(
                f"the vLLM server did not load the weights in {str(self._last)!r}; vllm_sync_dir "
                f"must be a folder that it sees under that path, and may read: {error}"
            ) from error

    def change(self, policy: Policy) -> Change:
        return Negated(policy.causal_lm.parameters())


class AdapterAlone:
    """A LoRA adapter as one, under a new name each time: what is cached goes by the name."""

    def __init__(self, client: VLLMClient, folder: WeightFolder) -> None:
        self._client, self._folder = client, folder
        self._run, self._count = uuid.uuid4().hex[:12], 0
        self._last: Path | None = None
        self.model = ""

    def give(self, policy: Policy) -> None:
        self._last = self._folder.write_adapter(policy)
        self.give_again()

    def give_again(self) -> None:
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
        before, self.model = self.model, name
        # a server that was restarted since has it no more, and would answer as if it had no route
        if before in {card["id"] for card in self._client.call("get", "/v1/models")["data"]}:
            self._client.call("post", "/v1/unload_lora_adapter", {"lora_name": before})

    def change(self, policy: Policy) -> Change:
        return Swapped(p for name, p in policy.model.named_parameters() if ".lora_" in name)


def choose_hand_over(
    policy: Policy, client: VLLMClient, folder: WeightFolder, *, model: str
) -> HandOver:
    """The adapter alone where there is one and the server takes it; else the whole model.

    That goes by vLLM's weight transfer where the server was started with a backend which serves
    here, else through a folder.
    """
    info = client.info()
    if is_peft_model(policy.model):
        reason = _merged_because(policy.model, info)
        if not reason:
            logger.info("the vLLM server at %s gets the adapter alone", client.base_url)
            return AdapterAlone(client, folder)
        logger.info("the vLLM server gets the adapter merged into its model: %s", reason)
    transfer = info["vllm_config"].get("weight_transfer_config")
    if not transfer:
        return WholeModel(client, folder, model=model)
    backend = transfer["backend"]
    if reason := cannot_transfer(policy, backend):
        logger.info("the vLLM server gets weights through a folder: %s", reason)
        return WholeModel(client, folder, model=model)
    logger.info("the vLLM server gets weights by its weight transfer, over %s", backend)
    return WeightTransfer(client, backend=backend, model=model)


def _merged_because(model: Any, info: dict[str, Any]) -> str:
    """Why an adapter cannot be sent alone; "" where it can."""
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
