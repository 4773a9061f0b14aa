"""Writing the policy's weights to a folder, for a sampler in another process."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grao_fast.distributed.world import World
from grao_fast.models.adapters import saved_names
from grao_fast.models.policy import Policy
from grao_fast.models.saving import save_pretrained
from grao_fast.models.sharding import reshard, whole
from grao_fast.models.whole_weights import WholeWeights
from grao_fast.system.errors import UserError
from grao_fast.system.files import named_when_full
from grao_fast.system.lock import LOCK_FILE, only_run_in

_PREFIX = "grao-fast-weights-"
_FILE = 1 << 30  # bytes of tensors after which a file is written


class WeightFolder:
    """Writes checkpoints that `from_pretrained` and vLLM read, each under a name of its own.

    A reader may still have files of an earlier checkpoint mapped, so no name is used twice. Only
    the last checkpoint is kept, and it is deleted with this object. Rank 0 writes; the other
    processes only take part in gathering weights.

    Args:
        parent: an existing folder; None: the system's for temporary files.
        tokenizer: written beside whole models.
        world: the processes that write together.

    Raises:
        UserError: the folder does not exist or cannot be written to.
    """

    def __init__(
        self, parent: str | None, tokenizer: PreTrainedTokenizerBase, world: World
    ) -> None:
        self._tokenizer, self._world = tokenizer, world
        self._last: Path | None = None
        self._count = 0
        if not world.is_main:
            return
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

    def write(self, policy: Policy) -> Path:
        """Write the policy's weights and the tokenizer to a new folder; delete the one before.

        Returns the folder. Every process must call it.
        """

        def write(layers: Iterator[dict[str, Tensor]]) -> Path:
            folder = self._next()
            with named_when_full(folder, folder):
                save_pretrained(policy.causal_lm, folder, state_dict={})
                _write_files(layers, folder)
                self._tokenizer.save_pretrained(folder)
            return self._only(folder)

        return WholeWeights(policy).read(write)

    def write_adapter(self, policy: Policy) -> Path:
        """The policy's only LoRA adapter, as peft saves it, in a new folder; see `write`."""
        reshard(policy.causal_lm)
        state = policy.model.state_dict()
        # sorted, as sets differ in order between processes, which must gather in the same
        saved = {name: whole(state[name]).cpu() for name in sorted(saved_names(policy.model))}
        (name,) = policy.model.peft_config  # pyright: ignore[reportGeneralTypeIssues]

        def write() -> Path:
            folder = self._next()
            with named_when_full(folder, folder):
                policy.model.save_pretrained(  # pyright: ignore[reportCallIssue]
                    folder, state_dict=saved, save_embedding_layers=False
                )
            self._only(folder)
            return folder if name == "default" else folder / name

        return self._world.main(write)

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


def _write_files(layers: Iterable[dict[str, Tensor]], folder: Path) -> None:
    """Write tensors as safetensors files with an index, each when it is large enough."""
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}

    def write() -> None:
        file = SAFE_WEIGHTS_NAME.replace(".", f"-{len(set(places.values())) + 1:05d}.")
        save_file(_unshared(held), folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for tensors in layers:
        held |= {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in held.values()) >= _FILE:
            write()
    if held:
        write()
    (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # of a model without tensors
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(index, encoding="utf-8")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where two share memory.

    vLLM would otherwise load a tied head into the embeddings alone, and where it keeps the head as
    a packed copy, as on CPUs, not update it.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        sent = tensor.contiguous()
        if sent.data_ptr() in seen:
            sent = sent.clone()
        seen.add(sent.data_ptr())
        found[name] = sent
    return found
