"""What a run writes and shows as it goes on: by rank 0, for all processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grao_fast.config import GRAOConfig
from grao_fast.distributed.world import World
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.objectives import split_objective
from grao_fast.reporting.tracking import Tracker
from grao_fast.system.files import write_file
from grao_fast.system.lines import METRICS_FILE, read_lines, write_lines
from grao_fast.training.diagnosis import Diagnosis
from grao_fast.training.results import samples
from grao_fast.training.rollout import Rollout
from grao_fast.training.state import versions


class Report:
    """The files, trackers and console of a run. Every process must call its methods.

    Args:
        start_step: the step that a resumed run starts from.

    metrics: of the last step in metrics.jsonl, as a resumed run finds it; empty at first.

    Raises:
        OSError: output_dir cannot be written; in every process.
    """

    def __init__(
        self,
        output_dir: Path,
        config: GRAOConfig,
        *,
        total_steps: int,
        start_step: int,
        world: World,
    ) -> None:
        self._output_dir, self._config, self._world = output_dir, config, world
        self._tracker: Tracker | None = None
        self._objective = split_objective(config.objective)[0]
        self._diagnosis = Diagnosis(
            self._objective,
            reference_advantage=config.reference_advantage,
            samples=config.sampler == "policy",
        )
        self.metrics = world.main(lambda: self._open(total_steps, start_step), held=True)

    def _open(self, total_steps: int, start_step: int) -> dict[str, float]:
        config = self._config
        write_file(self._output_dir / "config.json", json.dumps(config.to_dict(), indent=1))
        write_file(self._output_dir / "run.json", json.dumps(self._facts(total_steps), indent=1))
        self._tracker = Tracker(
            self._output_dir,
            report_to=config.report_to,
            config=config.to_dict(),
            total_steps=total_steps,
            show_progress=not config.disable_tqdm,
            start_step=start_step,
            parquet=config.log_completions,
            objective=self._objective,
        )
        return self._diagnosis.recall(read_lines(self._output_dir / METRICS_FILE))

    def _facts(self, total_steps: int) -> dict[str, Any]:
        """What reports show of a run besides its options, before it has finished."""
        defaults = GRAOConfig().to_dict()
        options = self._config.to_dict()
        return {
            "total_steps": total_steps,
            "processes": self._world.size,
            "changed": [name for name, value in options.items() if value != defaults[name]],
            "versions": versions(),
        }

    def step(self, step: int, metrics: dict[str, float], rollout: Rollout, *, last: bool) -> None:
        """Log a step that is done, with what it shows, and its samples, where they are due."""
        self._world.main(lambda: self._log_step(step, metrics, rollout, last), held=True)

    def _log_step(self, step: int, metrics: dict[str, float], rollout: Rollout, last: bool) -> None:
        tracker, config = self._tracker, self._config
        assert tracker is not None, "of rank 0"
        if step % config.logging_steps == 0 or last:
            tracker.log(step, metrics)
            for message in self._diagnosis.messages(step, metrics):
                tracker.message(message)
        else:
            tracker.advance(step)
        is_due = config.log_completions_steps and step % config.log_completions_steps == 0
        if is_due and config.objective_options.formula.needs_samples:
            tracker.log_completions(step, samples(rollout))

    def evaluation(self, step: int, result: EvaluationResult) -> None:
        """Log an evaluation, and write its rows."""
        metrics = {
            f"eval/{name}": value for name, value in (result.metrics() | result.measured).items()
        }

        def log() -> None:
            assert self._tracker is not None, "of rank 0"
            write_lines(self._output_dir / f"eval-{step}.jsonl", result.rows)
            self._tracker.log(step, metrics)

        self._world.main(log, held=True)

    def flush(self) -> None:
        """Flush the files to the disk; in rank 0 alone it does anything."""
        if self._tracker is not None:
            self._tracker.flush()

    def close(self) -> None:
        """Stop the progress bar, finish the trackers and close the files."""
        if self._tracker is not None:
            self._tracker.close()
