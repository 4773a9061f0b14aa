"""A backend of vLLM's weight transfer that needs no GPU: tensors go in a file.

Loaded as a plugin by vLLM's workers (`register_worker`, an entry point that the test writes) and by
the script that trains (`register_trainer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer import base, factory

NAME = "folder"


@dataclass
class WorkerInit(base.WeightTransferInitInfo):
    folder: str


@dataclass
class Update(base.WeightTransferUpdateInfo):
    file: str


class WorkerEngine(base.WeightTransferEngine[WorkerInit, Update]):
    """As vLLM's own do it, but for where tensors come from."""

    init_info_cls = WorkerInit
    update_info_cls = Update

    def init_transfer_engine(self, init_info: WorkerInit) -> None:
        self.folder = Path(init_info.folder)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Update) -> None:
        self.model.load_weights(iter(load_file(self.folder / update_info.file).items()))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@dataclass
class TrainerInit(base.TrainerInitInfo):
    backend: ClassVar[str] = NAME
    folder: str = field(kw_only=True)


class TrainerEngine(base.TrainerWeightTransferEngine[TrainerInit]):
    init_info_cls = TrainerInit

    @classmethod
    def trainer_init(cls, init_info, *, client, source=None):
        engine = cls(client=client, source=source, is_sender=True)
        engine.folder, engine.count = Path(init_info.folder), 0
        client.init_weight_transfer_engine({"folder": init_info.folder})
        return engine

    def send_weights(self) -> None:
        self.count += 1
        file = f"{self.count}.safetensors"
        self.client.start_weight_update()
        declared = {meta.name for meta in self.source.metadata()}
        tensors = {name: tensor.detach().clone() for name, tensor in self.source}
        assert tensors.keys() == declared
        save_file(tensors, self.folder / file)
        self.client.update_weights({"file": file})
        self.client.finish_weight_update()


def register_worker() -> None:
    if NAME not in factory.WeightTransferEngineFactory._registry:
        factory.WeightTransferEngineFactory.register_engine(NAME, WorkerEngine)


def register_trainer(folder: Path) -> None:
    from grao_fast.sampling.vllm.transfer import BACKENDS

    factory.WeightTransferTrainerFactory.register_engine(NAME, TrainerEngine)
    BACKENDS[NAME] = lambda client: TrainerInit(folder=str(folder), rank=0)
