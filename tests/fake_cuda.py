"""CUDA tensors without a GPU: shapes, dtypes and devices, no values.

Tensors on the CPU are real, as they are beside a GPU. Those on "cuda" are PyTorch's `FakeTensor`:
the code's branches for CUDA run; operands on two devices raise, and so does whatever would read a
value, where the host would wait for the device.

Not seen: what CUDA's own code of an operator refuses beyond that, memory, and time.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)

# One for all tests: what the package caches of one may meet another's.
_MODE = FakeTensorMode()
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
_PRODUCTS = (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out)
_CUDA_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_engine = torch.autograd._engine_run_backward
# Names of functions that autocast casts for on CUDA, as far as models use them; None: to its dtype.
_AUTOCAST: dict[str, torch.dtype | None] = {
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm")),
    "scaled_dot_product_attention": None,
    **dict.fromkeys(("softmax", "log_softmax", "layer_norm", "rms_norm", "norm"), torch.float32),
    **dict.fromkeys(("pow", "__pow__", "exp", "rsqrt", "sum", "prod", "cumsum"), torch.float32),
}
# Pointers of Triton's kernels; others are to float32.
_INT64 = {"target_ptr", "zero_ptr"}
_ANY_FLOAT = {"dlogits_ptr", "gradient_ptr", "out_ptr"}
# PyTorch's guards of the current device, by c10::DeviceType.
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_CUDA_GUARD, _META_GUARD = 1, 14


class _Generator(torch.Generator):
    """A CUDA build alone has those of CUDA."""

    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


class HostWaits(AssertionError):
    """The host would wait for a copy between it and the device."""


def why_not() -> str | None:
    """Why CUDA cannot be faked here; None: it can."""
    if torch.cuda.is_available():
        return "there is a GPU, on which the tests of kernels run"
    try:
        _guards()
    except (OSError, ValueError) as error:
        return f"this build of PyTorch does not show its device guards: {error}"
    return None


@contextmanager
def fake_cuda(*, may_wait: bool = False, look: float | None = None) -> Iterator[None]:
    """Inside, "cuda" is a device like any other.

    may_wait: False raises `HostWaits` at a copy that is not `non_blocking`, and at an index that
        has to be copied.
    look: what the host sees of any value on the device; None raises where it looks.
    """
    properties = SimpleNamespace(warp_size=32, major=9, minor=0, multi_processor_count=132)
    replaced = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_properties": lambda device=None: properties,
        "device_of": lambda tensor: nullcontext(),
        "_lazy_init": lambda: None,
    }
    guards = _guards()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda tensor: tensor))
        stack.enter_context(
            patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        )
        is_cuda = property(lambda tensor: tensor.device.type == "cuda")
        stack.enter_context(patch.object(FakeTensor, "is_cuda", is_cuda, create=True))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        # A copy of a tensor would come with a mode of its own.
        stack.enter_context(
            patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True)
        )
        # PyTorch's C++ enters a tensor's device; a CPU build has no guard that could.
        stack.callback(guards.__setitem__, _CUDA_GUARD, guards[_CUDA_GUARD])
        guards[_CUDA_GUARD] = guards[_META_GUARD]
        stack.enter_context(_Operators(may_wait, look))
        functions = stack.enter_context(_Functions())
        stack.enter_context(
            patch.object(torch.autograd, "_engine_run_backward", functions.in_engine)
        )
        yield


def launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not launched: what they would be launched with is checked."""
    triton_rows = pytest.importorskip("grao_fast.kernels.rows.triton_rows")
    for name in [each for each in vars(triton_rows) if each.endswith("_kernel")]:
        monkeypatch.setattr(triton_rows, name, _Launcher(getattr(triton_rows, name)))
    monkeypatch.setattr(triton_rows, "runs_on", lambda device: device.type == "cuda")


