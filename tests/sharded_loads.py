"""Loading in several processes of gloo, compared with loading in one; for test_sharded_loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import launch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grao_fast.distributed.world import World
from grao_fast.models.loading import LoadedModel, load_model

CPU = torch.device("cpu")


def in_processes(size: int, folder: Path, work: Callable[[World], None]) -> None:
    """Call `work` in new processes, which print into the folder; an error in any is raised here."""

    def body(rank: int) -> None:
        dist.init_process_group("gloo")
        work(World(rank, size, group=dist.group.WORLD))
        dist.destroy_process_group()

    ended = launch(body, folder, size=size, timeout=120)
    failed = [each for each in ended if each.status]
    assert not failed, max((each.stderr for each in failed), key=len)[-4000:]


def load(model: Path, world: World, *, peft_config: Any = None, bf16: bool = False) -> LoadedModel:
    torch.manual_seed(0)
    return load_model(
        model,
        device=CPU,
        bf16=bf16,
        tokenizer=None,
        peft_config=peft_config,
        trained=True,
        liger=False,
        world=world,
    )


def load_and_shard(model: Path, world: World, **options: Any) -> LoadedModel:
    loaded = load(model, world, **options)
    shape, names = ((world.size,), ("shard",)) if world.size < 4 else ((2, 2), ("copy", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    inner: Any = loaded.model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    for module in [m for m in inner.modules() if type(m).__name__ in inner._no_split_modules]:
        fully_shard(module, mesh=mesh)
    fully_shard(inner, mesh=mesh)
    assert loaded.outline is not None
    loaded.outline.fill(CPU)
    return loaded


def compare(world: World, model: Path, options: dict[str, Any]) -> None:
    """Compare a load in all processes with a load in this one: every tensor and setting."""
    sharded = load_and_shard(model, world, **options)
    random = torch.get_rng_state()
    alone = load(model, World(), **options)
    assert torch.equal(random, torch.get_rng_state()), "random numbers drawn"
    assert sharded.base_digest == alone.base_digest
    _compare_tensors(sharded.model, alone.model)
    there: Any
    here: Any
    there, here = (
        m.get_base_model() if hasattr(m, "get_base_model") else m
        for m in (sharded.model, alone.model)
    )
    assert there.config.to_dict() == here.config.to_dict()
    assert there.config._attn_implementation == here.config._attn_implementation
    assert there.generation_config.to_dict() == here.generation_config.to_dict()
    assert there.name_or_path == here.name_or_path
    assert there.all_tied_weights_keys == here.all_tied_weights_keys
    assert str(there._weight_conversions) == str(here._weight_conversions)
    added = {name for name in vars(there).keys() ^ vars(here).keys() if "composable" not in name}
    assert added <= {"_is_fsdp_managed_module", "_fsdp_use_orig_params"}, added
    for (name, one), other in zip(there.named_modules(), here.modules(), strict=True):
        assert one.training == other.training, name
        assert isinstance(one, type(other)), name
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(sharded.model(input_ids=ids).logits, alone.model(input_ids=ids).logits)


def _compare_tensors(there: nn.Module, here: nn.Module) -> None:
    parameters = dict(here.named_parameters(remove_duplicate=False))
    shards = dict(there.named_parameters(remove_duplicate=False))
    assert shards.keys() == parameters.keys()
    for name, shard in shards.items():
        assert isinstance(shard, DTensor), name
        assert shard.requires_grad == parameters[name].requires_grad, name
        assert shard.dtype == parameters[name].dtype, name
        assert torch.equal(shard.full_tensor(), parameters[name]), name
    assert _shared(there) == _shared(here)
    buffers = dict(here.named_buffers())
    assert dict(there.named_buffers()).keys() == buffers.keys()
    for name, buffer in there.named_buffers():
        assert buffer.dtype == buffers[name].dtype, name
        assert torch.equal(buffer, buffers[name]), name
        path, _, attribute = name.rpartition(".")
        of = (m.get_submodule(path)._non_persistent_buffers_set for m in (there, here))
        assert len({attribute in names for names in of}) == 1, name


def _shared(model: nn.Module) -> list[list[str]]:
    of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of.setdefault(id(parameter), []).append(name)
    return sorted(of.values())


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all live storages on the CPU that operations have made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and type(leaf) is Tensor and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@contextmanager
def allocations() -> Iterator[_Allocations]:
    """A context that counts what its operations allocate."""
    with _Allocations() as counted:
        yield counted


def measure(world: World, model: Path) -> None:
    """Check that a process allocates its shards, and beside them no more than one tensor."""
    with allocations() as counted:
        loaded = load_and_shard(model, world)
    parameters: Any = list(loaded.model.parameters())
    whole = [p.numel() * p.element_size() for p in parameters]
    rows = [(p.shape[0], -(-p.shape[0] // world.size)) for p in parameters]  # padded to be equal
    own = sum(size // all * part for size, (all, part) in zip(whole, rows, strict=True))
    buffers = sum(b.numel() * b.element_size() for b in loaded.model.buffers())
    assert own < 0.6 * sum(whole), "half of it, and padding"
    assert counted.peak >= own, "nothing was counted"
    assert counted.peak <= own + max(whole) + 2 * buffers, (counted.peak, own, max(whole))
