"""The layers of the package: a module imports from its own room and from those below, in no circle.

Imports are read from the source, those inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"grao_fast": ROOT / "grao_fast", "grao_fast.kernels": ROOT / "kernels"}
# Bottom to top.
LAYERS = (
    "kernels", "system", "objectives", "distributed", "reporting", "config", "data", "models",
    "sampling", "rewards", "evaluation", "training", "callbacks", "checkup", "trainer",
    "integrations", "demo", "cli", "__main__",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not all(folder.is_dir() for folder in FOLDERS.values()), reason="needs a checkout"
)


def modules() -> dict[str, Path]:
    """Every module of the package by name, but for the package itself, which exports the others."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    del found["grao_fast"]
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere in its source."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            of_names = [f"{base}.{alias.name}" for alias in node.names]
            targets = [each if each in known else base for each in of_names]
        else:
            continue
        yield from (target for target in targets if target in known)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(name, path, known)) - {name} for name, path in known.items()}


def layer(name: str) -> int:
    return LAYERS.index(name.split(".")[1])


def test_imports_are_seen() -> None:
    edges = graph()
    assert "grao_fast.training.step" in edges["grao_fast.trainer"]
    assert "grao_fast.kernels.linear_policy" in edges["grao_fast.kernels.linear_grao"]
    assert "grao_fast.sampling.vllm" in edges["grao_fast.sampling.loading"]  # inside a function


def test_no_module_imports_from_a_layer_above_it() -> None:
    upwards = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in sorted(targets)
        if layer(target) > layer(name)
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("a circle: " + " <- ".join(error.args[1]))
