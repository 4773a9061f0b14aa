"""Tests of `grao_fast.report`: of runs of all kinds, finished or not, and of hostile texts."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import HOSTILE, metrics, write_run

import grao_fast
from grao_fast.cli.commands import main
from grao_fast.reporting.page import svg
from grao_fast.reporting.page.runs import read_runs
from grao_fast.reporting.series import component_shares, components_of, thinned

_VOID = {"meta", "path", "circle", "polygon"}  # of the page; those of SVG close themselves
_ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section", "article",
    "div", "p", "span", "strong", "a", "h1", "h2", "h3", "ul", "li", "figure", "figcaption", "svg",
    "text", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", *_VOID,
}  # fmt: skip


class Page(HTMLParser):
    """The elements and the text of a page; fails where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        assert tag in _ELEMENTS
        self.elements.append((tag, dict(attributes)))
        self.text += " "
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page(*folders: Path, **options) -> Page:
    path = grao_fast.report(*folders, path=folders[0] / "out.html", **options)
    return Page(path.read_text(encoding="utf-8"))


def cells(text: str) -> str:
    return " ".join(text.split())


def test_a_finished_run(tmp_path: Path) -> None:
    shown = page(write_run(tmp_path / "one", lam=0.3))
    text = cells(shown.text)
    assert shown.elements[0] == ("html", {"lang": "en"})
    assert text.startswith("GRAO: one")
    assert "progress finished after 30 steps" in text
    assert "mean reward, first and last tenth -0.8 → 1.9" in text
    assert "held out: RAS 25.0% → 75.0% (95%: 50.0% to 100.0%)" in text
    assert "held out: NAG 50.0%" in text
    assert "1 min 15 s" in text
    assert "Options that differ from their defaults. lam 0.3 All 2 options" in text
    assert "torch 2.0" in text
    assert "reference reward 0.250 first before training reward 0.500 first before" in text
    assert "after step 30 reward 0.500 first after" in text
    labels = [figure["aria-label"] for figure in shown.all("svg") if "role" in figure]
    reward = next(label for label in labels if label and label.startswith("Reward."))
    assert "samples from -0.9 at step 1 to 2 at step 30" in reward
    assert "held out from 0 at step 0 to 0.5 at step 30" in reward
    logprob = next(label for label in labels if label and label.startswith("Log-probability"))
    assert "samples, L(o) from -1.51 at step 1 to -1.8 at step 30" in logprob
    shares = next(label for label in labels if label and label.startswith("Shares"))
    assert "exploration from 25% to 25%; imitation from 50% to 50%" in shares


def test_several_runs_are_laid_over_each_other(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    text = cells(page(*folders).text)
    assert "there is nothing to learn from. a 0.5 b 0.5" in text  # one metric
    assert "a: samples 2" in text and "b: samples 2" in text
    assert "or between the runs. ■ a ■ b seed 0 1" in text
    assert "a, b: The first 2 of 2 held-out prompts" in text
    assert text.count("before training reward") == 2  # the same of both runs
    assert "first before a: after" not in text  # as are these
    assert text.count("after step 30 reward") == 2


def test_answers_that_runs_do_not_share_say_whose_they_are(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=20)]
    text = cells(page(*folders).text)
    assert "first before a: after step 30 reward 0.500 first after b: after step 20" in text


def test_an_unfinished_run_shows_its_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "rew')
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 30, "prompt": "to')
    text = cells(page(folder, samples=1).text)
    assert "progress not finished: 30 of 30 steps" in text
    assert "Samples of step 10 prompt first" in text
    assert "Samples of step 20 prompt second" in text or "Samples of step 20 prompt first" in text
    assert "best sample reward 1.000 first high worst sample reward -1.000 first low" in text


@pytest.mark.parametrize("name", ["config", "run", "summary"])
@pytest.mark.parametrize("content", [None, "", "{", "[1]", "\xff", '{"seconds": "x"}'])
def test_files_may_be_missing_or_torn(tmp_path: Path, name: str, content: str | None) -> None:
    folder = write_run(tmp_path / "one")
    path = folder / f"{name}.json"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    assert "GRAO: one" in page(folder).text


