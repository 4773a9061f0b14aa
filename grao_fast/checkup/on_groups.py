"""Findings on what the policy samples."""

from __future__ import annotations

import math
from collections.abc import Collection
from statistics import median

from grao_fast.checkup.findings import Finding, judged, percent, share
from grao_fast.checkup.groups import GroupFacts
from grao_fast.config import SamplingOptions


def on_groups(
    facts: GroupFacts, sampling: SamplingOptions, reference_ends: Collection[str]
) -> list[Finding]:
    """Return what the samples say.

    reference_ends: the tokens that references end in.
    """
    return [
        on_truncation(facts, sampling),
        *on_ends(facts, reference_ends),
        on_empty_texts(facts),
        on_diversity(facts),
    ]


def on_stored(
    facts: GroupFacts, sampling: SamplingOptions, reference_ends: Collection[str]
) -> list[Finding]:
    """Return what stored completions say."""
    groups, samples = facts.rollout.completions, facts.completions
    few = min(map(len, groups))
    known = share(sum(not any(map(math.isnan, each.logprobs)) for each in samples), len(samples))
    open_ended = share(sum(not each.finished for each in samples), len(samples))
    value = (
        f"{few} to {sampling.num_generations} for a prompt, {percent(open_ended)} without an end "
        f"token, {percent(known)} with log-probs"
    )
    found = Finding("samples", "stored completions", "ok", value)
    return [found, *on_ends(facts, reference_ends), on_empty_texts(facts)]


def on_truncation(facts: GroupFacts, sampling: SamplingOptions) -> Finding:
    """Judge the share of samples that max_new_tokens has cut."""
    samples = facts.completions
    cut = share(sum(not each.finished for each in samples), len(samples))
    lengths = [len(each.token_ids) for each in samples]
    value = (
        f"{percent(cut)} of {len(samples)} samples are cut at max_new_tokens="
        f"{sampling.max_new_tokens}; median {median(lengths):,.0f} tokens"
    )
    remedy = (
        "raise max_new_tokens; if samples go on for ever, the model does not end its turns: use "
        "an instruction-tuned model, or its chat template"
    )
    return judged("samples", "truncation", "cut samples", cut, value, remedy)


def on_ends(facts: GroupFacts, reference_ends: Collection[str]) -> list[Finding]:
    """Warn if samples never end in the token that references end in."""
    if not facts.ends or not reference_ends or not set(reference_ends).isdisjoint(facts.ends):
        return []
    value = (
        f"samples end in {' '.join(sorted(set(facts.ends)))}, references in "
        f"{' '.join(sorted(reference_ends))}"
    )
    remedy = "let both end alike: set eos_token of the tokenizer to what the model writes"
    return [Finding("samples", "end tokens", "warning", value, remedy)]


def on_empty_texts(facts: GroupFacts) -> Finding:
    """Judge the share of samples without text."""
    texts = [text for group in facts.rollout.texts for text in group]
    empty = share(sum(not text.strip() for text in texts), len(texts))
    value = f"{percent(empty)} of samples have no text"
    remedy = "see whether prompts end where an answer begins (chat template, generation prompt)"
    return judged("samples", "empty texts", "empty samples", empty, value, remedy)


def on_diversity(facts: GroupFacts) -> Finding:
    """Judge the share of prompts whose samples are all the same text."""
    groups = facts.rollout.texts
    same = share(sum(len(group) > 1 and len(set(group)) == 1 for group in groups), len(groups))
    distinct = sum(len(set(group)) for group in groups) / len(groups)
    value = f"{distinct:.1f} different texts among {len(groups[0])} samples of a prompt"
    remedy = f"raise temperature: for {percent(same)} of prompts all samples are equal"
    return judged("samples", "diversity", "equal samples", same, value, remedy)
