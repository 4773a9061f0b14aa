"""Which runs the study consists of, and in which order.

First the learning rate of every method and task is chosen, on a seed that is not reported, and
likewise of GRAO's ways with the reference's advantage. Then come the methods themselves, then these
ways, then GRAO's ablations, which run at the rate that was chosen for GRAO.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from study.arms import Arm, Budget
from study.dpo import DPO
from study.family import Trained
from study.ppo import PPO
from study.tasks import TASKS

BUDGET = Budget(steps=80, prompts_per_step=16, num_generations=8, temperature=0.7, eval_steps=10)
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING_SEED = 100
SEEDS = (0, 1, 2, 3, 4)
SAMPLES = BUDGET.prompts_per_step * BUDGET.num_generations

# The paper's options, whatever the defaults are.
PAPERS = {"beta": 0.5, "lam": 0.6, "statistics": "group", "reference_advantage": "signed"}

# Without exploration, samples weigh lam A_i / G and the reference beta A_y + lam A_y / G, since all
# G + 1 advantages sum to 0. That is lam = 0.6 times GRAO with lam 0 and the beta below; AdamW takes
# no notice of the factor.
WITHOUT_EXPLORATION = {"lam": 0.0, "beta": (0.5 + 0.6 / BUDGET.num_generations) / 0.6}


@dataclass(frozen=True)
class Method:
    """An arm, and the method whose learning rate it takes; None: it has its own.

    num_generations: G; the prompts of a step are such that its samples are as many as in BUDGET.
    """

    arm: Arm
    rate_of: str | None = None
    num_generations: int = BUDGET.num_generations

    @property
    def budget(self) -> Budget:
        """The steps and samples of BUDGET, in groups of G."""
        G = self.num_generations
        return replace(BUDGET, num_generations=G, prompts_per_step=SAMPLES // G)


def _grao(**options: Any) -> Method:
    G = options.pop("num_generations", BUDGET.num_generations)
    return Method(Trained(PAPERS | options), "GRAO", G)


MAIN = {
    "SFT": Method(Trained({"objective": "sft", "temperature": 1.0})),
    "DPO": Method(DPO()),
    "PPO": Method(PPO()),
    "GRPO": Method(Trained({"objective": "grpo"})),
    "GRAO": Method(Trained(PAPERS)),
}
VARIANTS = {
    f"GRAO, {name}": Method(Trained(PAPERS | {"reference_advantage": name}))
    for name in ("clip", "floor", "tapered")
}
TERMS = {
    "without imitation": _grao(beta=0.0),
    "without exploration": _grao(**WITHOUT_EXPLORATION),
    "without regulariser": _grao(lam=0.0),
}
GROUPS = {f"G = {G}": _grao(num_generations=G) for G in (2, 4, 16)}
METHODS = MAIN | VARIANTS | TERMS | GROUPS


class Run(NamedTuple):
    """One run of the study."""

    task: str
    method: str
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Record:
    """A finished run: its curve, as in `Point`; or why it has none, with `error`."""

    run: Run
    curve: Sequence[dict[str, float]] = field(default_factory=list)
    error: str | None = None

    @property
    def last(self) -> dict[str, float]:
        """The last point."""
        return self.curve[-1]


def tuning() -> list[Run]:
    """The runs that choose learning rates."""
    return [
        Run(task, method, TUNING_SEED, rate)
        for task in TASKS
        for method, each in METHODS.items()
        if each.rate_of is None
        for rate in RATES
    ]


def rate_owner(method: str) -> str:
    """The method whose learning rate a method takes."""
    return METHODS[method].rate_of or method


def chosen_rates(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    """The learning rate of each task and method that has one of its own.

    It is the one of the highest held-out reward at the end of its run on TUNING_SEED.
    """
    found: dict[tuple[str, str], dict[float, float]] = {}
    for record in records:
        run = record.run
        if run.seed == TUNING_SEED and run.learning_rate in RATES and record.error is None:
            found.setdefault((run.task, run.method), {})[run.learning_rate] = record.last["reward"]
    return {key: max(rewards, key=rewards.__getitem__) for key, rewards in found.items()}


def reported(
    methods: Iterable[str],
    rates: dict[tuple[str, str], float],
    *,
    seeds: Sequence[int] = SEEDS,
) -> list[Run]:
    """The runs of some methods at the learning rates that were chosen, seed by seed."""
    return [
        Run(task, method, seed, rates[key])
        for seed in seeds
        for task in TASKS
        for method in methods
        if (key := (task, rate_owner(method))) in rates
    ]
