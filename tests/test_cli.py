"""Tests of the command line: its messages for wrong calls, and what it passes on for right ones."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import sums, write_jsonl

import grao_fast
from grao_fast import GRAOConfig, __version__
from grao_fast.cli.commands import main
from grao_fast.cli.options import EVALUATION_FIELDS, field_help

REWARDS = """
def correct(prompts, completions, answer):
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]

def short(completions):
    return [1.0]

def broken(completions):
    return [1.0 / 0 for _ in completions]

def wants_topic(completions, topic):
    return [0.0 for _ in completions]

not_a_function = 3
"""
FIELDS = [field.name for field in dataclasses.fields(GRAOConfig)]


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a dataset, rewards, and faulty files."""
    (tmp_path / "model").symlink_to(tiny_model)
    (tmp_path / "rewards.py").write_text(REWARDS)
    write_jsonl(tmp_path / "sums.jsonl", sums(4))
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "a"}])
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * 600, "reference": "b"}])
    (tmp_path / "typo.yaml").write_text("lerning_rate: 1e-5\n")
    (tmp_path / "torn.yaml").write_text("learning_rate: [\n")
    (tmp_path / "twice.yaml").write_text("lam: 1\npeft:\n  r: 4\nbeta: 1\npeft.r: 8\n")
    (tmp_path / "latin.yaml").write_bytes(b"lam: 1\noutput_dir: caf\xe9\n")
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "train --model ./model --dataset sums.jsonl --reward rewards.py:correct "

# Errors found before torch and transformers are imported.
WRONG_OPTIONS = {
    "": "a command is needed: train, check, eval, plan, plot, report, demo",
    "trian": r"no such command 'trian' \(did you mean train\?\)",
    "train": "missing --model, --dataset;",
    "eval": "missing --model, --dataset, --reward",
    TRAIN + "--epsilon 2": "epsilon must be at most 1, got 2",
    "plot": "missing output_dir",
    "plot a b": "unexpected argument 'b'",
    TRAIN + "--lerning_rate 1": r"unknown option --lerning_rate \(did you mean --learning_rate\?\)",
    TRAIN + "--learning_rate": "--learning_rate: expected one argument",
    TRAIN + "--learning_rate fast": "learning_rate must be a number, got 'fast'",
    TRAIN + "--max_steps 1.5": "max_steps must be an integer, got '1.5'",
    TRAIN + "--statistics all": "statistics must be group or samples, got 'all'",
    TRAIN + "--reward_weights 1,2": r"reward_weights must be a list \[a number, ...\] or null",
    TRAIN + "--reward_timeout fast": r"reward_timeout must be a number or a list .* got 'fast'",
    TRAIN + "--num_generations 0": "num_generations must be at least 1, got 0",
    TRAIN + "--temperature 0": "temperature must be above 0",
    TRAIN + "--config typo.yaml": r"unknown key 'lerning_rate' .* \(did you mean learning_rate\?\)",
    TRAIN + "--config torn.yaml": "parsing config: .* line 2",
    TRAIN + "--config twice.yaml": "key 'peft.r' occurs twice, in lines 3 and 5: keep one",
    TRAIN + "--config latin.yaml": "config latin.yaml, line 2: byte 0xe9 is not UTF-8; convert",
    TRAIN + "--config=twice.yaml": "key 'peft.r' occurs twice, in lines 3 and 5: keep one",
    TRAIN + "--config absent.yaml": "--config: File does not exist: .*absent.yaml",
    TRAIN + "--peft.lora_alpha 8": "need --peft.r",
    "check --model ./model": "missing --dataset;",
    TRAIN.replace("train", "check") + "--num_generations 0": "num_generations must be at least 1",
    "eval --learning_rate 1": "unknown option --learning_rate",
    "demo --seed x": "seed must be an integer, got 'x'",
}

