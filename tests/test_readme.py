"""The README's examples, run as they stand there, on files that bear the names they use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny import sums, write_jsonl

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = r"```{language}\n(.*?)```"


def block(name: str, language: str = "python") -> str:
    """The code block that the comment `<!-- tested: name -->` stands above."""
    found = re.search(
        rf"<!-- tested: {name} -->\n" + BLOCK.format(language=language), README, re.DOTALL
    )
    assert found, f"README.md has no block marked {name}"
    return found[1]


def execute(source: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(source, "README.md", "exec"), names)
    return names


def test_every_python_block_is_run() -> None:
    python = re.findall(BLOCK.format(language="python"), README, re.DOTALL)
    assert python == [block("train"), block("kernels"), block("trl")]


def test_train_example(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_model, tmp_path / "Qwen/Qwen2.5-0.5B-Instruct")
    rows = sums(24)
    assert json.loads(block("row", "json")).keys() == rows[0].keys()
    write_jsonl(tmp_path / "problems.jsonl", [json.loads(block("row", "json")), *rows])
    write_jsonl(tmp_path / "held-out.jsonl", rows[:4])
    monkeypatch.chdir(tmp_path)
    source = block("train")
    assert len([line for line in source.splitlines() if line.strip()]) <= 16
    result = execute(source)["result"]
    assert result.steps == 20  # type: ignore[attr-defined]
    assert (tmp_path / "aligned/final/model.safetensors").is_file()
    assert re.search(r"RAS \d\.\d\d -> \d\.\d\d, NAG -?\d\.\d\d", capsys.readouterr().out)


def test_kernel_example() -> None:
    names = execute(block("kernels"))
    result, hidden = names["result"], names["hidden_TD"]
    total = result.exploration + result.imitation + result.alignment  # type: ignore[attr-defined]
    assert total.item() == pytest.approx(-result.loss.item(), abs=1e-4)  # type: ignore[attr-defined]
    assert hidden.grad.isfinite().all()  # type: ignore[attr-defined]


def test_trl_example(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    shutil.copytree(tiny_model, tmp_path / "Qwen/Qwen2.5-0.5B-Instruct")
    write_jsonl(tmp_path / "problems.jsonl", [json.loads(block("row", "json")), *sums(7)])
    monkeypatch.chdir(tmp_path)
    # GRPOConfig asks for bfloat16, which Transformers takes a machine without a GPU to lack.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = execute(block("trl"))["trainer"]
    assert trainer.state.global_step == 20  # type: ignore[attr-defined]
    assert "objective/imitation" in trainer.state.log_history[0]  # type: ignore[attr-defined]


def test_links_and_commands_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.findall(r"^    (pip install \S+ && grao-fast demo)$", README, re.MULTILINE)
    assert '    pip install -e ".[test]" && pytest\n' in README
    assert 'pip install -e ".[test]" && pytest\n' in ci
