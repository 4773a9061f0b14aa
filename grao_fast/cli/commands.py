"""Runs the `grao-fast` command: train, check, eval, plan, plot, report, demo.

An error that the user can correct is printed as one line on stderr, with exit code 2. A run that a
signal stopped ends with 128 + the number of the signal. Any other error keeps its traceback. Torch
and transformers are imported only after the options have been read and checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from grao_fast import __version__
from grao_fast.cli.check import check_command, show
from grao_fast.cli.messages import explain
from grao_fast.cli.options import PROGRAM, Command, eval_command, parser_of, train_command
from grao_fast.cli.plan import plan_command
from grao_fast.cli.report import report_command
from grao_fast.cli.yaml_files import check_no_key_twice, config_files
from grao_fast.config import GRAOConfig
from grao_fast.distributed import launcher
from grao_fast.system.errors import UserError, one_line
from grao_fast.system.interruption import Preempted
from grao_fast.system.optional import import_optional
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import VisibleFormatter, visible
from grao_fast.training.checkpoint import list_checkpoints

Options = dict[str, Any]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_GRACE = 5.0  # seconds after which a failed command ends, even if threads of rewards hang


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with lenient_streams(to_the_end=True):
        code = _main(arguments)
    if code and argv is None:
        # Python waits for all threads of thread pools at exit, and a reward may hang in one.
        timer = threading.Timer(_GRACE, os._exit, (code,))
        timer.daemon = True
        timer.start()
    return code


def _main(arguments: list[str]) -> int:
    parser, commands = build_parser()
    command = next((word for word in arguments if not word.startswith("-")), "")
    try:
        for file in config_files(arguments):
            check_no_key_twice(file)
    except UserError as error:
        return _refuse(str(error))
    try:
        parsed = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        hints = commands[command].hints if command in commands else {}
        return _refuse(explain(error.message, command if hints else "", hints, list(commands)))
    options = parsed[parsed.command].as_dict()
    options.pop("config", None)
    log = logging.StreamHandler()
    log.setFormatter(VisibleFormatter(f"{PROGRAM}: %(message)s"))
    logging.basicConfig(handlers=[log])
    logging.getLogger("grao_fast").setLevel(logging.INFO)
    # Rewards named as module:function are looked up in the working directory too. It comes last, so
    # that folders of a checkout do not hide installed packages.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return commands[parsed.command].run(options) or 0
    except Preempted as stop:
        _say_once(_how_to_resume(str(stop), arguments, options))
        return 128 + stop.signum
    except KeyboardInterrupt:
        _say_once(_how_to_resume("interrupted", arguments, options))
        return EXIT_INTERRUPTED
    except _WrongOptions as error:
        return _refuse(one_line(error))
    except UserError as error:
        return _fail(one_line(error) + (f" ({error.place})" if error.place else ""))
    except (OSError, FloatingPointError) as error:  # a file failed, or training diverged
        return _fail(one_line(error))


class _WrongOptions(UserError):
    """An error of options, which every process finds before they have joined."""


@contextmanager
def _wrong_options() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise _WrongOptions(one_line(error)) from error


def _refuse(message: str) -> int:
    """Print an error of the command itself; once, if several processes were started with it."""
    if launcher.size() == 1:
        return _fail(message)
    from grao_fast.distributed.launch import refuse_together

    try:
        refuse_together(message)
    except UserError as error:
        return _fail(one_line(error))


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return EXIT_USAGE


def _say(message: str) -> None:
    print(f"{PROGRAM}: {visible(message)}", file=sys.stderr)


def _say_once(message: str) -> None:
    """Print a message that every process of a run has."""
    if launcher.rank() == 0:
        _say(message)


def _how_to_resume(what: str, arguments: list[str], options: Options) -> str:
    if arguments[0] != "train":
        return what
    checkpoints = list_checkpoints(Path(options["output_dir"]).expanduser())
    if not checkpoints:
        return f"{what} before the first step was done; there is nothing to resume"
    if launcher.size() > 1:  # by a command that is not known here
        return f"{what}; launched again with --resume_from_checkpoint auto, it goes on from " + (
            checkpoints[0].name
        )
    again = [PROGRAM, *arguments]
    if options["resume_from_checkpoint"] not in (True, "auto"):  # as they are, these resume
        again += ["--resume_from_checkpoint", "true"]  # of several the last counts
    return f"{what}; to resume from {checkpoints[0].name}: {shlex.join(again)}"


# Commands --------------------------------------------------------------------------------------


def _train(options: Options) -> None:
    config, peft_config = _configs(options)

    from grao_fast.trainer import train

    result = train(**options, config=config, peft_config=peft_config)
    where = visible(str(result.output_dir))
    if launcher.rank() == 0:
        print(f"{result.steps} steps; model, metrics and checkpoints are in {where}")


def _check(options: Options) -> int:
    config, peft_config = _configs(options)

    from grao_fast.checkup.run import check

    return show(check(**options, config=config, peft_config=peft_config))


def _eval(options: Options) -> None:
    with _wrong_options():
        config = GRAOConfig(**_take_config(options))

    from rich.console import Console

    from grao_fast.evaluation.evaluate import evaluate

    result = evaluate(**options, config=config)
    if launcher.rank() == 0:
        Console().print(result.table())


def _plan(options: Options) -> None:
    config, peft_config = _configs(options)

    from grao_fast.cli.plan_tables import print_plan

    print_plan(**options, config=config, peft_config=peft_config)


def _plot(options: Options) -> None:
    from grao_fast.reporting.plots import plot_run

    for path in plot_run(options["output_dir"]):
        print(visible(str(path)))


def _demo(options: Options) -> None:
    from grao_fast.demo import run_demo

    run_demo(**options)


def _configs(options: Options) -> tuple[GRAOConfig, Any]:
    """Remove the options of a run and of its adapter, and return the configuration of each."""
    with _wrong_options():
        return GRAOConfig(**_take_config(options)), _lora_config(**options.pop("peft"))


def _take_config(options: Options) -> Options:
    """Remove the fields of GRAOConfig from options, and return them."""
    names = [field.name for field in dataclasses.fields(GRAOConfig) if field.name in options]
    return {name: options.pop(name) for name in names}


def _lora_config(
    r: int | None, lora_alpha: int | None, lora_dropout: float, target_modules: list[str] | str
) -> Any:
    """Return a peft.LoraConfig; None without a rank, to train all parameters."""
    if r is None:
        if lora_alpha is not None or lora_dropout or target_modules != "all-linear":
            raise UserError("options under --peft need --peft.r, the rank of the LoRA matrices")
        return None
    peft = import_optional("peft", extra="peft", option="--peft.r")
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules,
    )


def build_parser() -> tuple[ArgumentParser, dict[str, Command]]:
    """Return the parser of the whole command, and its subcommands by name."""
    commands = {
        "train": train_command(_train),
        "check": check_command(_check),
        "eval": eval_command(_eval),
        "plan": plan_command(_plan),
        "plot": Command.new(
            _plot, "plot output_dir", "Draw a run's reward, loss and components as PNG."
        ),
        "report": report_command(),
        "demo": Command.new(
            _demo,
            "demo [options]",
            "Align a tiny model: no download, no GPU, under three minutes.",
        ),
    }
    commands["plot"].add_argument("output_dir", str, "folder of the run")
    commands["demo"].add("--seed", int, "seed of everything random", default=0)
    commands["demo"].add("--output_dir", str, "folder for the results", default="grao-demo")

    parser = parser_of(
        f"{PROGRAM} [--version] command ...",
        "Group Relative Alignment Optimization (arXiv 2508.07750).",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subcommands = parser.add_subcommands(dest="command")
    for name, command in commands.items():
        subcommands.add_subcommand(name, command.parser, help=command.parser.description)
    return parser, commands
