"""The site builds without a warning, all pages are in it, and every block of code in them runs.

A block that cannot run here has a line above it that says why:

    <!-- skip: next if(True, reason="needs a GPU") -->

Its commands are then only parsed; tests/test_readme.py checks the options of `grao-fast` in all.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
from tiny import save_tiny_model, sums, write_jsonl

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
STEP_BY_STEP = ("README.md", "docs/quickstart.md")  # a block needs the files of those before it
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
NEEDS_TRL = r"^(?:from|import) .*\btrl\b"
CONFIG = """\
model: Qwen/Qwen2.5-0.5B-Instruct
dataset: problems.jsonl
reward: rewards.py:correct
prompts_per_step: 2
num_generations: 2
max_new_tokens: 4
max_steps: 1
"""
REWARD = """\
def correct(completions, answer):
    return [float(each[0]["content"].endswith(right)) for each, right in zip(completions, answer)]
"""


def fill(folder: Path) -> None:
    """Make the files that pages take for granted: models, data, a reward and options."""
    for model in MODELS:
        if not (folder / model).exists():
            save_tiny_model(folder / model)
    write_jsonl(folder / "problems.jsonl", sums(8))
    write_jsonl(folder / "held-out.jsonl", sums(2))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "run.yaml").write_text(CONFIG)
    for name in ("examples", "benchmarks", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)


def run(command: str, folder: Path) -> None:
    """Run a block of shell commands, which ends at the first that fails."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    ended = subprocess.run(
        ["bash", "-e", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sybil = pytest.importorskip("sybil")
    from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

    # GRPOConfig asks for bfloat16, which Transformers takes a machine without a GPU to lack.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser("bash", lambda example: run(example.parsed, Path.cwd())),
        CodeBlockParser("yaml", lambda example: save_options(example.parsed)),
        SkipParser(),
    ]
    fill(tmp_path)
    for number, example in enumerate(sybil.Sybil(parsers=parsers).parse(PAGES[name]).examples()):
        folder = tmp_path
        if name not in STEP_BY_STEP:
            folder = tmp_path / str(number)
            folder.mkdir()
            for shared in MODELS:
                shutil.copytree(tmp_path / shared, folder / shared)
            fill(folder)
        monkeypatch.chdir(folder)
        if find_spec("trl") is None and re.search(NEEDS_TRL, str(example.parsed), re.MULTILINE):
            print(f"{name}:{example.line} does not run: TRL is not installed")
            continue
        try:
            example.evaluate()
        except SkipTest as skipped:
            print(f"{name}:{example.line} does not run: {skipped}")


def save_options(text: str) -> None:
    Path("run.yaml").write_text(text)


@pytest.mark.parametrize("name", PAGES)
def test_shell_blocks_are_fenced_and_parse(name: str) -> None:
    text = PAGES[name].read_text("utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        checked = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True)
        assert checked.returncode == 0, f"{block}\n{checked.stderr}"
    if name != "README.md":  # whose two commands are short
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"^ {4}(grao-fast|pip|python|pytest|torchrun) ", prose, re.MULTILINE)


def test_all_pages_are_in_the_site() -> None:
    config = (ROOT / "zensical.toml").read_text("utf-8")
    entries = re.findall(r'= "([\w/-]+\.md)"', config)
    pages = [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")]
    assert sorted(entries) == sorted(pages)


@pytest.mark.parametrize("module", ["grao_fast", "grao_fast.kernels", "grao_fast.rewards"])
def test_the_api_has_all_public_names(module: str) -> None:
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text("utf-8"), re.MULTILINE)
    public = set(importlib.import_module(module).__all__) - {
        "__version__",
        "reference",
        "reference_objectives",
    }
    prefix = module.replace("grao_fast.kernels", "kernels")
    listed = {name.rpartition(".")[2] for name in shown if name.rpartition(".")[0] == prefix}
    assert public == listed - {"objectives"}  # a module's text, above its members


def test_no_link_leads_out_of_the_site() -> None:
    for name, page in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            linked = (page.parent / re.sub(r"\s+", "", target)).resolve()
            assert name == "README.md" or linked.is_relative_to(ROOT / "docs"), (name, target)


@pytest.mark.slow
def test_the_site_builds_and_asks_for_nothing(tmp_path: Path) -> None:
    if find_spec("zensical") is None or find_spec("mkdocstrings_handlers") is None:
        pytest.skip('the tools of the site are not installed: pip install -e ".[docs]"')
    for name in ("docs", "grao_fast", "kernels", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    run("python -m zensical build --strict", tmp_path)
    site = tmp_path / "build/site"
    assert {page.stem for page in (tmp_path / "docs").rglob("*.md")} <= {
        page.stem for page in site.rglob("*.html")
    }
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="?(https?:[^" >]+)', text)
        loaded += re.findall(r'<link[^>]* rel="?(?!canonical)[^>]* href="?(https?:[^" >]+)', text)
        assert not loaded, (page.name, loaded)
