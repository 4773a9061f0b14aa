"""Every Python example of README.md and docs runs, and what they link to and name exists."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny import sums, write_jsonl

from grao_fast.cli.commands import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
RUNS = re.compile(r"<!-- tested: (\w+) -->\n```(?:python|json)\n(.*?)```", re.DOTALL)
# tests/test_docs.py runs these, whose blocks need files
RUN_ELSEWHERE = ("docs/quickstart.md", "docs/rewards.md", "docs/check.md", "docs/trainers.md")
MARKED = {name: RUNS.findall(text) for name, text in TEXTS.items() if name not in RUN_ELSEWHERE}
EXAMPLES = {name: code for examples in MARKED.values() for name, code in examples}
LONG = ("train", "trl", "trl_config")  # these start from files
SHORT = sorted(EXAMPLES.keys() - {"row", "kernels", "rewards", *LONG})


def execute(source: str, **names: Any) -> dict[str, Any]:
    exec(compile(source, "example", "exec"), names)
    return names


def test_every_python_example_is_marked_to_be_run() -> None:
    for name, examples in MARKED.items():
        marked = [code for _, code in examples]
        for code in re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL):
            assert code in marked, f"{name}: {code}"
    assert sum(map(len, MARKED.values())) == len(EXAMPLES)


@pytest.mark.parametrize("name", SHORT)
def test_short_example(name: str) -> None:
    assert execute(EXAMPLES[name])


def test_rewards_of_the_example() -> None:
    names = execute(EXAMPLES["rewards"])
    short, long = ([{"role": "assistant", "content": "a" * length}] for length in (25, 50))
    assert asyncio.run(names["brevity"]([short, long])) == [-0.25, -0.5]
    assert names["better"]([short, long, long], [long, long, short]) == [-1.0, 0.0, 1.0]


@pytest.fixture
def working_folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data under the names that the README's examples use."""
    row, rows = json.loads(EXAMPLES["row"]), sums(8)
    assert row.keys() == rows[0].keys()
    shutil.copytree(tiny_model, tmp_path / "Qwen/Qwen2.5-0.5B-Instruct")
    write_jsonl(tmp_path / "problems.jsonl", [row, *rows])
    write_jsonl(tmp_path / "held-out.jsonl", rows[:4])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_example(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = EXAMPLES["train"]
    assert len([line for line in source.splitlines() if line.strip()]) <= 16
    assert execute(source)["result"].steps == 2  # nine rows in steps of eight
    assert (working_folder / "aligned/final/model.safetensors").is_file()
    assert re.search(r"RAS \d\.\d\d -> \d\.\d\d, NAG -?\d\.\d\d", capsys.readouterr().out)


def test_trl_example(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    write_jsonl(working_folder / "problems.jsonl", sums(2))
    # GRPOConfig asks for bfloat16, which Transformers takes a machine without a GPU to lack.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    (reward,) = (n for n in ast.parse(EXAMPLES["train"]).body if isinstance(n, ast.FunctionDef))
    trainer = execute(EXAMPLES["trl"], **execute(ast.unparse(reward)))["trainer"]
    assert trainer.state.global_step == 6  # two rows, three epochs
    assert "objective/imitation" in trainer.state.log_history[0]
    monkeypatch.setattr("grao_fast.integrations.trl.GRAOTrainer.train", lambda self: None)
    assert execute(EXAMPLES["trl_config"])["trainer"].args.grao_lam == 0.3


def test_kernel_example() -> None:
    names = execute(EXAMPLES["kernels"])
    result = names["result"]
    total = result.exploration + result.imitation + result.alignment
    assert total.item() == pytest.approx(-result.loss.item(), abs=1e-4)
    assert names["hidden_TD"].grad.isfinite().all()


@pytest.mark.parametrize("page", PAGES, ids=TEXTS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, section = re.sub(r"\s+", "", target).partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if section:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings]
            api = re.findall(r"^::: (\S+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in slugs + api, target


@pytest.mark.parametrize("name", sorted(TEXTS.keys() - {"CHANGELOG.md"}))  # it tells of what was
def test_names_of_modules_and_paths_of_files_exist(name: str) -> None:
    for dotted in set(re.findall(r"\bgrao_fast(?:\.\w+)+", TEXTS[name])):
        resolve(dotted)
    folders = r"(?:grao_fast|kernels|benchmarks|tests|docs|examples|\.ci)"
    quoted = re.findall(rf"`({folders}/[\w./-]*)`", TEXTS[name])
    run = re.findall(rf"(?:pytest|python|bash) ({folders}/\S+?)(?=[\s`])", TEXTS[name])
    for path in quoted + run:
        assert (ROOT / path).exists(), path


def resolve(dotted: str) -> None:
    """Fail unless `dotted` is a module or an attribute of one; of adapters, where the host is."""
    module, attributes = dotted, []
    while not is_module(module):
        module, _, last = module.rpartition(".")
        attributes.insert(0, last)
    host = module.removeprefix("grao_fast.integrations.").partition(".")[0]
    if host in ("trl", "verl") and find_spec(host) is None:
        return
    found: Any = importlib.import_module(module)
    for attribute in attributes:
        assert hasattr(found, attribute), dotted
        found = getattr(found, attribute)


def is_module(dotted: str) -> bool:
    try:
        return find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


def test_the_two_commands_are_those_that_continuous_integration_runs() -> None:
    commands = re.findall(r"^    (pip install .+ && .+)$", README, re.MULTILINE)
    assert commands == [
        "pip install . && grao-fast demo",
        'pip install -e ".[test]" && pytest -n 2',
    ]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert commands[1] + "\n" in ci and '\n(cd "$work" && grao-fast demo)' in ci


def test_commands_have_the_options_that_are_shown() -> None:
    _, commands = build_parser()
    fenced = re.findall(r"^```bash\n(.*?)^```", "\n".join(TEXTS.values()), re.M | re.S)
    indented = re.findall(r"^    (grao-fast (?:.*\\\n)*.*\n)", "\n".join(TEXTS.values()), re.M)
    shown = re.findall(r"^grao-fast (\w+)((?:.*\\\n)*.*)$", "".join(fenced + indented), re.M)
    assert {name for name, _ in shown} == set(commands)
    for name, arguments in shown:
        known = commands[name].hints.keys() | {"config"}
        assert set(re.findall(r"--([\w.]+)", arguments)) <= known, arguments
