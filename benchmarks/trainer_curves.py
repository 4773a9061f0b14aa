"""Trains one model by `grao_fast.train` and by GRAOTrainer, and keeps both curves.

    python benchmarks/trainer_curves.py MODEL  # -> benchmarks/results/trainer_curves-cpu.json
    python benchmarks/table.py                 # -> docs/results/trl.md and its picture

MODEL is a folder. There are four runs: `grao_fast.train`; GRAOTrainer with the samples of that run;
with its sampler and seeds; and as TRL samples by itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples" / "math"))

from measure import load_average, machine_facts
from problems import problems
from trainer_problem import GRAO_IN_TRL, OURS, Run, Samples, Settings
from trainer_sides import train

RESULTS = Path(__file__).parent / "results" / "trainer_curves-cpu.json"
METRICS = ("reward", "loss", "reference/logprob")
ROWS = 400
SETTINGS = Settings(
    steps=20, prompts=4, samples=4, new_tokens=32, temperature=1.0, learning_rate=1e-5
)
RUNS = {
    "ours": "`grao_fast.train`",
    "replayed": "GRAOTrainer, the same samples",
    "shared": "GRAOTrainer, the same sampler and seeds",
    "own": "GRAOTrainer, TRL's `generate`",
}


class Curve(Run):
    """Keeps the metrics of every step, and the texts that were scored in it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, float]] = []
        self.texts: list[Counter[str]] = []
        self.samples: list[Samples] = []

    def end(self, step: int, figures: dict[str, float]) -> None:
        self.steps.append({name: figures[name] for name in (*METRICS, "grad_norm")})
        self.texts.append(Counter(self.said))
        self.samples.append(self.sampled)
        print(step, self.steps[-1], flush=True)


def curves(
    model_folder: Path,
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    names: Sequence[str] = tuple(RUNS),
) -> dict[str, list[dict[str, float]]]:
    """The metrics of every step of each run.

    `same` is the number of samples that are those of `grao_fast.train`, to the letter.
    """
    kept: dict[str, Curve] = {}
    for name in names:
        kept[name] = Curve()
        train(
            OURS if name == "ours" else GRAO_IN_TRL,
            model_folder,
            rows,
            settings,
            kept[name],
            sampling=name if name in ("shared", "replayed") else "own",
            known=kept["ours"].samples if name == "replayed" else (),
        )
        for step, ours, own in zip(
            kept[name].steps, kept["ours"].texts, kept[name].texts, strict=True
        ):
            step["same"] = (ours & own).total() - settings.prompts  # less the references
    return {name: curve.steps for name, curve in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    load = load_average()
    runs = curves(arguments.model, problems(ROWS, seed=SETTINGS.seed), SETTINGS)
    result = {
        "command": "python benchmarks/trainer_curves.py MODEL",
        "date": datetime.date.today().isoformat(),
        "machine": machine_facts("cpu") | {"load": load},
        "settings": asdict(SETTINGS),
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
