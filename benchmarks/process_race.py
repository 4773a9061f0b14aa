"""Checks and times steps of 1, 2 and 4 processes of ours and of TRL, in turns; a program.

    python benchmarks/process_race.py OUT.json cpu

It is a program of its own since it forks: processes that have begun to compute with several
threads, or on a GPU, cannot be forked.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from process_sides import Contender, Crew, Proof, Took, prove, small_rollout, take_step
from step_problem import Case, make_model, make_prompts
from step_race import trl_absence
from step_sides import CONFIG, grao_weights, naive_gradient

from grao_fast.distributed.choice import Sharding
from grao_fast.training.plan import Cluster, Rates, plan

MODEL = "cpu"  # a size of `step_problem.MODELS`
CASES = {
    "cpu": Case(prompts=8, samples=8, prompt_tokens=64, response_tokens=64),
    "tiny": Case(prompts=4, samples=2, prompt_tokens=8, response_tokens=8),
}
ROUNDS = {"cpu": 3, "tiny": 2}
CONTENDERS = [
    Contender("ours", "full", 1),
    *(Contender("ours", sharding, n) for n in (2, 4) for sharding in ("none", "full")),
    *(Contender("trl", "full", n) for n in (1, 2, 4)),
]
_LARGE = 2.0**50  # bytes in which everything fits, so that there is one micro-batch
_TRL_METRICS = 1000  # bytes of its metrics that a process sends, at most
_MIB = 2**20


def race(
    contenders: Sequence[Contender], size: str, case: Case, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """The facts and rounds of each contender, by its name.

    Raises:
        AssertionError: steps differ, or collectives carry other bytes than the arithmetic says.
    """
    crews = {contender: Crew(contender, size, case) for contender in contenders}
    proofs: dict[Contender, list[Proof]] = {c: crew.do(prove) for c, crew in crews.items()}
    check_steps(proofs, _true_gradient(size, case))
    traffic = {
        contender: (sent(ranks[0].collectives, len(ranks)), planned(contender, size, case))
        for contender, ranks in proofs.items()
    }
    for contender, (counted, arithmetic) in traffic.items():
        metrics = _TRL_METRICS if contender.side == "trl" else 0
        assert 0 <= counted - arithmetic <= metrics, (contender, counted, arithmetic)
    took: dict[Contender, list[list[Took]]] = {contender: [] for contender in contenders}
    for turn in range(rounds):
        start = turn % len(contenders)
        for contender in (*contenders[start:], *contenders[:start]):
            took[contender].append(crews[contender].do(take_step))
    for crew in crews.values():
        crew.end()
    return {
        contender.name: {
            **asdict(contender),
            "micro_batches": contender.micro_batches(case),
            "seconds": [max(each.seconds for each in ranks) for ranks in took[contender]],
            "peak_mib": _highest(took[contender]),
            "held_mib": max(proof.held_mib for proof in proofs[contender]),
            "sent_mib": traffic[contender][0] / _MIB,
            "planned_mib": traffic[contender][1] / _MIB,
        }
        for contender in contenders
    }


def _highest(rounds: list[list[Took]]) -> float | None:
    peaks = [took.peak_mib for ranks in rounds for took in ranks]
    return None if None in peaks else max(peaks)


def check_steps(proofs: dict[Contender, list[Proof]], gradient: list[np.ndarray]) -> None:
    """Check that all computed one gradient to 1e-5, and that they took the same step.

    Losses of a side agree to 1e-5; TRL's, the mean over its processes, is that of its advantages,
    as its ratios are 1. The gradients' norms agree to 1e-4 only: in float32, PyTorch's norm of the
    embeddings' gradient, on a CPU, is itself off by that.
    """
    losses: dict[str, float] = {}
    norm = next(iter(proofs.values()))[0].grad_norm
    size = _norm(gradient)
    for contender, ranks in proofs.items():
        pairs = zip(ranks[0].gradient, gradient, strict=True)
        off = _norm([ours.astype(np.float64) - true for ours, true in pairs]) / size
        assert off <= 1e-5, f"{contender.name}: the gradient is off by {off:.2g}"
        loss = sum(proof.loss for proof in ranks) / len(ranks)
        expected = losses.setdefault(contender.side, loss)
        assert math.isclose(loss, expected, rel_tol=1e-5, abs_tol=1e-7), (
            f"{contender.name}: the loss is {loss}, {expected} in the first of this side"
        )
        for proof in ranks:
            assert math.isclose(proof.grad_norm, norm, rel_tol=1e-4), (
                f"{contender.name}: the gradient's norm is {proof.grad_norm}, {norm} in the first"
            )


def _true_gradient(size: str, case: Case) -> list[np.ndarray]:
    """The gradient of `small_rollout` by GRAO's formula, from whole logits."""
    model, _ = make_model(size, "cpu")
    rollout = small_rollout(case, model.config.vocab_size)
    gradient = naive_gradient(model, rollout, grao_weights(rollout))[1]
    return [part.numpy() for part in gradient]


def _norm(parts: list[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(part, dtype=np.float64).sum()) for part in parts))


def sent(collectives: Counter[str], processes: int) -> float:
    """Bytes that a process sends, as in docs/scaling.md.

    FSDP2 gathers and scatters whole tensors; in `allgather_`, TRL's for its metrics, each process's
    tensor is counted.
    """
    times = {
        "_allgather_base_": 1,
        "_reduce_scatter_base_": 1,
        "allreduce_": 2,
        "allgather_": processes,
    }
    whole = sum(times[name] * size for name, size in collectives.items())
    return whole * (processes - 1) / processes


def planned(contender: Contender, size: str, case: Case) -> float:
    """The same by the arithmetic of `grao-fast plan`."""
    model, _ = make_model(size, "cpu")
    sharding: Sharding = contender.sharding if contender.processes > 1 else "none"
    config = CONFIG.replace(
        bf16=False,
        max_tokens_per_microbatch=None if contender.micro_batches(case) == 1 else 1,
        prompts_per_step=case.prompts,
        num_generations=case.samples,
        max_prompt_length=max(map(len, make_prompts(case, model.config.vocab_size))),
        max_new_tokens=case.longest_response,
        sharding=sharding,
    )
    cluster = Cluster(contender.processes, contender.processes, _LARGE, Rates(1, 1, 1, 1))
    wire = plan(model, config, cluster).wire[sharding]
    return (wire.gather_forward + wire.gather_backward + wire.reduction).process


def main(out: Path, case: str) -> None:
    import datasets  # noqa: F401, before the forks, as the next ones are
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import grao_fast.trainer  # noqa: F401

    torch.set_num_threads(1)
    absence = trl_absence()
    if absence is None:
        import trl.trainer.grpo_trainer  # noqa: F401
    present = [c for c in CONTENDERS if c.side == "ours" or absence is None]
    found = race(present, MODEL, CASES[case], rounds=ROUNDS[case])
    out.write_text(json.dumps({"measured": found, "absence": absence}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
