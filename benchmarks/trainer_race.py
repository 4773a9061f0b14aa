"""Checks and times whole steps of three trainers, a process each, in turns; a program.

    python benchmarks/trainer_race.py MODEL [--rounds 5]  # -> benchmarks/results/trainers-cpu.json

MODEL is a folder. Each samples in its own way, on the clock, and all then score and learn from what
`grao_fast.train` samples, so that they have the same sequences; the learning rate is 0, so that
they keep the same weights. TRL is handed these samples, which are drawn before the race. The first
step is not timed: in it, the norm of each side's gradient, and the losses of the two that have
references, are compared with those of the formulas. While one takes a step, the others wait.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples" / "math"))

import torch
from measure import _resident_mib, load_average, machine_facts, quartiles
from problems import problems
from step_race import give_back, trl_absence
from step_sides import naive_gradient
from torch import Tensor
from trainer_ours import samples_of
from trainer_problem import (
    GRAO_IN_TRL,
    GRPO,
    LABELS,
    OURS,
    Run,
    Samples,
    Settings,
    order_of,
    right_and_brief,
)
from trainer_sides import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from grao_fast.data.encoder import Encoder
from grao_fast.kernels import group_advantages, sequence_weights

RESULTS = Path(__file__).parent / "results" / "trainers-cpu.json"
ROWS = 64
WARM_UP = 1
PHASES = ("sample", "score", "update")
TOKENS = ("own_tokens", "learned_tokens")
_FORGET = Path("/proc/self/clear_refs")

Figures = dict[str, float]


class _Turns(Run):
    """Takes a step whenever the other end of a link says so, and sends its figures."""

    def __init__(self, link: Connection) -> None:
        super().__init__()
        self.link = link
        self.start_mib = _resident_mib("VmRSS") if _FORGET.exists() else None

    def begin(self, step: int) -> None:
        super().begin(step)
        give_back()
        self.link.recv()
        if self.start_mib is not None:
            _FORGET.write_text("5")  # sets the peak to what is resident now

    def end(self, step: int, figures: Figures) -> None:
        if self.start_mib is not None:
            figures["peak_mib"] = _resident_mib("VmHWM") - self.start_mib
        self.link.send((figures, list(self.said)))


def _work(
    link: Connection,
    side: str,
    model_folder: Path,
    rows: list,
    settings: Settings,
    known: list[Samples],
) -> None:
    if side != OURS:  # before memory is read for the first time
        import trl.trainer.grpo_trainer  # noqa: F401
    train(side, model_folder, rows, settings, _Turns(link), sampling="replaced", known=known)


def race(
    sides: Sequence[str], model_folder: Path, rows: list[dict[str, Any]], settings: Settings
) -> dict[str, list[Figures]]:
    """The figures of every step of each side, those of the warm-up included.

    Raises:
        AssertionError: the first step is not that of the formulas.
    """
    context = multiprocessing.get_context("spawn")
    known = samples_of(model_folder, rows, settings)
    links: dict[str, Connection] = {}
    processes = []
    for side in sides:
        here, there = context.Pipe()
        process = context.Process(
            target=_work, args=(there, side, model_folder, rows, settings, known), daemon=True
        )
        process.start()
        there.close()  # or the death of the process would not be seen
        links[side] = here
        processes.append(process)
    steps: dict[str, list[Figures]] = {side: [] for side in sides}
    for turn in range(settings.steps):
        start = turn % len(sides)
        said: dict[str, list[str]] = {}
        for side in (*sides[start:], *sides[:start]):
            links[side].send(None)
            figures, said[side] = links[side].recv()
            steps[side].append(figures)
            print(turn, side, figures, flush=True)
        check_texts(said, settings.prompts)
        if turn == 0:
            tokenizer = AutoTokenizer.from_pretrained(model_folder)
            own = [rows[i] for i in order_of(rows, settings).batch(0)]
            rollout = rollout_of(known[0], own, tokenizer, settings.samples)
            first = {side: figures[0] for side, figures in steps.items()}
            check_first_step(first, rollout, model_folder)
    for process in processes:
        process.join(60)
    return steps


# Correctness


def check_texts(said: Mapping[str, list[str]], references: int) -> None:
    """Check that all sides have scored the same texts, but that GRPO scores no references."""
    texts = Counter(said[OURS])
    for side, own in said.items():
        others = texts - Counter(own)
        unscored = references if side == GRPO else 0
        assert others.total() == unscored, f"{side} has scored other texts than {OURS}"


def check_first_step(
    steps: Mapping[str, Figures], rollout: SimpleNamespace, model_folder: Path
) -> None:
    """Check that the steps of all sides are the formulas'.

    Norms of gradients agree to 1e-4, as in process_race.py; the losses of GRAO's sides to 1e-5 (the
    loss that GRPOTrainer logs is 0 by construction, and is not compared).
    """
    truth = dict.fromkeys(
        (OURS, GRAO_IN_TRL), formula(model_folder, rollout, grao_weights(rollout))
    )
    truth[GRPO] = formula(model_folder, rollout, grpo_weights(rollout))
    for side, own in steps.items():
        loss, norm = truth[side]
        off = abs(own["grad_norm"] / norm - 1)
        assert off <= 1e-4, f"{side}: the gradient's norm is off by {off:.1e}"
        if side != GRPO:
            off = abs(own["loss"] - loss)
            assert off <= 1e-5 * max(1.0, abs(loss)), f"{side}: the loss is off by {off:.1e}"


def rollout_of(
    sampled: Samples,
    rows: Sequence[dict[str, Any]],
    tokenizer: Any,
    samples: int,
) -> SimpleNamespace:
    """The prompts, samples, references and rewards of a step, as `naive_gradient` takes them."""
    prompts, completions, rewards = [], [], []
    for n, row in enumerate(rows):
        group = sampled[n * samples : (n + 1) * samples]
        (encoded,) = Encoder(tokenizer).encode([row["prompt"]], [row["reference"]])
        assert group[0][0] == encoded.prompt
        prompts.append(SimpleNamespace(prompt_ids=encoded.prompt, reference_ids=encoded.reference))
        completions.append([SimpleNamespace(token_ids=ids) for _, ids in group])
        texts = tokenizer.batch_decode([ids for _, ids in group], skip_special_tokens=True)
        texts.append(row["reference"])
        rewards.append(right_and_brief(texts, [row["answer"]] * len(texts)))
    return SimpleNamespace(
        prompts=prompts,
        completions=completions,
        rewards_NK=torch.tensor(rewards, dtype=torch.float64),
    )


def grao_weights(rollout: SimpleNamespace) -> Tensor:
    """w of GRAO's loss -(1/N) sum_s w_s L(s), with the defaults of all sides."""
    return sequence_weights(group_advantages(rollout.rewards_NK))


