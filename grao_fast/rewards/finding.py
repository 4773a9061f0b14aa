"""Finding reward functions by name, and telling what they can be called with."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from grao_fast.system.errors import UserError
from grao_fast.system.interruption import is_interrupt
from grao_fast.system.visible import visible_lines

RewardFunction = Callable[..., Any]

# Folders of the code that calls or imports a user's code.
_CALLERS = (Path(__file__).parents[1], Path(importlib.__file__).parent)


class RewardError(UserError):
    """A reward that cannot be found, cannot be called, fails, or returns what no reward can be."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(visible_lines(message))
        self.place = place


@contextmanager
def running(what: str) -> Iterator[None]:
    """Code of the user's runs inside: whatever it raises comes out as a RewardError.

    So do SystemExit, asyncio.CancelledError and a KeyboardInterrupt of its own, which would end the
    run in silence. A signal's does not. A child that the code forks ends where the code does, or
    there would be two of the run.
    """
    process = os.getpid()
    try:
        with _ending_children(process):
            yield
    except RewardError:
        raise
    except BaseException as error:  # any kind: it is the user's code
        if is_interrupt(error):
            raise
        raise RewardError(f"{what} raised {_in_words(error)}", _place(error)) from error


@contextmanager
def _ending_children(process: int) -> Iterator[None]:
    status: Any = 0
    try:
        yield
    except SystemExit as stop:
        status = 0 if stop.code is None else stop.code
        raise
    except BaseException:
        status = 1
        raise
    finally:
        if os.getpid() != process:
            os._exit(status if isinstance(status, int) else 1)


def _place(error: BaseException) -> str | None:
    """File and line of the first call that left this package; None where no file was called."""
    for call in traceback.extract_tb(error.__traceback__):
        path = Path(call.filename)
        if path.is_file() and not any(map(path.is_relative_to, _CALLERS)):
            return f"{path}, line {call.lineno}"
    return None


def _in_words(error: BaseException) -> str:
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # of any kind: an exception of the user's own, too
        return f"{kind}, whose message cannot be had"
    return f"{kind}: {text}" if text else kind


def find_function(spec: str | RewardFunction) -> RewardFunction:
    """The callable that "package.module:function" or "path/file.py:function" names.

    A callable is returned as it is. Raises RewardError where there is none, or it is a class, or
    its signature cannot take `completions` by name.
    """
    function: Any = _import(spec) if isinstance(spec, str) else spec
    name = repr(spec) if isinstance(spec, str) else function_name(function)
    if not callable(function):
        raise RewardError(f"reward {name} is not callable: it is a {type(function).__name__}")
    if inspect.isclass(function):
        raise RewardError(f"reward {name} is a class: give an instance of it, or a function")
    if not _accepts(function, "completions"):
        raise RewardError(
            f"reward {name} does not take `completions`: write it as "
            f"f(prompts, completions, **columns) -> list of numbers"
        )
    return function


def _import(spec: str) -> Any:
    module_name, colon, attribute = spec.rpartition(":")
    if not colon or not module_name or not attribute:
        raise RewardError(
            f"reward {spec!r} names no function: write 'package.module:function' or "
            f"'path/file.py:function'"
        )
    if module_name.endswith(".py"):
        path = Path(module_name).expanduser()
        if not path.is_file():
            raise RewardError(f"reward {spec!r}: no such file {module_name!r}")
        with running(f"reward {spec!r}: {module_name}"):
            module = _load_file(path.resolve())
    else:
        try:
            with running(f"reward {spec!r}: importing {module_name}"):
                module = importlib.import_module(module_name)
        except RewardError as error:
            if isinstance(error.__cause__, ModuleNotFoundError):
                raise RewardError(
                    f"reward {spec!r}: {error.__cause__}; for a file that is not installed, "
                    f"write 'path/file.py:{attribute}'"
                ) from error
            raise
    if not hasattr(module, attribute):
        raise RewardError(f"reward {spec!r}: {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def _load_file(path: Path) -> ModuleType:
    """Run a file once, as a module that dataclasses and pickle can find by its name."""
    name = f"_grao_fast_file_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    located = importlib.util.spec_from_file_location(name, path)
    assert located is not None and located.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(located)
    try:
        located.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half a module must not answer the next call
        raise
    return module


def function_name(function: RewardFunction) -> str:
    """The name that metrics and errors call a function by."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__).strip("<>")


def _parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """Parameters that can be given by name (True: without a default), and whether ** takes any."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the signature of reward {function_name(function)} cannot be read: wrap it in a "
            f"Python function"
        ) from error
    named, open_ended = {}, False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named[parameter.name] = parameter.default is parameter.empty
    return named, open_ended


def _accepts(function: RewardFunction, name: str) -> bool:
    named, open_ended = _parameters(function)
    return open_ended or name in named


def select_arguments(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments offered by name, those that a function takes.

    Raises RewardError where it needs one that is not offered.
    """
    named, open_ended = _parameters(function)
    missing = [name for name, required in named.items() if required and name not in offered]
    if missing:
        raise RewardError(
            f"reward {function_name(function)} needs `{missing[0]}`, which the dataset does not "
            f"have; it can take {', '.join(offered)}"
        )
    return {name: value for name, value in offered.items() if open_ended or name in named}


def require_references(function: RewardFunction) -> None:
    """A pairwise reward compares with `references`, so it must take them."""
    if not _accepts(function, "references"):
        raise RewardError(
            f"reward {function_name(function)} does not take `references`, with which a pairwise "
            f"reward compares: add the argument, or set reward_type='pointwise'"
        )
