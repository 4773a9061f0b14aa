"""Times an optimiser step and a sampling phase beside TRL's GRPOTrainer, on a 0.6B model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from step_problem import Case, make_model, make_prompts
from step_race import OURS, Race, race_sampling, race_steps, trl_absence

from suite.runner import Run, Skipped, attempt, free_memory

CASE = Case(prompts=8, samples=8, prompt_tokens=512, response_tokens=512)
TINY = Case(prompts=2, samples=3, prompt_tokens=8, response_tokens=8)


def train_step(run: Run) -> str:
    """Report tokens a second and memory of an optimiser step and of a sampling phase."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    size, case = ("tiny", TINY) if run.tiny else ("cuda", CASE)
    rounds = 2 if run.tiny else 3
    model, tokenizer = make_model(size, run.device.type)
    run.report |= {"parameters": sum(p.numel() for p in model.parameters()), "case": vars(case)}
    headlines = [
        _race(
            run,
            "step",
            lambda reason: race_steps(model, tokenizer, case, rounds=rounds, without_trl=reason),
        )
    ]
    del model
    free_memory()
    if run.in_time("sampling"):
        longest = case.longest_response // 4
        model, tokenizer = make_model(size, run.device.type, mean_length=longest / 2)
        prompts = make_prompts(case, model.config.vocab_size)
        options: dict[str, Any] = {"samples": case.samples, "longest": longest, "rounds": rounds}
        headlines.append(
            _race(
                run,
                "sampling",
                lambda reason: race_sampling(
                    model, tokenizer, prompts, **options, without_trl=reason
                ),
            )
        )
    return "; ".join(headlines)


def _race(run: Run, name: str, race: Callable[[str | None], Race]) -> str:
    """Race with TRL or, where it is absent or fails in any way, without it and with the reason."""
    reason = trl_absence()
    result = None
    if reason is None:
        result, reason = attempt(lambda: race(None))
    timed, absent = result or race(reason)
    for peer, why in absent.items():
        run.leave_out(f"{peer}, {name}", why)
    run.report[name] = figures = {peer: each.summary() for peer, each in timed.items()}
    rates = {peer: each["tokens_per_s"] for peer, each in figures.items()}
    ours = rates.pop(OURS)
    headline = f"{name} {ours:.0f} tokens/s"
    return f"{headline} ({ours / max(rates.values()):.2f}x TRL)" if rates else headline