def grpo_weights(rollout: SimpleNamespace) -> Tensor:
    """The same of TRL's GRPO, whose references weigh nothing."""
    samples_NG = rollout.rewards_NK[:, :-1]
    spread_N1 = samples_NG.std(1, keepdim=True)
    advantages_NG = (samples_NG - samples_NG.mean(1, keepdim=True)) / (spread_N1 + 1e-4)
    return torch.nn.functional.pad(advantages_NG / samples_NG.shape[1], (0, 1))


def formula(
    model_folder: Path, rollout: SimpleNamespace, weights_NK: Tensor
) -> tuple[float, float]:
    """The loss, and the norm of its gradient, from whole logits of each sequence alone."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loss, gradient = naive_gradient(model, rollout, weights_NK)
    return loss, math.sqrt(sum(float(part.double().square().sum()) for part in gradient))


# What is kept


def result_of(
    steps: Mapping[str, list[Figures]], settings: Settings, *, load: float | None, minutes: float
) -> dict[str, Any]:
    """The file of results: a row a side.

    over: what its step takes over that of another side in the same round.
    """
    rows = []
    for side, own in steps.items():
        timed = own[WARM_UP:]
        peaks = [figures["peak_mib"] for figures in timed if "peak_mib" in figures]
        row = {"variant": side, "label": LABELS[side]} | quartiles([f["step"] for f in timed])
        row |= {name: statistics.median(f[name] for f in timed) for name in (*PHASES, *TOKENS)}
        row["peak_mib"] = max(peaks, default=None)
        row["over"] = {
            other: quartiles(
                [f["step"] / g["step"] for f, g in zip(timed, theirs[WARM_UP:], strict=True)]
            )
            for other, theirs in steps.items()
            if other != side
        }
        rows.append(row | {"each_round": timed})
    absent = trl_absence()
    return {
        "command": "python benchmarks/trainer_race.py MODEL",
        "date": datetime.date.today().isoformat(),
        "machine": machine_facts("cpu") | {"load": load},
        "minutes": minutes,
        "settings": asdict(settings),
        "absent": {} if absent is None else {LABELS[GRPO]: absent, LABELS[GRAO_IN_TRL]: absent},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, of which there are quartiles")
    load, started = load_average(), time.monotonic()
    settings = Settings(steps=WARM_UP + arguments.rounds, learning_rate=0.0)
    sides = [OURS] if trl_absence() else [GRPO, GRAO_IN_TRL, OURS]
    steps = race(sides, arguments.model, problems(ROWS, seed=settings.seed), settings)
    minutes = (time.monotonic() - started) / 60
    result = result_of(steps, settings, load=load, minutes=minutes)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
