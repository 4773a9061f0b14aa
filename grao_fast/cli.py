"""The `grao-fast` command: train, eval, plot, demo.

Options come from `GRAOConfig`, and their help from its docstring. Whatever a user can get wrong is
one line on stderr and exit code 2; anything else keeps its traceback. Nothing here imports torch or
transformers until the options have been read and checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from grao_fast import __version__
from grao_fast.checkpoint import list_checkpoints
from grao_fast.cli_messages import explain, is_users_fault, one_line
from grao_fast.config import GRAOConfig

Options = dict[str, Any]

PROGRAM = "grao-fast"
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# What GRAOConfig means to an evaluation; the other fields would be accepted and ignored.
EVALUATION_FIELDS = (
    "reward_type",
    "reward_weights",
    "max_new_tokens",
    "max_prompt_length",
    "max_reference_length",
    "generation_batch_size",
    "bf16",
    "device",
    "seed",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = build_parser()
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        parsed = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        hints = commands[command].hints if command in commands else {}
        return _fail(explain(error.message, command if hints else "", hints, list(commands)))
    options = parsed[parsed.command].as_dict()
    options.pop("config", None)
    # Rewards named as module:function lie where the user stands. Last, not first: a checkout's own
    # folders must not hide installed packages.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        commands[parsed.command].run(options)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: {_how_to_resume(arguments, options)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if not is_users_fault(error):
            raise
        return _fail(one_line(error))
    return 0


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return EXIT_USAGE


def _how_to_resume(arguments: list[str], options: Options) -> str:
    if arguments[0] != "train":
        return "interrupted"
    checkpoints = list_checkpoints(Path(options["output_dir"]))
    if not checkpoints:
        return "interrupted before the first checkpoint (see --save_steps); nothing to resume"
    # The last --resume_from_checkpoint counts, so adding one also serves a run already resumed.
    again = shlex.join([PROGRAM, *arguments, "--resume_from_checkpoint", "true"])
    return f"interrupted; to go on from {checkpoints[0].name}: {again}"


# Commands --------------------------------------------------------------------------------------


def _train(options: Options) -> None:
    peft = {name[5:]: options.pop(name) for name in list(options) if name.startswith("peft.")}
    peft |= options.pop("peft", {})
    config = GRAOConfig(**_take_config(options))
    peft_config = _lora_config(**peft)

    from grao_fast.trainer import train

    result = train(**options, config=config, peft_config=peft_config)
    print(f"{result.steps} steps; model, metrics and checkpoints are in {result.output_dir}")


def _eval(options: Options) -> None:
    config = GRAOConfig(**_take_config(options))

    from grao_fast import evaluate

    result = evaluate(**options, config=config)
    from rich.console import Console

    Console().print(result.table())


def _plot(options: Options) -> None:
    from grao_fast.plots import plot_run

    for path in plot_run(options["output_dir"]):
        print(path)


def _demo(options: Options) -> None:
    from grao_fast.demo import run_demo

    run_demo(**options)


def _take_config(options: Options) -> Options:
    """Take the fields of GRAOConfig out of options."""
    names = [field.name for field in dataclasses.fields(GRAOConfig) if field.name in options]
    return {name: options.pop(name) for name in names}


def _lora_config(
    r: int | None, lora_alpha: int | None, lora_dropout: float, target_modules: list[str] | str
) -> Any:
    """peft.LoraConfig, or None where no rank is given and every parameter is trained."""
    if r is None:
        if lora_alpha is not None or lora_dropout or target_modules != "all-linear":
            raise ValueError("options under --peft need --peft.r, the rank of LoRA's matrices")
        return None
    try:
        from peft import LoraConfig
    except ImportError:
        raise ValueError('--peft.r needs peft: pip install "grao-fast[peft]"') from None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
    )


# Parser ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, its parser, and the type of every option."""

    run: Callable[[Options], None]
    parser: ArgumentParser
    hints: dict[str, Any]

    @classmethod
    def new(cls, run: Callable[[Options], None], usage: str, description: str) -> Command:
        return cls(run, _parser(f"{PROGRAM} {usage}", description), {})

    def add(self, flag: str, hint: Any, help: str, *, group: Any = None, **settings: Any) -> None:
        """Add an option, `--name`, or an argument, `name`, to the parser or to a group of it."""
        help = help.replace("%", "%%")
        (group or self.parser).add_argument(flag, type=hint, help=help, **settings)
        self.hints[flag.removeprefix("--")] = hint