# Errors found before a model is loaded.
WRONG_INPUTS = {
    TRAIN + "--dataset absent.jsonl": "absent.jsonl.*no such file",
    TRAIN + "--dataset empty.jsonl": "empty.jsonl",
    TRAIN + "--dataset questions.jsonl": "no column `prompt`; it has question",
    TRAIN + "--reward rewards.py": "'rewards.py' names no function",
    TRAIN + "--reward absent.py:score": "no such file 'absent.py'",
    TRAIN + "--reward rewards.py:wrong": "rewards.py has no 'wrong'",
    TRAIN + "--dataset \x1b]0;title\x07\u202e.jsonl": r"\\x1b\]0;title\\x07\\u202e.jsonl'.*no such",
    TRAIN + "--reward rewards.py:not_a_function": "is not callable",
    TRAIN + "--reward rewards.py:wants_topic": "needs `topic`, which the dataset does not have",
    TRAIN + "--reward_weights [1,2]": "reward_weights must hold 1 finite number",
    TRAIN + "--reward_timeout [1,null]": "reward_timeout must be one number, or hold 1, one for",
    TRAIN + "--reward_type pairwise": "does not take `references`",
    TRAIN + "--output_dir file": "cannot write to output_dir 'file'",
    TRAIN + "--resume_from_checkpoint checkpoint-9": "checkpoint-9.* does not exist",
    TRAIN + "--resume_from_checkpoint true": "no whole checkpoint in '.*' to resume from",
    TRAIN.replace("train", "check") + "--check_prompts 0": "check_prompts must be a whole number",
    TRAIN.replace("train", "check") + "--dataset absent.jsonl": "absent.jsonl.*no such file",
    "eval --model ./model --dataset absent.jsonl --reward rewards.py:correct": "no such file",
    "train --model ./model --dataset sums.jsonl": "samples of this objective are scored: pass a",
    TRAIN + "--objective dpo(bta=1)": r"dpo has no option 'bta' \(did you mean beta\?\)",
    "plot file": "holds no metrics.jsonl",
}

# Errors that need the model or its samples to be found.
WRONG_TOGETHER = {
    TRAIN + "--model ./absent": "model folder './absent' does not exist",
    TRAIN + "--model notes": "cannot load model 'notes': ",
    TRAIN + "--model some/name": "cannot load model 'some/name': ",
    TRAIN + "--dataset long.jsonl --reward rewards.py:broken": "600 tokens .* do not fit",
    TRAIN + "--reward rewards.py:broken": r"broken raised ZeroDivisionError.*rewards.py, line 9\)",
    TRAIN + "--reward rewards.py:short": r"short returned 1 values for \d+ completions",
}


def short_name(argv: str) -> str:
    return argv.replace(TRAIN, "").replace("--", "") or "nothing"


def short_run(argv: str) -> str:
    settings = "--max_steps 1 --num_generations 2 --max_new_tokens 4 --device cpu"
    return f"{argv} {settings}" if argv.startswith(TRAIN) else argv


