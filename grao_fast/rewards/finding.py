"""Finds reward functions by name, and tells which arguments they take."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from grao_fast.system.errors import UserError, nearest
from grao_fast.system.interruption import is_interrupt
from grao_fast.system.visible import visible_lines

RewardFunction = Callable[..., Any]

_OWN = "grao_fast.rewards"  # the module of rewards that are named without one

# Folders of the code that calls or imports a user's code.
_CALLERS = (Path(__file__).parents[1], Path(importlib.__file__).parent)


class RewardError(UserError):
    """A reward that cannot be found or called, that fails, or that returns wrong values."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(visible_lines(message))
        self.place = place


@contextmanager
def running(what: str) -> Iterator[None]:
    """A context for the user's code: whatever it raises becomes a RewardError that names `what`.

    This includes SystemExit, asyncio.CancelledError and a KeyboardInterrupt that the code raises
    itself, which would end the run silently, but not the KeyboardInterrupt of a signal. A child
    process that the code forks exits here; otherwise it would continue the run beside its parent.
    """
    process = os.getpid()
    try:
        with _ending_children(process):
            yield
    except RewardError:
        raise
    except UserError as error:
        raise RewardError(f"{what}: {error}", error.place) from error
    except BaseException as error:  # of any kind: it is the user's code
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
    """Return file and line of the first call outside this package; None if there is none."""
    for call in traceback.extract_tb(error.__traceback__):
        path = Path(call.filename)
        if path.is_file() and not any(map(path.is_relative_to, _CALLERS)):
            return f"{path}, line {call.lineno}"
    return None


def _in_words(error: BaseException) -> str:
    kind = type(error).__name__
    try:
        text = str(error)
    except Exception:  # of any kind: the class may be the user's own
        return f"{kind}, whose message cannot be printed"
    return f"{kind}: {text}" if text else kind


def find_function(spec: str | RewardFunction) -> RewardFunction:
    """Return the function that "package.module:function" or "path/file.py:function" names.

    With arguments, as in 'rewards.py:Near("answer", most=3)', the name is that of a class or
    function which is called with them and returns the reward; without a module, it is one of
    `grao_fast.rewards`. A callable is returned as it is.

    Raises RewardError if there is no such function, if it is a class, or if it takes no argument
    `completions`.
    """
    function: Any = spec
    if isinstance(spec, str):
        function = _made(spec) if spec.rstrip().endswith(")") else _import(spec)
    name = repr(spec) if isinstance(spec, str) else function_name(function)
    if not callable(function):
        raise RewardError(f"reward {name} is not callable: it is a {type(function).__name__}")
    if inspect.isclass(function):
        made = f", as {spec + '(...)'!r}" if isinstance(spec, str) else ""
        raise RewardError(f"reward {name} is a class: pass an instance of it{made}, or a function")
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
            f"reward {spec!r} names no function: write 'package.module:function', "
            f"'path/file.py:function', or a class of {_OWN} with its arguments, as 'Length(200)'"
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
        meant = nearest(attribute, dir(module))
        raise RewardError(f"reward {spec!r}: {module_name} has no {attribute!r}{meant}")
    return getattr(module, attribute)


def _made(spec: str) -> Any:
    """What 'Class(arguments)' or 'module:function(arguments)' makes."""
    module, text = _OWN, spec.strip()
    expression = _parsed(text)
    if expression is None and (named := re.match(r"(.+?):(?=[A-Za-z_]\w*\()", text, re.DOTALL)):
        module, expression = named[1], _parsed(text[named.end() :])
    if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name):
        raise RewardError(
            f"reward {spec!r} cannot be read: write 'Class(arguments)' of {_OWN}, or "
            "'package.module:function(arguments)' or 'path/file.py:function(arguments)'"
        )
    try:
        arguments = [ast.literal_eval(each) for each in expression.args]
        options = {each.arg or "**": ast.literal_eval(each.value) for each in expression.keywords}
    except (ValueError, TypeError):
        raise RewardError(
            f"reward {spec!r}: arguments must be written out, as text in quotes, numbers, lists or "
            "None; for others, make the reward in a file and name it"
        ) from None
    if len(options) < len(expression.keywords):
        raise RewardError(f"reward {spec!r} names an argument twice: keep one")
    made = _import(f"{module}:{expression.func.id}")
    if not callable(made):
        raise RewardError(f"reward {spec!r} is not callable: it is a {type(made).__name__}")
    with running(f"reward {spec!r}"):
        return made(*arguments, **options)


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _load_file(path: Path) -> ModuleType:
    """Run a file once, as a module in sys.modules, where dataclasses and pickle look it up."""
    name = f"_grao_fast_file_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    located = importlib.util.spec_from_file_location(name, path)
    assert located is not None and located.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(located)
    try:
        located.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # the next call must not find a half-run module
        raise
    return module


def function_name(function: RewardFunction) -> str:
    """The name of a function in metrics and errors."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return getattr(inner, "__name__", type(inner).__name__).strip("<>")


def _parameters(function: RewardFunction) -> tuple[dict[str, bool], bool]:
    """Return keyword parameters (True: required), and whether the function takes `**columns`."""
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
    """Return the offered arguments that a function takes. Raises RewardError if it needs others."""
    named, open_ended = _parameters(function)
    missing = [name for name, required in named.items() if required and name not in offered]
    if missing:
        raise RewardError(
            f"reward {function_name(function)} needs `{missing[0]}`, which the dataset does not "
            f"have: add that column, or take from {', '.join(offered)}"
        )
    return {name: value for name, value in offered.items() if open_ended or name in named}


def require_references(function: RewardFunction) -> None:
    """Raise RewardError if a function takes no `references`, which a pairwise reward needs."""
    if not _accepts(function, "references"):
        raise RewardError(
            f"reward {function_name(function)} does not take `references`, which a pairwise reward "
            f"compares with: add the argument, or set reward_type='pointwise'"
        )
