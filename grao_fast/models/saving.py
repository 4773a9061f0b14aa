"""Saving models for `from_pretrained`, and a trial of it before any work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from grao_fast.distributed.world import World
from grao_fast.models.adapters import saved_names
from grao_fast.models.policy import causal_lm_of
from grao_fast.models.sharded_saving import copies, gathered_tensors, hold_sharded, save_sharded
from grao_fast.models.sharding import local, own_class, reshard
from grao_fast.system.bars import no_bar
from grao_fast.system.errors import UserError, one_line
from grao_fast.system.files import NEW, named_when_full
from grao_fast.system.visible import get_logger

logger = get_logger(__name__)

_REASON_LENGTH = 400


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World
) -> None:
    """Write tokenizer and weights for `from_pretrained`; of a PeftModel the adapter's alone.

    Every process must call it. A model is written by all of them, an adapter by rank 0.
    """
    reshard(model)
    if world.size == 1:
        save_pretrained(model, folder)
    elif isinstance(model, PreTrainedModel):
        save_sharded(model, folder, world, save_pretrained)
    else:
        state = model.state_dict()
        # sorted, as sets differ in order between processes, which must gather in the same
        names = sorted(saved_names(model, "auto"))
        adapter = dict(gathered_tensors(model, state, names))
        world.main(lambda: save_pretrained(model, folder, adapter), held=True)
    world.main(lambda: tokenizer.save_pretrained(folder), held=True)


def hold_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World
) -> Callable[[Path, World], None]:
    """Copy what `save_model` writes into the CPU's memory; every process must call it.

    Returns write(folder, world), to be called in another thread, with a world of the thread's.
    """
    reshard(model)
    held, held_tokenizer = _still(model), deepcopy(tokenizer)
    if world.size > 1 and isinstance(model, PreTrainedModel):
        weights = hold_sharded(model, world, save_pretrained)
    else:
        weights = _hold_whole(model)

    def write(folder: Path, world: World) -> None:
        weights(held, folder, world)
        world.main(lambda: held_tokenizer.save_pretrained(folder), held=True)

    return write


def _hold_whole(model: nn.Module) -> Callable[[Any, Path, World], None]:
    """As `hold_sharded`, for what rank 0 writes alone."""
    state = model.state_dict()
    names = state if isinstance(model, PreTrainedModel) else sorted(saved_names(model, "auto"))
    tensors = copies(dict(gathered_tensors(model, state, names)))

    def write(model: nn.Module, folder: Path, world: World) -> None:
        world.main(lambda: save_pretrained(model, folder, tensors), held=True)

    return write


def _still(model: nn.Module) -> Any:
    """The same modules and parameters, with configurations that nothing else changes."""
    kind = own_class(model)
    held = kind.__new__(kind)  # FSDP's class cannot be copied
    vars(held).update(vars(model))
    for name in ("config", "generation_config", "peft_config"):
        if name in vars(model):
            setattr(held, name, deepcopy(getattr(model, name)))
    return held


def save_pretrained(
    model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Call `model.save_pretrained`, and write the generation configuration unchanged.

    state_dict: the tensors to write; None: the model's, which must not be sharded.

    Transformers refuses to save a generation configuration with options that have no effect, such
    as a temperature beside do_sample=False, though published models have them: before 5.23 all such
    configurations, later those that were changed, for instance in pad_token_id.
    """
    options = {} if state_dict is None else {"state_dict": state_dict}
    generation = model.generation_config if isinstance(model, PreTrainedModel) else None
    with no_bar():
        if generation is None or _refusal(generation) is None:
            model.save_pretrained(folder, **options)
            return
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder, **options)
        finally:
            model.generation_config = generation
    path = folder / GENERATION_CONFIG_NAME
    if path.exists():
        generation.to_json_file(path, use_diff=True, keys_to_pop=["compile_config"])


def prove_saving(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, output_dir: Path, *, merged: bool
) -> None:
    """Prove that a model can be saved: write all but its weights, or all of an adapter, and delete.

    Args:
        output_dir: of the run, where the trial is written.
        merged: whether a sampler gets the model with its adapter merged.

    Raises:
        UserError: the model or its tokenizer cannot be saved, so training would be lost.
        OSError: there is no room in output_dir.
    """
    causal_lm = causal_lm_of(model)
    _check_generation(causal_lm.generation_config)
    stand_ins = _adapter_outline(model) if hasattr(model, "peft_config") else _stand_ins(model)
    with tempfile.TemporaryDirectory(prefix=NEW, dir=output_dir) as name:
        folder, trial = Path(name), output_dir / "a trial of a checkpoint"
        with _refused(own_class(model).__name__), named_when_full(folder, trial):
            save_pretrained(model, folder, state_dict=stand_ins)
        with _refused(own_class(causal_lm).__name__), named_when_full(folder, trial):
            if merged and causal_lm is not model:
                save_pretrained(causal_lm, folder, state_dict={})
        with _refused(type(tokenizer).__name__), named_when_full(folder, trial):
            tokenizer.save_pretrained(folder)


@contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turn a library's error on saving into one line that names what could not be saved."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of any kind: classes may be the user's own
        raise UserError(
            f"{name} cannot be saved, so that training it would be for nothing; change what its "
            f"save_pretrained names: {one_line(error, _REASON_LENGTH)}"
        ) from error


def _check_generation(generation: GenerationConfig | None) -> None:
    """Refuse a generation configuration that could not be loaded again; warn of an invalid one."""
    reason = None if generation is None else _refusal(generation)
    if generation is None or reason is None:
        return
    try:
        generation.validate()
    except ValueError as error:
        reason = one_line(error, _REASON_LENGTH)
        raise UserError(
            f"the model's generation_config could not be loaded again: {reason}"
        ) from error
    logger.warning(
        "the model's %s is saved as it stands, though it is not valid: %s",
        GENERATION_CONFIG_NAME, reason,
    )  # fmt: skip


def _refusal(generation: GenerationConfig) -> str | None:
    """Transformers' first reason for not saving a generation configuration; None if it would."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        reasons = str(error).removeprefix("GenerationConfig is invalid:").strip().splitlines()
        return reasons[0].removeprefix("- ")
    return None


def _stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """A one-element tensor for every tensor that has several names.

    Saving can fail on shared weights, but not on the values of others, which are left out.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.state_dict().items():
        part = local(tensor)
        if part.device.type != "meta" and part.numel():
            names.setdefault((part.device, part.data_ptr(), tensor.shape), []).append(name)
    shared = [together for together in names.values() if len(together) > 1]
    return {name: one for together in shared for one in [torch.zeros(1)] for name in together}


def _adapter_outline(model: nn.Module) -> dict[str, Tensor] | None:
    """Zeros in place of an adapter's tensors where these are sharded; None where they are not."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return None
    return {
        name: torch.zeros(state[name].shape, dtype=state[name].dtype)
        for name in saved_names(model, "auto")
    }
