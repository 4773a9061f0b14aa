"""Findings on the rewards of samples and references.

Suffixes: N prompts, G samples, F functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grao_fast.checkup.findings import Finding, judged, percent, share
from grao_fast.checkup.groups import GroupFacts
from grao_fast.config import ObjectiveOptions
from grao_fast.objectives.grao import GRAO

_ENOUGH = 5  # prompts: by chance alone, fewer references may all lose


def on_rewards(facts: GroupFacts, objective: ObjectiveOptions) -> list[Finding]:
    """Return what the rewards say. If nothing has a reward, only why is said."""
    findings = [on_failures(facts)]
    if facts.measured:
        shown = [f"{k.removeprefix('rewards/')} {v:.3g}" for k, v in facts.measured.items()]
        value = f"of {len(facts.rollout.prompts)} prompts: {', '.join(shown)}"
        findings.append(Finding("rewards", "own metrics", "ok", value))
    if facts.failed is None:
        findings.append(on_absent(facts))
    if bool(facts.samples_NG.isnan().all()):
        return findings
    return [
        *findings,
        on_values(facts),
        *on_constant_functions(facts),
        on_dead_groups(facts),
        *on_spread(facts),
        *on_references(facts, objective),
    ]


def on_failures(facts: GroupFacts) -> Finding:
    """Report a reward that raises, or returns NaN, infinity or no list of numbers."""
    name = ", ".join(facts.names)
    failed = facts.failed
    if failed is None:
        prompts, seconds = len(facts.rollout.prompts), facts.rollout.seconds["reward"]
        value = f"the rewards of {prompts} prompts are stored"
        if name:
            value = f"{name}: scored {prompts} prompts in {seconds:.2g} s"
            value += ", all values are numbers or None"
        return Finding("rewards", "calls", "ok", value)
    if not failed.tried:
        where = "fails"
    elif failed.prompts:
        where = f"fails for {failed.prompts} of {failed.tried} prompts"
    else:
        where = "fails on all prompts together, and on none alone"
    remedy = "correct the reward: training would stop there. None stands for no reward"
    return Finding("rewards", "calls", "failure", f"{where}: {failed.message}", remedy)


def on_absent(facts: GroupFacts) -> Finding:
    """Judge the share of samples, and of references, for which no function gave a number."""
    counts = [len(group) for group in facts.rollout.completions]  # stored ones differ in number
    scored = int((~facts.samples_NG.isnan()).sum())
    absent = 1 - share(scored, sum(counts))
    value = f"{percent(absent)} of samples got None" if absent else "every sample has a reward"
    has_reference = [bool(prompt.reference_ids) for prompt in facts.rollout.prompts]
    lacking = facts.reference_N.isnan() & torch.tensor(has_reference)
    if bool(lacking.any()):
        value += f"; {int(lacking.sum())} of {sum(has_reference)} references got None"
        absent = max(absent, share(int(lacking.sum()), sum(has_reference)))
    remedy = "return a number wherever one can be given: what has no reward is not learned from"
    return judged("rewards", "no reward", "no reward", absent, value, remedy)


def on_values(facts: GroupFacts) -> Finding:
    """Show the rewards of samples and references."""
    samples, references = _present(facts.samples_NG), _present(facts.reference_N)
    value = f"samples {samples.mean():.3g} on average, {samples.min():.3g} to {samples.max():.3g}"
    if len(references):
        value += f"; references {references.mean():.3g}"
    return Finding("rewards", "values", "ok", value)


def on_constant_functions(facts: GroupFacts) -> list[Finding]:
    """Warn of each of several functions that gives all samples the same score."""
    findings = []
    for name, scores_NG in zip(facts.names, facts.scores_FNG, strict=True):
        scores = _present(scores_NG)
        if len(facts.names) > 1 and len(scores) and bool((scores == scores[0]).all()):
            value = f"{name} gives every sample {scores[0]:g}"
            remedy = f"correct {name}, or leave it out: it does not tell samples apart"
            findings.append(Finding("rewards", "constant function", "warning", value, remedy))
    return findings


def on_dead_groups(facts: GroupFacts) -> Finding:
    """Judge the share of prompts whose rewards are all equal, so that nothing is learned."""
    total = int((~facts.rollout.rewards_NK.isnan().all(1)).sum())
    dead = 1 - share(int((~facts.rollout.dead_N).sum()), total)
    value = f"{percent(dead)} of {total} groups have equal rewards"
    everything = _present(facts.rollout.rewards_NK)
    if bool((everything == everything[0]).all()):
        value += f": the reward is constant, {everything[0]:g}"
    remedy = (
        "let the reward tell answers apart, take prompts that are neither too easy nor too hard, "
        "or raise num_generations: the loss of such a group is 0"
    )
    return judged("rewards", "dead groups", "dead groups", dead, value, remedy)


def on_spread(facts: GroupFacts) -> list[Finding]:
    """Judge in how many of the groups with unequal rewards the samples' are all equal."""
    live_N = ~facts.rollout.dead_N
    total = int(live_N.sum())
    if not total:
        return []
    present = [_present(rewards_G) for rewards_G in facts.samples_NG[live_N]]
    equal = sum(len(each) > 1 and len(each.unique()) == 1 for each in present)
    value = f"in {percent(share(equal, total))} of the other groups all samples have equal rewards"
    remedy = (
        "grade the reward more finely: such groups teach no more than to imitate the reference, or "
        "to avoid it"
    )
    limit = "equal rewards of samples"
    return [judged("rewards", "samples alike", limit, share(equal, total), value, remedy)]


def on_references(facts: GroupFacts, objective: ObjectiveOptions) -> list[Finding]:
    """Judge the share of references that lose to their samples: A_y < 0, in GRAO."""
    formula = objective.formula
    if not formula.uses_references:
        return []
    mean_N = facts.samples_NG.nanmean(1)
    both_N = ~(mean_N.isnan() | facts.reference_N.isnan())
    if not bool(both_N.any()):
        return []
    total = int(both_N.sum())
    lost = share(int((facts.reference_N < mean_N)[both_N].sum()), total)
    value = f"{percent(lost)} of {total} references score below the mean of their samples"
    kind = formula.reference_advantage if isinstance(formula, GRAO) else None
    spared = kind != "signed" or total < _ENOUGH
    limit = "lost by the reference, clipped" if spared else "lost by the reference"
    remedy = "see whether the reward is the wrong way round; take better references"
    if kind == "signed":
        remedy += (
            ', or set reference_advantage="floor" or "clip": such references are made ever less '
            "likely"
        )
    elif kind == "clip":
        remedy += "; the regulariser (lam) still lowers their probability"
    return [judged("rewards", "references lose", limit, lost, value, remedy)]


def _present(rewards: Tensor) -> Tensor:
    return rewards[~rewards.isnan()]
