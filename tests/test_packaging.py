"""Tests of what is built from a checkout: a wheel, an editable install and a source archive.

Each is built from a copy, so that neither leftovers in the checkout nor an installed package can
hide that a build left something out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import grao_fast

ROOT = Path(__file__).parents[1]
SOURCES = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
FOLDERS = ["grao_fast", "kernels", "tests", ".ci"]
NOT_SOURCES = shutil.ignore_patterns("__pycache__")


def run(*command: str, cwd: Path, path: list[Path] | None = None) -> str:
    """Run Python without site-packages, with `path` and the standard library alone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path or []))}
    done = subprocess.run(
        [sys.executable, "-S", *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(hook: str, source: Path, output: Path) -> Path:
    """Call a PEP 517 hook of setuptools, as pip does, and return the file it wrote."""
    output.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta as b; print('built', b.{hook}({str(output)!r}))"
    printed = run("-c", code, cwd=source, path=[Path(sysconfig.get_path("purelib"))])
    return output / re.search(r"^built (.+)$", printed, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=NOT_SOURCES)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


def python_files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*.py")}


def test_wheel_holds_every_module_and_no_other_folder(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"grao_fast/{name}" for name in python_files(ROOT / "grao_fast")}
    expected |= {f"grao_fast/kernels/{name}" for name in python_files(ROOT / "kernels")}
    data = {"grao_fast/py.typed", "grao_fast/reporting/page/report.html.jinja"}
    assert names == expected | data


def test_wheel_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folder = f"grao_fast-{grao_fast.__version__}.dist-info"
        metadata = message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert b"grao-fast = grao_fast.cli.commands:main" in archive.read(
            f"{folder}/entry_points.txt"
        )
        assert b"Apache License" in archive.read(f"{folder}/licenses/LICENSE")
    assert metadata["Name"] == "grao-fast"
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) >= set(
        ["flash", "judge", "liger", "peft", "trl", "vllm", "test", "dev"]
    )


def test_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = (
        "import grao_fast, grao_fast.kernels as k, grao_fast.cli.commands, grao_fast.config;"
        "print(grao_fast.__file__); print(k.__file__); print(k.linear_grao_loss.__name__)"
    )
    path = [tmp_path / "installed", Path(sysconfig.get_path("purelib"))]
    package, kernels, loss = run("-c", code, cwd=tmp_path, path=path).splitlines()
    assert Path(package) == tmp_path / "installed/grao_fast/__init__.py"
    assert Path(kernels) == tmp_path / "installed/grao_fast/kernels/__init__.py"
    assert loss == "linear_grao_loss"


def test_editable_install_finds_the_kernels_in_their_own_folder(source, tmp_path) -> None:
    archive = build("build_editable", source, tmp_path / "wheel")
    zipfile.ZipFile(archive).extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r});"
        "from importlib.util import find_spec;"
        "print(find_spec('grao_fast').origin); print(find_spec('grao_fast.kernels').origin)"
    )
    package, kernels = run("-c", code, cwd=tmp_path).splitlines()
    assert Path(package) == source / "grao_fast/__init__.py"
    assert Path(kernels) == source / "kernels/__init__.py"


def test_source_archive_builds_the_same_wheel_and_carries_the_tests(source, wheel, tmp_path):
    with tarfile.open(build("build_sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"grao_fast-{grao_fast.__version__}"
    assert python_files(unpacked / "tests") == python_files(ROOT / "tests")
    assert (unpacked / ".ci/run").is_file()
    again = build("build_wheel", unpacked, tmp_path / "wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize(
    "module", ["grao_fast", "grao_fast.callbacks", "grao_fast.kernels", "grao_fast.cli.commands"]
)
def test_importing_brings_in_no_more_than_it_needs(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert module in loaded
    unwanted = {"transformers", "datasets", "accelerate", "triton", "grao_fast.trainer"}
    assert loaded.isdisjoint(unwanted)
    assert ("torch" in loaded) == (module == "grao_fast.kernels")


def test_every_export_exists() -> None:
    assert all(callable(getattr(grao_fast, name)) for name in grao_fast.__all__ if name[0] != "_")
    with pytest.raises(AttributeError, match="nonsense"):
        _ = grao_fast.nonsense


def test_the_checkouts_root_on_the_path_does_no_harm() -> None:
    """Run from a checkout, transformers finds this folder when it looks for a package `kernels`."""
    code = (
        "import kernels, grao_fast.kernels, transformers.modeling_utils\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(kernels.__file__ == grao_fast.kernels.__file__, hasattr(kernels, 'GRAOLoss'))\n"
        "print(is_kernels_available(), callable(grao_fast.kernels.linear_grao_loss))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["True", "False", "False", "True"]


def numbers(version: str) -> list[int]:
    return [*map(int, version.split(".")), 0, 0][:3]


def test_the_oldest_versions_are_the_floors() -> None:
    """`tests/oldest.txt`, with which these tests pass, lists the lowest versions in setup.py."""
    setup = (ROOT / "setup.py").read_text("utf-8").split('"bench"')[0]
    floors = re.findall(r"[\"']([a-z0-9-]+)>=([0-9.]+)", setup)
    pins = re.findall(r"^(.+)==(.+)$", (ROOT / "tests/oldest.txt").read_text("utf-8"), re.MULTILINE)
    assert {name: numbers(pin) for name, pin in pins} == {
        name: numbers(floor) for name, floor in floors
    }
