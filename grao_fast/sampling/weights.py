"""Writing the policy's weights to a folder, for a sampler in another process."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grao_fast.models.policy import Policy
from grao_fast.models.saving import save_pretrained
from grao_fast.system.errors import UserError
from grao_fast.system.files import named_when_full
from grao_fast.system.lock import LOCK_FILE, only_run_in

_PREFIX = "grao-fast-weights-"


class WeightFolder:
    """Writes checkpoints that `from_pretrained` and vLLM read, each under a name of its own.

    A reader may still have files of an earlier checkpoint mapped, so no name is used twice. Only
    the last checkpoint is kept, and it is deleted with this object.

    Args:
        parent: an existing folder; None: the system's for temporary files.
        tokenizer: written beside whole models.

    Raises:
        UserError: the folder does not exist or cannot be written to.
    """

    def __init__(self, parent: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        try:
            self._root = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent)
        except OSError as error:
            raise UserError(
                f"cannot write to vllm_sync_dir {parent!r}: {error.strerror}; name a folder that "
                "this process and vLLM's see under the same path"
            ) from error
        self._lock = only_run_in(Path(self._root.name))  # held for the life of this object
        self._lock.__enter__()
        _clear_left_overs(Path(self._root.name).parent)
        self._last: Path | None = None
        self._count = 0

    def write(self, policy: Policy) -> Path:
        """Write the policy's weights and the tokenizer to a new folder; delete the one before."""
        folder = self._next()
        model = merged(policy)
        with named_when_full(folder, folder):
            save_pretrained(model, folder, state_dict=_on_cpu(model, policy.autocast_dtype))
            self._tokenizer.save_pretrained(folder)
        return self._only(folder)

    def write_adapter(self, policy: Policy) -> Path:
        """The policy's only adapter, as peft saves it, in a new folder; see `write`."""
        folder = self._next()
        (name,) = policy.model.peft_config  # pyright: ignore[reportGeneralTypeIssues]
        with named_when_full(folder, folder):
            policy.model.save_pretrained(folder, save_embedding_layers=False)  # pyright: ignore[reportCallIssue]
        self._only(folder)
        return folder if name == "default" else folder / name

    def _next(self) -> Path:
        self._count += 1
        return Path(self._root.name) / f"weights-{self._count}"

    def _only(self, folder: Path) -> Path:
        if self._last is not None:
            shutil.rmtree(self._last)
        self._last = folder
        return folder


def _clear_left_overs(parent: Path) -> None:
    """Delete the weights that killed runs have left, which may be in memory (/dev/shm)."""
    for folder in parent.glob(f"{_PREFIX}*"):
        # Without a lock, it is being made now. Path.exists would raise for another user's folder.
        if os.path.exists(folder / LOCK_FILE):
            # ValueError: in use; the others: deleted meanwhile by another run, or another user's.
            with (
                suppress(ValueError, FileNotFoundError, PermissionError),
                only_run_in(folder, watch=False),
            ):
                shutil.rmtree(folder)


def merged(policy: Policy) -> PreTrainedModel:
    """The Transformers model, or a copy with the adapter merged if one is trained.

    Merging into the model itself and unmerging would round its weights.
    """
    if not hasattr(policy.model, "peft_config"):
        return policy.causal_lm
    return copy.deepcopy(policy.model).merge_and_unload()


def _on_cpu(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The model's state on the CPU in the dtype that vLLM computes in, no two names sharing memory.

    Transformers writes tensors that share memory under one name. vLLM would load a tied head into
    the embeddings alone, and where it keeps the head as a packed copy, as on CPUs, not update it.
    """
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        sent = tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        if sent.data_ptr() in seen:
            sent = sent.clone()
        seen.add(sent.data_ptr())
        state[name] = sent
    return state
