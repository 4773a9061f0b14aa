"""Answers of before and after training, side by side, for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from grao_fast.reporting.page.runs import Run, latest_evaluation
from grao_fast.reporting.series import as_number
from grao_fast.reporting.tables import as_text, number
from grao_fast.system.lines import COMPLETIONS_FILE, read_ends, read_rows
from grao_fast.system.visible import visible_lines

_MOST_CHARACTERS = 2000  # of a text


@dataclass(frozen=True)
class Answer:
    """A text, what it is, and its scores in words."""

    label: str
    text: str
    scores: str


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it, to be shown side by side."""

    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Samples:
    """Samples of one kind from a run."""

    title: str
    samples: list[Sample]


def samples_of(runs: Sequence[Run], most: int) -> list[Samples]:
    """Return at most so many held-out prompts of each run with their answers.

    The first prompts are shown, and beside them those whose reward fell most. Runs that share their
    prompts are shown side by side. Of a run without held-out prompts, samples are shown.
    """
    if most == 0:
        return []
    found = [_of_run(run, most) for run in runs]
    if len(runs) == 1:
        return found[0]
    groups = []
    shared: dict[tuple[str, ...], list[tuple[Run, Samples]]] = {}
    for run, of_run in zip(runs, found, strict=True):
        for group in of_run:
            key = (group.title, *(sample.prompt for sample in group.samples))
            shared.setdefault(key, []).append((run, group))
    for members in shared.values():
        names = [run.name for run, _ in members]
        samples = zip(*(group.samples for _, group in members), strict=True)
        title = f"{', '.join(names)}: {members[0][1].title}"
        groups.append(Samples(title, [_side_by_side(names, each) for each in samples]))
    return groups


def _side_by_side(names: Sequence[str], samples: Sequence[Sample]) -> Sample:
    """Return one sample with the answers of several runs; those that all have alike, once."""
    first, *others = samples
    alike = [answer for answer in first.answers if all(answer in s.answers for s in others)]
    own = [
        Answer(f"{name}: {answer.label}", answer.text, answer.scores)
        for name, sample in zip(names, samples, strict=True)
        for answer in sample.answers
        if answer not in alike
    ]
    return Sample(first.prompt, alike + own)


def _of_run(run: Run, most: int) -> list[Samples]:
    with suppress(OSError):
        return _held_out(run, most) or _sampled(run, most)
    return []


def _held_out(run: Run, most: int) -> list[Samples]:
    found = latest_evaluation(run.folder)
    if found is None:
        return []
    step, path = found
    rows = [row for row in read_rows(path) if "prompt" in row and "completion" in row]
    first: list[dict[str, Any]] = []
    with suppress(OSError):  # the run resumed where it was not kept
        first = read_rows(run.folder / "eval-0.jsonl")
    earlier = first if len(first) == len(rows) else [{}] * len(rows)
    pairs = list(zip(earlier, rows, strict=True))
    shown = [_answered(before, row, step) for before, row in pairs[:most]]
    groups = [Samples(f"The first {len(shown)} of {len(rows)} held-out prompts", shown)]
    fallen = sorted(
        (pair for pair in pairs[most:] if as_number(pair[1].get("vs_baseline")) < 0),
        key=lambda pair: as_number(pair[1]["vs_baseline"]),
    )[: max(1, most // 2)]
    if fallen:
        worse = [_answered(before, row, step) for before, row in fallen]
        groups.append(Samples("Others that lost most against the model before training", worse))
    return groups if shown else []


def _answered(before: Mapping[str, Any], row: Mapping[str, Any], step: int) -> Sample:
    answers = []
    if row.get("reference") is not None:
        answers.append(_answer("reference", row["reference"], reward=row.get("reference_reward")))
    if row.get("baseline") is not None:
        answers.append(_answer("before training", row["baseline"], **_scores(before)))
    answers.append(_answer(f"after step {step}", row["completion"], **_scores(row)))
    return Sample(_text(row["prompt"]), answers)


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("reward", "metric")}


def _sampled(run: Run, most: int) -> list[Samples]:
    """Return samples of the first and of the last step in completions.jsonl."""
    path = run.folder / COMPLETIONS_FILE
    if not path.is_file():
        return []
    early, late = read_ends(path, 8 * most)
    if not early or not late:
        return []
    first, last = early[0]["step"], late[-1]["step"]
    groups = [(first, [row for row in early if row["step"] == first][:most])]
    if last != first:
        groups.append((last, [row for row in late if row["step"] == last][:most]))
    return [
        Samples(f"Samples of step {step}", [sample for row in rows if (sample := _group(row))])
        for step, rows in groups
    ]


def _group(row: Mapping[str, Any]) -> Sample | None:
    """Return a group with its reference, its best and its worst sample; None if it is no group."""
    texts, rewards = row.get("completions"), row.get("rewards")
    if not isinstance(texts, list) or not isinstance(rewards, list) or not texts:
        return None
    scored = [(as_number(reward), text) for reward, text in zip(rewards, texts, strict=False)]
    present = sorted((s for s in scored if not math.isnan(s[0])), key=lambda s: s[0])
    answers = []
    if row.get("reference") is not None:
        answers.append(_answer("reference", row["reference"], reward=row.get("reference_reward")))
    if not present:
        answers.append(_answer("a sample", texts[0]))
    elif present[0][0] == present[-1][0]:
        answers.append(_answer("a sample", present[0][1], reward=present[0][0]))
    else:
        answers.append(_answer("best sample", present[-1][1], reward=present[-1][0]))
        answers.append(_answer("worst sample", present[0][1], reward=present[0][0]))
    return Sample(_text(row.get("prompt", "")), answers)


def _answer(label: str, text: Any, **scores: Any) -> Answer:
    shown = {name: as_number(score) for name, score in scores.items()}
    words = [f"{name} {number(s)}" for name, s in shown.items() if not math.isnan(s)]
    return Answer(label, _text(text), ", ".join(words))


def _text(value: Any) -> str:
    """Return a text or a conversation with its control characters visible, cut where it is long."""
    text = visible_lines(_plain(value)).strip()
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}... ({len(text) - _MOST_CHARACTERS:,} more characters)"


def _plain(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return as_text(value)
    return str(value)