def one_line_of_error(argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv.split()) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("grao-fast: error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("argv", WRONG_OPTIONS, ids=short_name)
def test_wrong_option(argv: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_of_error(argv, capsys)
    assert re.search(WRONG_OPTIONS[argv], line)


@pytest.mark.parametrize("argv", WRONG_INPUTS, ids=short_name)
def test_wrong_input_is_reported_before_a_model_is_loaded(argv, folder, capsys, monkeypatch):
    import transformers

    def load(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    line = one_line_of_error(short_run(argv), capsys)
    assert re.search(WRONG_INPUTS[argv], line)


@pytest.mark.parametrize("argv", WRONG_TOGETHER, ids=short_name)
def test_model_and_data_that_do_not_go_together(argv, folder, capsys) -> None:
    line = one_line_of_error(short_run(argv), capsys)
    assert re.search(WRONG_TOGETHER[argv], line)


def test_process_exits_with_2_and_a_single_line(folder: Path) -> None:
    command = [sys.executable, "-m", "grao_fast", *(TRAIN + "--lam -1").split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "grao-fast: error: lam must be at least 0, got -1.0\n"
    assert done.stdout == ""


def test_errors_of_options_need_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; from grao_fast.cli.commands import main;"
        f"assert main({(TRAIN + '--lam -1').split()!r}) == 2;"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bugs_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grao_fast.trainer

    def train(**options: Any) -> None:
        json.loads("{")

    monkeypatch.setattr(grao_fast.trainer, "train", train)
    with pytest.raises(json.JSONDecodeError):
        main(TRAIN.split())


def test_errors_raised_for_users_are_user_errors() -> None:
    """Any other ValueError would leave the command line, which runs no verl, with a traceback."""
    folder = Path(grao_fast.__file__).parent
    raising = [file for file in folder.rglob("*.py") if "raise ValueError(" in file.read_text()]
    assert [file for file in raising if not {"kernels", "verl"} & {*file.parts}] == []


def test_help_lists_every_field_with_its_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "143, 130 or 129, stopped by SIGTERM, Ctrl-C or SIGHUP" in text
    documented = {name: words for fields in field_help().values() for name, words in fields.items()}
    assert sorted(documented) == sorted(FIELDS)
    for name, words in documented.items():
        assert f"--{name} " in text
        assert " ".join(words.split()) in text


def test_evaluation_takes_fields_of_the_config() -> None:
    assert set(EVALUATION_FIELDS) < set(FIELDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"grao-fast {__version__}\n"


@pytest.fixture
def passed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run a train command with a `train` that only records its arguments."""
    import grao_fast.trainer

    def record(argv: str) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []

        def train(**options: Any) -> grao_fast.trainer.TrainResult:
            calls.append(options)
            return grao_fast.trainer.TrainResult(1, {}, None, None, folder, None)  # type: ignore

        monkeypatch.setattr(grao_fast.trainer, "train", train)
        assert main(argv.split()) == 0
        return calls[0]

    return record


def test_defaults_are_the_configs(passed: Callable[[str], dict[str, Any]]) -> None:
    options = passed(TRAIN)
    assert options.pop("config") == GRAOConfig()
    assert options == {
        "model": "./model",
        "dataset": "sums.jsonl",
        "reward": "rewards.py:correct",
        "metric": None,
        "eval_dataset": None,
        "output_dir": "grao-output",
        "resume_from_checkpoint": None,
        "peft_config": None,
    }


def test_yaml_and_overrides(passed: Callable[[str], dict[str, Any]], folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "model: ./model\ndataset: sums.jsonl\nreward: [rewards.py:correct, rewards.py:short]\n"
        "learning_rate: 1e-5\nlam: 0.1\nreward_weights: [1, 0.5]\nbf16: null\n"
        "peft:\n  r: 4\n  target_modules: [q_proj, v_proj]\n"
    )
    options = passed("train --config run.yaml --lam 0.25 --resume_from_checkpoint true")
    assert options["reward"] == ["rewards.py:correct", "rewards.py:short"]
    assert options["resume_from_checkpoint"] is True
    assert options["config"] == GRAOConfig(
        learning_rate=1e-5, lam=0.25, reward_weights=(1.0, 0.5), bf16=None
    )
    lora = options["peft_config"]
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 8, {"q_proj", "v_proj"})


AUTO = "--resume_from_checkpoint auto"


@pytest.mark.parametrize(
    ("checkpoints", "given", "said"),
    [
        ([], "", "before the first step was done"),
        ([2, 10], "", f"checkpoint-10: grao-fast {TRAIN}--resume_from_checkpoint true\n"),
        ([2], AUTO, f"checkpoint-2: grao-fast {TRAIN}{AUTO}\n"),
    ],
    ids=["none yet", "two written", "auto"],
)
def test_interrupt_says_how_to_resume(checkpoints, given, said, folder, capsys, monkeypatch):
    import grao_fast.trainer

    def interrupted(**options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grao_fast.trainer, "train", interrupted)
    for step in checkpoints:
        (folder / f"grao-output/checkpoint-{step}").mkdir(parents=True)
    assert main((TRAIN + given).split()) == 130
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("command", [TRAIN, TRAIN.replace("train", "eval")], ids=["train", "eval"])
def test_signals_end_in_a_status_of_their_own(signum, status, command, folder, capsys, monkeypatch):
    import transformers

    def load(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    assert main(command.split()) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if "grao-fast:" in line]
    assert f"stopped by {signum.name}" in lines[-1]


def test_train_eval_and_plot_end_to_end(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--num_generations 2 --prompts_per_step 2 --max_new_tokens 8 --device cpu"
    argv = f"{TRAIN} {small} --max_steps 2 --eval_dataset sums.jsonl --output_dir run"
    assert main(argv.split()) == 0
    assert "2 steps" in capsys.readouterr().out
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-1] == 2
    assert main(["plot", "run"]) == 0
    plots = capsys.readouterr().out.splitlines()
    assert plots
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in plots)
    evaluation = TRAIN.replace("train", "eval").replace("./model", "run/final")
    argv = f"{evaluation} --base_model ./model --max_new_tokens 8 --device cpu --output_dir scores"
    assert main(argv.split()) == 0
    assert "RAS" in capsys.readouterr().out.upper()
    assert {"ras", "nag"} <= set(json.loads(Path("scores/eval.json").read_text()))


def test_an_adapter_is_evaluated_and_resumed_like_a_model(folder, capsys) -> None:
    small = "--num_generations 2 --prompts_per_step 2 --max_new_tokens 8 --device cpu"
    argv = f"{TRAIN} {small} --output_dir run --peft.r 2 --max_steps"
    assert main([*argv.split(), "2"]) == 0
    assert main([*argv.split(), "3", "--resume_from_checkpoint", "true"]) == 0
    assert "3 steps" in capsys.readouterr().out
    evaluation = TRAIN.replace("train", "eval").replace("./model", "run/final")
    assert main(f"{evaluation} --max_new_tokens 8 --device cpu".split()) == 0
