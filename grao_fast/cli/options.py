"""Builds the options of `grao-fast` from the fields and the docstring of `GRAOConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from grao_fast.config import GRAOConfig

PROGRAM = "grao-fast"
Run = Callable[[dict[str, Any]], int | None]  # returns the exit status; None: 0

EXIT_STATUS = (
    "Exit status: 0, done; 2, an error that can be corrected, explained in one line; 1, any other "
    "error, with a traceback; 143, 130 or 129, stopped by SIGTERM, Ctrl-C or SIGHUP. A training "
    "run that is stopped, or fails, leaves a checkpoint of the steps that are done; with "
    "--resume_from_checkpoint auto, the same command starts a run or resumes it."
)

# The fields of GRAOConfig that affect an evaluation; options for the others would have no effect.
EVALUATION_FIELDS = (
    "reward_type",
    "reward_weights",
    "reward_timeout",
    "num_generations_eval",
    "temperature",
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
    """A subcommand: the function that runs it, its parser, and the types of its options."""

    run: Run
    parser: ArgumentParser
    hints: dict[str, Any]

    @classmethod
    def new(
        cls, run: Run, usage: str, description: str, *, exit_status: str = EXIT_STATUS
    ) -> Command:
        return cls(run, parser_of(f"{PROGRAM} {usage}", description, exit_status), {})

    def add(
        self,
        name: str,
        hint: Any,
        help: str,
        *,
        group: Any = None,
        default: Any = None,
        required: bool = False,
    ) -> None:
        """Add an option (`--name`) to the parser, or to a group of it."""
        settings: dict[str, Any] = {"required": True} if required else {"default": default}
        self._add(name, hint, help, group or self.parser, settings)

    def add_argument(self, name: str, hint: Any, help: str) -> None:
        """Add a positional argument."""
        self._add(name, hint, help, self.parser, {})

    def _add(self, name: str, hint: Any, help: str, group: Any, settings: dict[str, Any]) -> None:
        group.add_argument(name, type=hint, help=help.replace("%", "%%"), **settings)
        self.hints[name.removeprefix("--")] = hint


def parser_of(usage: str, description: str, exit_status: str = EXIT_STATUS) -> ArgumentParser:
    """Return a parser with the settings that all commands share."""
    return ArgumentParser(
        prog=PROGRAM,
        usage=usage,
        description=description,
        epilog=exit_status,
        exit_on_error=False,
        allow_abbrev=False,
    )


def train_command(run: Run) -> Command:
    """Build `grao-fast train`, with all fields of GRAOConfig, and LoRA's under --peft."""
    command = Command.new(run, "train [options]", "Align a model by GRAO.")
    add_train_options(command)
    return command


def add_train_options(command: Command) -> None:
    """Add the options of a training run."""
    _add_run_options(command, needs_reward=False)
    command.add(
        "--eval_dataset", str | None, "dataset to evaluate before and after the run", default=None
    )
    command.add("--output_dir", str, "folder for everything that is written", default="grao-output")
    command.add(
        "--resume_from_checkpoint",
        bool | str | None,
        "folder of a checkpoint; true: the newest in output_dir; auto: the same if there is one",
        default=None,
    )
    add_fields(command, [field.name for field in dataclasses.fields(GRAOConfig)])
    add_lora_options(command)


def add_lora_options(command: Command) -> None:
    """Add the options of peft.LoraConfig under --peft."""
    lora = command.parser.add_argument_group("LoRA", "peft.LoraConfig; used if a rank is given")
    command.add("--peft.r", int | None, "rank of the matrices", group=lora, default=None)
    command.add(
        "--peft.lora_alpha",
        int | None,
        "updates are scaled by lora_alpha / r; null: 2 r",
        group=lora,
        default=None,
    )
    command.add("--peft.lora_dropout", float, "dropout on LoRA's input", group=lora, default=0.0)
    command.add(
        "--peft.target_modules",
        list[str] | str,
        "names of the layers that LoRA adapts",
        group=lora,
        default="all-linear",
    )


def eval_command(run: Run) -> Command:
    """Build `grao-fast eval`, with the EVALUATION_FIELDS of GRAOConfig."""
    command = Command.new(
        run,
        "eval [options]",
        "Compare a model's answers with the references (RAS) and with a base model's (NAG).",
    )
    _add_run_options(command, needs_reward=True)
    command.add("--base_model", str | None, "model before alignment, for NAG", default=None)
    command.add("--output_dir", str | None, "folder for eval.json; null: none", default=None)
    add_fields(command, EVALUATION_FIELDS)
    return command


def _add_run_options(command: Command, *, needs_reward: bool) -> None:
    command.parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the options below; the last value of an option counts",
    )
    command.add("--model", str, "hub id or folder of a model or an adapter", required=True)
    command.add("--dataset", str, "hub id, file (jsonl, parquet...) or folder", required=True)
    command.add(
        "--reward",
        list[str] | str if needs_reward else list[str] | str | None,
        "package.module:function or file.py:function; several are summed with reward_weights"
        + ("" if needs_reward else "; not needed where nothing is sampled or evaluated"),
        required=needs_reward,
    )
    command.add("--metric", str | None, "held-out metric, given like a reward", default=None)


def add_fields(command: Command, names: Collection[str]) -> None:
    """Add the options of these fields of GRAOConfig, in the sections of its docstring."""
    hints = get_type_hints(GRAOConfig)
    defaults = {field.name: field.default for field in dataclasses.fields(GRAOConfig)}
    for section, fields in field_help().items():
        kept = {name: text for name, text in fields.items() if name in names}
        if kept:
            group = command.parser.add_argument_group(section)
            for name, text in kept.items():
                command.add(f"--{name}", hints[name], text, group=group, default=defaults[name])


def field_help() -> dict[str, dict[str, str]]:
    """Return the description of every field in GRAOConfig's docstring, by section and field.

    In the docstring, `Section:` stands at the margin, `name, name: text` one level deeper, and
    further lines of the text deeper still.
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