def test_a_run_with_nothing_but_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None, "epoch": 1}))
    text = cells(page(tmp_path).text)
    assert "not finished: 1 steps" in text or "not finished: 1 step" in text
    assert "There is no config.json that can be read." in text


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    odd = [None, "text", True, [1], {"a": 1}]
    rows = [metrics(step, reward=value) for step, value in enumerate(odd, start=1)]
    rows += [metrics(6, reward=1.5), metrics(7, **{"<i>new</i>": 3})]
    lines = [json.dumps(row) for row in rows] + ['{"step": 8, "loss": 1e999}']
    lines += ['{"step": 9, "loss": ' + "9" * 400 + "}"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shown = page(tmp_path)
    assert "samples 0.3" not in shown.text
    labels = [figure.get("aria-label") or "" for figure in shown.all("svg")]
    (label,) = [label for label in labels if label.startswith("Reward.")]
    assert "samples from 1.5 at step 6 to -0.3 at step 7" in label
    assert "<i>new</i>" in shown.text  # of the section of other metrics, as text


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<b>run</b>", texts=HOSTILE, model=HOSTILE[0])
    html = grao_fast.report(folder, path=tmp_path / "out.html").read_text(encoding="utf-8")
    shown = Page(html)  # which fails for any element that is not the page's own
    assert HOSTILE[0] in shown.text and "{{ 7 * 7 }}" in shown.text
    assert r"\x1b[31mred\x1b[0m \x00 \u202egnp.exe \ud800 &lt;b&gt;" in shown.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    assert "more characters)" in shown.text
    for _, attributes in shown.elements:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    # neither the style sheet nor an attribute leads anywhere
    assert not re.search(r"url\(|@import", html.split("</style>")[0])


def test_the_rewards_that_fell_most_are_shown(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(8)]
    folder = write_run(tmp_path, texts=texts)
    path = folder / "eval-30.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, change in zip(rows, (-9, -9, 0, -1, None, -3, -2, 1), strict=True):
        row["vs_baseline"] = change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = cells(page(folder, samples=2).text)
    first, worst = text.split("Others that lost most against the model before training")
    assert "The first 2 of 8 held-out prompts" in first
    assert re.findall(r"prompt user: (text \d)", worst) == ["text 5"]  # half as many


@pytest.mark.slow
def test_many_steps_make_a_small_page(tmp_path: Path) -> None:
    rows = [metrics(step, reward=math.sin(step * 7.0)) for step in range(1, 20_001)]
    rows[10_000]["reward"] = 99.0  # a spike that must not be lost
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = grao_fast.report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 600_000
    html = path.read_text()
    top = svg._TOP
    assert re.search(rf'class="raw c0" d="[^"]*,{top}\.0', html)


def test_thinned_series_keep_extremes_order_and_gaps() -> None:
    values = [float(i % 10) for i in range(1000)]
    values[500:520] = [math.nan] * 20
    values[777] = -5.0
    steps, kept = thinned((list(range(1000)), values), 100)
    assert len(steps) <= 102
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 999
    assert min(v for v in kept if not math.isnan(v)) == -5.0 and any(map(math.isnan, kept))
    assert thinned(([1, 2], [1.0, 2.0]), 100) == ([1, 2], [1.0, 2.0])


def test_shares_leave_out_steps_without_components() -> None:
    rows = [metrics(1), {"step": 2}, metrics(3, **{"objective/imitation": None})]
    assert component_shares(rows) == ([1], [[0.25], [0.5], [0.25]])
    assert component_shares(rows[1:]) == ([], [])


def test_shares_are_of_the_objectives_own_terms() -> None:
    rows = [{"step": 4, "objective/policy": -1.0, "objective/imitation": 3.0}]
    assert components_of(rows) == ("policy", "imitation")
    assert component_shares(rows) == ([4], [[0.25], [0.75]])
    assert component_shares([{"step": 1, "objective/policy": 1.0}]) == ([], [])  # of one, none


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3125, "0.3125"), (-12500, "-12.5k"), (5.15e9, "5.15G"), (3.2e-7, "3.2e-07"),
     (math.nan, "-"), (1e18, "1e+18"), (999.96, "1000"), (0, "0")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert svg.short_number(value) == text


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "other"]


def test_folders_that_cannot_be_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/metrics.jsonl").write_text('{"st')
    for folders, options, message in (
        ((), {}, "shows 1 to 7 runs, got 0"),
        ((run,) * 8, {}, "shows 1 to 7 runs, got 8"),
        ((run, tmp_path / "run" / ".." / "run"), {}, "is given twice"),
        ((tmp_path / "empty",), {}, "holds no metrics.jsonl: give the output_dir of a run"),
        ((tmp_path / "torn",), {}, "holds nothing to report yet"),
        ((run,), {"samples": -1}, "samples must be at least 0, got -1"),
        ((run,), {"path": tmp_path / "no/such.html"}, "is no folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            grao_fast.report(*folders, **options)


def test_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    assert main(["report", "a"]) == 0
    assert main(["report", "a", "b", "--samples", "0"]) == 0
    assert capsys.readouterr().out == "a/report.html\ngrao-report.html\n"
    assert "Answers" in (tmp_path / "a/report.html").read_text()
    assert "Answers" not in (tmp_path / "grao-report.html").read_text()
    assert main(["report"]) == 2
    assert "missing DIR; see grao-fast report --help" in capsys.readouterr().err


def test_a_run_whose_samples_have_no_log_probs(tmp_path: Path) -> None:
    """L(o) has then no value, and its chart only L(y)."""
    row = metrics(1, **{"reference/logprob": -1.0, "reference/logprob_gap": None})
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    html = grao_fast.report(tmp_path).read_text()
    assert "references, L(y)" in html and "samples, L(o)" not in html