def build_parser() -> tuple[ArgumentParser, dict[str, Command]]:
    """The parser of the whole command, and its subcommands by name."""
    commands = {
        "train": _train_command(),
        "eval": _eval_command(),
        "plot": Command.new(
            _plot, "plot output_dir", "Draw a run's reward, loss and components as PNG."
        ),
        "demo": Command.new(
            _demo,
            "demo [options]",
            "Align a tiny model on the spot: no download, no GPU, under three minutes.",
        ),
    }
    commands["plot"].add("output_dir", str, "folder of the run")
    commands["demo"].add("--seed", int, "of everything random", default=0)
    commands["demo"].add("--output_dir", str, "where to write", default="grao-demo")

    parser = _parser(
        f"{PROGRAM} [--version] command ...",
        "Group Relative Alignment Optimization (arXiv 2508.07750).",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, command in commands.items():
        subcommands.add_subcommand(name, command.parser, help=command.parser.description)
    return parser, commands


def _parser(usage: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=PROGRAM,
        usage=usage,
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _train_command() -> Command:
    command = Command.new(_train, "train [options]", "Align a model by GRAO.")
    _add_run_options(command)
    command.add("--eval_dataset", str | None, "evaluated before and after the run", default=None)
    command.add("--output_dir", str, "where everything is written", default="grao-output")
    command.add(
        "--resume_from_checkpoint",
        bool | str | None,
        "a checkpoint's folder; true: the newest in output_dir",
        default=None,
    )
    for section, fields in field_help().items():
        _add_fields(command, section, fields)
    lora = command.parser.add_argument_group("LoRA", "peft.LoraConfig; without a rank, no LoRA")
    command.add("--peft.r", int | None, "rank", group=lora, default=None)
    command.add("--peft.lora_alpha", int | None, "2 r by default", group=lora, default=None)
    command.add("--peft.lora_dropout", float, "dropout on LoRA's input", group=lora, default=0.0)
    command.add(
        "--peft.target_modules",
        list[str] | str,
        "names of the layers that get one",
        group=lora,
        default="all-linear",
    )
    return command


def _eval_command() -> Command:
    command = Command.new(
        _eval,
        "eval [options]",
        "Compare a model's answers with the references (RAS) and with a base model's (NAG).",
    )
    _add_run_options(command)
    command.add("--base_model", str | None, "the model before alignment, for NAG", default=None)
    command.add("--output_dir", str | None, "where eval.json is written", default=None)
    for section, fields in field_help().items():
        kept = {name: text for name, text in fields.items() if name in EVALUATION_FIELDS}
        if kept:
            _add_fields(command, section, kept)
    return command


def _add_run_options(command: Command) -> None:
    command.parser.add_argument(
        "--config",
        action="config",
        help="YAML with any of the options below; of an option given twice, the later one counts",
    )
    command.add("--model", str, "hub id or folder", required=True)
    command.add("--dataset", str, "hub id, file (jsonl, parquet...) or folder", required=True)
    command.add(
        "--reward",
        list[str] | str,
        "package.module:function or file.py:function; a list of them is summed by reward_weights",
        required=True,
    )
    command.add("--metric", str | None, "a held-out metric, named like a reward", default=None)


def _add_fields(command: Command, section: str, fields: dict[str, str]) -> None:
    hints = get_type_hints(GRAOConfig)
    defaults = {field.name: field.default for field in dataclasses.fields(GRAOConfig)}
    group = command.parser.add_argument_group(section)
    for name, text in fields.items():
        command.add(f"--{name}", hints[name], text, group=group, default=defaults[name])


def field_help() -> dict[str, dict[str, str]]:
    """Section -> field -> what GRAOConfig's docstring says of it.

    The docstring's form is `Section:` at the margin, `name, name: text` below it, and the text's
    further lines deeper still.
    """
    sections: dict[str, dict[str, str]] = {}
    names: list[str] = []
    fields: dict[str, str] = {}
    for line in (GRAOConfig.__doc__ or "").splitlines()[1:]:
        indent = (len(line) - len(line.lstrip())) // 4
        if indent == 1:
            fields = sections.setdefault(line.strip().rstrip(":"), {})
        elif indent == 2:
            listed, text = line.strip().split(": ", 1)
            names = listed.split(", ")
            fields.update(dict.fromkeys(names, text))
        elif indent >= 3:
            fields.update({name: f"{fields[name]} {line.strip()}" for name in names})
    return sections
