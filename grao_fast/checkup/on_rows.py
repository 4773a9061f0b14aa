"""Findings on the rows of a dataset: their lengths, their references and their template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from grao_fast.checkup.findings import Finding, judged, percent, share
from grao_fast.checkup.rows import Fit, RowFacts
from grao_fast.config import SamplingOptions
from grao_fast.objectives import Objective
from grao_fast.system.errors import first_of

_REFUSED = "give these rows the turns that the template asks for, or set another chat template"
# What is found, and the remedy, where a reference does not simply follow its prompt.
_EXCEPTIONS = {
    "no prefix": (
        "the template renders prompt and reference together with another beginning than the prompt",
        "look at chat_template: the reference is appended to the prompt as the template alone "
        "would not write it",
    ),
    "in part": (
        "the template omits some of the reference, or opens a tag again",
        "look at what chat_template leaves out; a reference of one turn is used as it is",
    ),
    "early end": (
        "an end-of-sequence token stands inside the reference",
        "remove it from the references: a sample would end there",
    ),
    "altered": (
        "the tokenizer cannot represent the reference exactly",
        "rewards see the decoded tokens: clean the references, or use the model's own tokenizer",
    ),
    "merged": (
        "the prompt's last tokens would merge with the reference",
        "let prompts end without white space; the reference is tokenised apart, as samples are",
    ),
}


def on_rows(facts: RowFacts, sampling: SamplingOptions, formula: Objective) -> list[Finding]:
    """Return what the rows of the training set say."""
    references = [on_references(facts, sampling)] if formula.uses_references else []
    return [on_prompts(facts, sampling), *references, *on_template(facts)]


def on_held_out(facts: RowFacts, sampling: SamplingOptions) -> Finding:
    """Return what the rows of the held-out set say, of which prompts alone are read."""
    if facts.refused:
        value = f"{_refusal(facts)}: {_numbers(list(facts.refused))}"
        return Finding("data", "held-out prompts", "failure", value, _REFUSED)
    return on_prompts(facts, replace(sampling, samples_drawn=True), name="held-out prompts")


def on_prompts(facts: RowFacts, sampling: SamplingOptions, name: str = "prompts") -> Finding:
    """Judge the lengths of prompts against the context."""
    lengths = [len(row.ids.prompt) for row in facts.rows if row.fit != "refused"]
    value = _of_rows(facts, f"{_lengths(lengths)} tokens")
    if facts.context is not None:
        value += f"; the context holds {facts.context:,}"
    for fit, what, remedy in _misfits(facts, sampling):
        misfits = facts.that(fit)
        if misfits:
            value += f"; {what}: {_numbers([row.number for row in misfits])}"
            return judged(
                "data", name, "too long", share(len(misfits), len(facts.rows)), value, remedy
            )
    dropped = facts.share("dropped")
    if dropped:
        value += f"; {percent(dropped)} longer than max_prompt_length={sampling.max_prompt_length}"
    return judged(
        "data", name, "dropped", dropped, value, "raise max_prompt_length: they are left out"
    )


def _misfits(facts: RowFacts, sampling: SamplingOptions) -> list[tuple[Fit, str, str]]:
    context, new = facts.context or 0, sampling.max_new_tokens
    if sampling.samples_drawn:
        to_drop = f", or set max_prompt_length={context - new} to drop them"
        no_room = f"no room for max_new_tokens={new}"
        make_room = "lower max_new_tokens" + (to_drop if context > new else "")
    else:
        no_room, make_room = "no room for an answer", f"set max_prompt_length={context - 1}"
        new = context - max((len(row.ids.prompt) for row in facts.that("beyond")), default=0)
    return [
        ("blank", "without a token", "remove these rows"),
        (
            "unknown",
            "with tokens that the model has no embedding for",
            "use the model's own tokenizer, or resize its embeddings and save it",
        ),
        (
            "no room",
            no_room,
            f"{make_room}: training would not start",
        ),
        (
            "beyond",
            "the reference leaves the context",
            f"set max_reference_length={new} to cut references: training would not start",
        ),
    ]


def on_references(facts: RowFacts, sampling: SamplingOptions) -> Finding:
    """Judge how many rows have a reference, and how long references are."""
    rows = [row for row in facts.rows if row.fit not in ("refused", "dropped")]
    lengths = [len(row.ids.reference) for row in rows if row.ids.reference]
    value = f"{_lengths(lengths)} tokens, the end included"
    absent = share(len(rows) - len(lengths), len(rows))
    kept = {row.number for row in rows}
    cut = share(len(kept.intersection(facts.cut)), len(rows))
    most = sampling.max_new_tokens if sampling.samples_drawn else math.inf
    longer = share(sum(n > most for n in lengths), len(rows))
    worst = [
        judged(
            "data",
            "references",
            "without reference",
            absent,
            f"{value}; {percent(absent)} of rows have none",
            "leave these rows out: of them only samples are learned from",
        ),
        judged(
            "data",
            "references",
            "cut references",
            cut,
            f"{value}; {percent(cut)} are cut to {sampling.max_reference_length}",
            "raise max_reference_length, or leave out rows with long references: those that are "
            "cut have no end, and teach the model not to end",
        ),
        judged(
            "data",
            "references",
            "references beyond samples",
            longer,
            f"{value}; {percent(longer)} are longer than max_new_tokens={sampling.max_new_tokens}",
            "raise max_new_tokens, so that samples can be as long as what they are compared with",
        ),
    ]
    wrong = [finding for finding in worst if finding.verdict != "ok"]
    return next(
        (finding for finding in wrong if finding.verdict == "failure"),
        wrong[0] if wrong else Finding("data", "references", "ok", value),
    )


def on_template(facts: RowFacts) -> list[Finding]:
    """Judge how prompts and references are written as tokens; one finding if all is well."""
    findings: list[Finding] = []
    total = len(facts.rows)

    def add(limit: str, rows: Sequence[int], value: str, remedy: str) -> None:
        if rows:
            value = f"{value}: {_numbers(rows)}"
            findings.append(
                judged("data", "template", limit, share(len(rows), total), value, remedy)
            )

    add(
        "refused by the template",
        list(facts.refused),
        _refusal(facts),
        _REFUSED,
    )
    add(
        "template",
        facts.doubled,
        "the prompt begins with two BOS tokens",
        "remove one: from the chat template, or from the text of the prompts",
    )
    add(
        "template",
        facts.special,
        "messages hold the text of special tokens",
        "give messages without the template's own markers: it is applied to them here",
    )
    for reason, (what, remedy) in _EXCEPTIONS.items():
        add("template", facts.exceptions.get(reason, ()), what, remedy)
    if facts.ends_of_turns:
        tokens = " ".join(facts.ends_of_turns)
        findings.append(
            Finding(
                "data",
                "template",
                "warning",
                f"it ends a turn with {tokens}, which does not end samples",
                "if the model stops there, add that token to eos_token_id in its "
                "generation_config; references get the tokenizer's EOS",
            )
        )
    ends = ", ".join(f"{end} ({count})" for end, count in facts.ends.most_common(3))
    fine = f"references follow their prompts, and end in {ends}" if ends else "prompts alone"
    return findings or [Finding("data", "template", "ok", fine)]


def _refusal(facts: RowFacts) -> str:
    return f"the chat template refuses ({next(iter(facts.refused.values()), '')})"


def _of_rows(facts: RowFacts, value: str) -> str:
    read, total = len(facts.rows), facts.total
    return (
        f"{value} in {total:,} rows" if read == total else f"{value} in {read:,} of {total:,} rows"
    )


def _lengths(lengths: Sequence[int]) -> str:
    if not lengths:
        return "no"
    return f"median {median(lengths):,.0f}, longest {max(lengths):,}"


def _numbers(rows: Sequence[int]) -> str:
    """The rows of a finding, by number."""
    return f"row {first_of(rows, 3)}" if len(rows) == 1 else f"rows {first_of(rows, 3)}"
