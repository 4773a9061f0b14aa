"""The options of `grao-fast`, made from `GRAOConfig` and its docstring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from grao_fast.config import GRAOConfig

PROGRAM = "grao-fast"
Run = Callable[[dict[str, Any]], None]

EXIT_STATUS = (
    "Exit status: 0, done; 2, an error that one line explains; 1, an error with its "
    "traceback; 143, 130 or 129, stopped by SIGTERM, Ctrl-C or SIGHUP. A training run that is "
    "stopped, or fails, leaves a checkpoint of the steps that are done, and with "
    "--resume_from_checkpoint auto the same command begins or goes on."
)

# What GRAOConfig means to an evaluation; the other fields would be accepted and ignored.
EVALUATION_FIELDS = (
    "reward_type",
    "reward_weights",
    "reward_timeout",
    "max_new_tokens",
    "max_prompt_length",
    "generation_batch_size",
    "cache_implementation",
    "bf16",
    "device",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: what runs it, its parser, and the type of every option."""

    run: Run
    parser: ArgumentParser
    hints: dict[str, Any]

    @classmethod
    def new(cls, run: Run, usage: str, description: str) -> Command:
        return cls(run, parser_of(f"{PROGRAM} {usage}", description), {})

    def add(self, flag: str, hint: Any, help: str, *, group: Any = None, **settings: Any) -> None:
        """Add an option, `--name`, or an argument, `name`, to the parser or to a group of it."""
        help = help.replace("%", "%%")
        (group or self.parser).add_argument(flag, type=hint, help=help, **settings)
        self.hints[flag.removeprefix("--")] = hint


def parser_of(usage: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=PROGRAM,
        usage=usage,
        description=description,
        epilog=EXIT_STATUS,
        exit_on_error=False,
        allow_abbrev=False,
    )


def train_command(run: Run) -> Command:
    """`grao-fast train`: every field of GRAOConfig, and LoRA's under --peft."""
    command = Command.new(run, "train [options]", "Align a model by GRAO.")
    _add_run_options(command)
    command.add("--eval_dataset", str | None, "evaluated before and after the run", default=None)
    command.add("--output_dir", str, "where everything is written", default="grao-output")
    command.add(
        "--resume_from_checkpoint",
        bool | str | None,
        "a checkpoint's folder; true: the newest in output_dir; auto: that one, or to begin",
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


def eval_command(run: Run) -> Command:
    """`grao-fast eval`."""
    command = Command.new(
        run,
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
    command.add("--model", str, "hub id or folder, of a model or an adapter", required=True)
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
