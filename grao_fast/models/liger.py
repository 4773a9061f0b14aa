"""Liger's layers in place of a model's own: norms, rotary embeddings and MLPs, on CUDA."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from grao_fast.system.errors import UserError
from grao_fast.system.optional import import_optional
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)


def use_liger_layers(causal_lm: PreTrainedModel, device: torch.device) -> None:
    """Replace a model's layers by Liger's, as Trainer does; ignored on a CPU, with a log line.

    device: on which the model will run.

    Liger's losses are not used, since `linear_grao_loss` replaces head and loss. Liger replaces
    rotary embeddings in the module of the model's type, hence in all such models of this process.

    Raises:
        UserError: Liger is not installed, or does not know the model's type.
    """
    if device.type != "cuda":
        logger.info("use_liger_kernel is off: it needs CUDA, this run is on %s", device)
        return
    import_optional("liger_kernel", extra="liger", option="use_liger_kernel")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = causal_lm.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger itself only logs this
        raise UserError(
            f"use_liger_kernel: Liger has no layers for model type {model_type!r}; leave it out"
        )
    _apply_liger_kernel_to_instance(
        model=causal_lm, cross_entropy=False, fused_linear_cross_entropy=False
    )
    logger.info("Liger's layers are in %s", type(causal_lm).__name__)
