"""Runs the demo: imitate references, align with GRAO, and compare the two in a table.

Nothing is downloaded, and two CPU cores are enough. The model is aligned by `grao_fast.train` and
measured by `grao_fast.evaluate`, like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from grao_fast.config import GRAOConfig
from grao_fast.demo.base_model import imitate, make_model, make_tokenizer
from grao_fast.demo.task import LENGTH, better_sorted, in_place, make_rows, solution
from grao_fast.evaluation.evaluate import evaluate
from grao_fast.evaluation.result import EvaluationResult
from grao_fast.reporting.console import stderr_console
from grao_fast.reporting.plots import plot_run
from grao_fast.system.files import writable_folder
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import visible
from grao_fast.trainer import TrainResult, train
from grao_fast.training.checkpoint import check_fresh

_TRAIN_PROMPTS = 4000
_HELD_OUT_PROMPTS = 200
_PRETRAINING_STEPS = 25
_ALIGNMENT_STEPS = 160

_INTRODUCTION = """\
The task: put eight digits in order, 31415926= -> 11234569.
Every reference is flawed: its fourth and fifth digit have changed places, and one digit became 0.
A tiny model first imitates references; GRAO then aligns it, by a reward that says which of two
answers has more digits in place. Can it outdo what it was shown?
"""


@dataclass(frozen=True)
class DemoResult:
    """The demo's results on held-out prompts.

    reference_in_place: share of the references' digits that are in place.
    before: results of the pretrained model.
    imitation: results of that model after imitating references for as many more steps as GRAO ran.
    after: results of that model after GRAO.
    output_dir: the folder of the run.
    plots: the files drawn in it.

    `metric` of the results is the share of digits in place; `nag` compares with `before`.
    """

    reference_in_place: float
    before: EvaluationResult
    imitation: EvaluationResult
    after: EvaluationResult
    output_dir: Path
    plots: list[Path]

    def table(self) -> Table:
        """Return a table of references, before, after, and, for equal steps, imitation alone."""
        results = (self.before, self.imitation, self.after)
        table = Table(
            title=f"{self.after.prompts} held-out prompts, greedy answers, percent",
            caption="reward: digits in place minus those of the reference\n"
            "RAS: share better than the reference\nNAG: wins minus losses against before",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("")
        for name in ("references", "before", "imitation alone", "GRAO"):
            table.add_column(name, justify="right", no_wrap=True)
        in_place_shares = (self.reference_in_place, *(result.metric for result in results))
        table.add_row("digits in place", *map(_percent, in_place_shares))
        answers_right = (exact(self.after, of="reference"), *map(exact, results))
        table.add_row("all in place", *map(_percent, answers_right))
        table.add_row("reward", "", *(_signed(r.reward) for r in results))
        table.add_row("RAS", "", *(_percent(r.ras) for r in results))
        table.add_row("NAG", "", "", *(_signed(r.nag) for r in results[1:]))
        return table


def exact(result: EvaluationResult, *, of: str = "completion") -> float:
    """Return the share of completions (or references) without a mistake."""
    right = sum(row[of] == solution(row["prompt"]) for row in result.rows)
    return right / len(result.rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread; for such small matrices, more threads are no faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
@lenient_streams()
def run_demo(
    *, output_dir: str | Path = "grao-demo", seed: int = 0, max_steps: int = _ALIGNMENT_STEPS
) -> DemoResult:
    """Pretrain, align and compare; print a table and the paths of the plots.

    Args:
        output_dir: folder for the files of the run, as `grao_fast.train` writes them, and plots.
        seed: seed of prompts, model, data order and sampling.
        max_steps: steps of GRAO, and of the imitation that it is compared with.

    Raises:
        ValueError: max_steps is not positive, or output_dir holds results of another run.
        OSError: output_dir cannot be written.
    """
    config = demo_config(max_steps=max_steps, seed=seed)
    check_fresh(writable_folder(output_dir))
    # Progress goes to stderr, as in any run, and results go to stdout.
    progress, console = stderr_console(), Console()
    console.print(_INTRODUCTION, highlight=False, soft_wrap=True)
    rows = make_rows(_TRAIN_PROMPTS + _HELD_OUT_PROMPTS, seed=seed)
    rows, held_out = rows[:_TRAIN_PROMPTS], rows[_TRAIN_PROMPTS:]
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)

    steps = track(range(_PRETRAINING_STEPS), "imitate", console=progress)
    imitate(model, tokenizer, rows, steps=steps, seed=seed)
    base, imitator = copy.deepcopy(model), copy.deepcopy(model)
    result = train(
        model,
        rows,
        better_sorted,
        config=config,
        tokenizer=tokenizer,
        eval_dataset=held_out,
        metric=in_place,
        output_dir=output_dir,
    )
    steps = track(range(max_steps), "imitate alone, to compare", console=progress)
    imitate(imitator, tokenizer, rows, steps=steps, seed=seed + 1)
    imitation = evaluate(
        imitator,
        held_out,
        better_sorted,
        base_model=base,
        config=config,
        tokenizer=tokenizer,
        metric=in_place,
    )
    demo = _demo_result(held_out, imitation, result)
    console.print(demo.table())
    for path in demo.plots:
        console.print(visible(str(path)), markup=False, highlight=False, soft_wrap=True)
    return demo


def _demo_result(
    held_out: list[dict[str, str]], imitation: EvaluationResult, result: TrainResult
) -> DemoResult:
    """Draw the plots of the run, and gather the results."""
    prompts = [row["prompt"] for row in held_out]
    of_references = in_place(prompts, [row["reference"] for row in held_out])
    assert result.before is not None and result.after is not None  # there is an eval_dataset
    return DemoResult(
        reference_in_place=sum(of_references) / len(of_references),
        before=result.before,
        imitation=imitation,
        after=result.after,
        output_dir=result.output_dir,
        plots=plot_run(result.output_dir),
    )


def demo_config(*, max_steps: int, seed: int) -> GRAOConfig:
    """Return the demo's options: the paper's beta and lam, a step size for 0.3 M parameters.

    The reference's advantage is clipped, since most samples beat it in the second half.
    """
    return GRAOConfig(
        reward_type="pairwise",
        reference_advantage="clip",
        temperature=1.0,
        max_new_tokens=LENGTH + 1,
        prompts_per_step=32,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_steps=max_steps,
        eval_steps=40,
        save_steps=0,
        log_completions_steps=80,
        gradient_checkpointing=False,
        generation_batch_size=1024,
        device="cpu",
        seed=seed,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _signed(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f}"