class _Launcher:
    """Stands where a kernel does; it checks what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(each > 0 for each in grid)
        return self.launch

    def launch(self, *args: Any, num_warps: int, **constants: Any) -> None:
        assert num_warps in (1, 2, 4, 8, 16)
        for name, value in self.signature.bind(*args, **constants).arguments.items():
            assert isinstance(value, Tensor) == name.endswith("_ptr"), name
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{name} is on {value.device}"
                expected = torch.int64 if name in _INT64 else torch.float32
                assert value.dtype == expected or name in _ANY_FLOAT, f"{name} is {value.dtype}"


class _Operators(TorchDispatchMode):
    """Runs what has to do with "cuda" on fake tensors, and all else as it is."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self, may_wait: bool, look: float | None) -> None:
        super().__init__()
        self.may_wait, self.look = may_wait, look

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            # Asked by C++ alone. Of CUDA, its autograd engine would want streams.
            device = args[0].fake_device
            return torch.device("meta") if device.type == "cuda" else device
        args, kwargs = tree_map_only(torch.device, _named, (args, kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(x, FakeTensor) or _is_cuda(x) for x in leaves):
            return function(*args, **kwargs)
        if isinstance(function, OpOverload) and function.namespace == "grao_fast":
            # The operator itself, not the fake that says its shapes.
            with self, torch.no_grad():
                return function.redispatch(_CUDA_KERNELS, *args, **kwargs)
        if isinstance(function, OpOverload) and function._can_decompose():  # inside of the above
            with self:
                return function.decompose(*args, **kwargs)
        self._check(function, args, kwargs)
        if self.look is not None and args and isinstance(args[0], FakeTensor):
            seen = torch.full(args[0].shape, self.look, dtype=args[0].dtype)
            if function is torch.ops.aten._local_scalar_dense.default:
                return seen.item()
            if function is _COPIES[0] and kwargs.get("device") == torch.device("cpu"):
                return function(seen, **kwargs)
        args, kwargs = tree_map_only(Tensor, _faked, (args, kwargs))
        with _MODE:
            return function(*args, **kwargs)

    def _check(self, function, args, kwargs) -> None:
        if function in _PRODUCTS:
            _check_product(args, kwargs["out"])
        if function in _INDEXING:
            home = args[0].device.type
            others = {x.device.type for x in args[1] if x is not None} - {home}
            assert home == "cuda" or not others, f"{function} of a tensor on {home} by {others}"
            if others and not self.may_wait:
                raise HostWaits(f"{function} of a tensor on {home} by an index on {others}")
        if function in _COPIES and not self.may_wait:
            # _to_copy(self, *, device, non_blocking), copy_(self, other, non_blocking)
            source = args[1 if len(args) > 1 else 0].device
            target = args[0].device if len(args) > 1 else kwargs.get("device", source)
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if source.type != target.type and not non_blocking:
                raise HostWaits(f"{function} from {source} to {target}")


def _check_product(args: tuple, out: Tensor) -> None:
    """What CUDA's code asks of `mm` and `addmm` with an out_dtype: ATen/native/cuda/Blas.cpp."""
    *addend, a, b, out_dtype = args
    widened = out_dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
    assert a.dtype == b.dtype and out.dtype == out_dtype, (a.dtype, b.dtype, out.dtype, out_dtype)
    assert out_dtype == a.dtype or widened, f"{a.dtype} into {out_dtype}"
    assert all(each.dtype in (out_dtype, a.dtype) for each in addend)
    assert out.shape == (a.shape[0], b.shape[1]), "it would be resized"


class _Functions(TorchFunctionMode):
    """Does what C++ cannot: it takes "cuda" for Meta, on which there is no autocast."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if function is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return torch.tensor(*args, **kwargs).to(device)
        if torch.is_autocast_enabled("cuda") and name in _AUTOCAST:
            dtype = _AUTOCAST[name] or torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map_only(Tensor, lambda x: _cast(x, dtype), (args, kwargs))
        return function(*args, **kwargs)

    def in_engine(self, *args, **kwargs):
        """`backward` is a function too, inside of which this mode would be off: layers are
        computed again there."""
        with self:
            return _engine(*args, **kwargs)


def _named(device: torch.device) -> torch.device:
    """C++ that makes a tensor beside another asks for its device as it was told."""
    return CUDA if device.type == "meta" else device


def _is_cuda(leaf: object) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _faked(tensor: Tensor) -> FakeTensor:
    return tensor if isinstance(tensor, FakeTensor) else _MODE.from_tensor(tensor)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    eligible = tensor.device.type == "cuda" and tensor.is_floating_point()
    return tensor.to(dtype) if eligible else tensor


def _guards() -> Any:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * (_META_GUARD + 1)).in_dll(library, _GUARDS)
