"""Answers a few held-out prompts greedily, and tries the metric on the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grao_fast.checkup.findings import Finding
from grao_fast.data.encoding import Encoded
from grao_fast.rewards import Reward, RewardError
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.system.errors import one_line


def try_metric(
    loaded: LoadedPolicy,
    metric: Reward,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    seed: int,
) -> Finding:
    """Measure the metric of greedy answers; every process must call it, and rank 0 measures."""
    texts = loaded.answer(
        [prompt.prompt_ids for prompt in prompts], max_new_tokens=max_new_tokens, seed=seed
    )
    with metric.ready():
        return loaded.policy.world.main(lambda: _measured(metric, prompts, texts))


def _measured(metric: Reward, prompts: Sequence[Encoded], texts: Sequence[str]) -> Finding:
    name = ", ".join(metric.names)
    try:
        values = metric.score([prompt.scored for prompt in prompts], texts)
    except RewardError as error:
        place = f" ({error.place})" if error.place else ""
        remedy = "correct the metric: the first evaluation would stop there"
        return Finding("rewards", "metric", "failure", one_line(error) + place, remedy)
    present = [value for value in values if not math.isnan(value)]
    if not present:
        remedy = "return a number wherever one can be given"
        return Finding("rewards", "metric", "warning", f"{name}: None for all answers", remedy)
    mean = sum(present) / len(present)
    value = f"{name}: {mean:.3g} on average over {len(present)} greedy answers"
    return Finding("rewards", "metric", "ok", value)
