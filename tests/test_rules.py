"""Tests of ready-made rules: what they score, by table, and what they refuse."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from grao_fast.data.examples import Example
from grao_fast.rewards import (
    ExactMatch,
    JSONSchema,
    Length,
    Math,
    Regex,
    RewardError,
    resolve_reward,
)
from grao_fast.rewards.rules import exact_match
from grao_fast.system.errors import UserError
from grao_fast.training.identity import RunIdentity

BACKTRACKS = r"(a|aa)+$"
LONG = "a" * 60 + "b"


def scores(rule: Any, *cases: tuple[str, Any], column: str = "answer") -> list[float | None]:
    texts, values = zip(*cases, strict=True)
    return rule(completions=list(texts), **{column: list(values)})


# ---- exact match


@pytest.mark.parametrize(
    ("options", "text", "answer", "score"),
    [
        ({}, " 42\n", "42", 1),
        ({}, "42.", "42", 0),
        ({}, "42", 42, 1),
        ({}, "2.5", 2.5, 1),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "STRASSE", "straße", 1),
        ({}, "b", ["a", "b"], 1),
        ({}, "c", ["a", "b"], 0),
        ({}, "c", [], None),
        ({}, "c", None, None),
        ({}, "yes", [{"role": "assistant", "content": "yes"}], 1),
        ({"extract": r"####\s*(\S+)"}, "3 + 4 #### 6\nno: #### 7", "7", 1),
        ({"extract": r"####\s*(\S+)"}, "3 + 4 #### 6\nno: #### 7", "6", 0),
        ({"extract": r"####\s*(\S+)"}, "7", "7", 0),
        ({"extract": r"\d+"}, "7, then 8", "8", 1),
        ({"extract": r"<a>(.*?)</a>"}, "<a>two\nlines</a>", "two\nlines", 1),
        ({"extract": BACKTRACKS + "c"}, LONG, "a", None),
    ],
)
def test_exact_match(
    options: dict, text: str, answer: Any, score: float | None, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(exact_match, "SECONDS", 0.1)
    assert scores(ExactMatch(**options), (text, answer)) == [score]
    late = "1 of 1 completions took longer than 0.1 seconds, and have no reward"
    assert (late in caplog.text) == (text is LONG)


def test_answers_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(RewardError, match="reward exact_match: column 'answer' holds a dict"):
        scores(ExactMatch(), ("a", {"a": 1}))


# ---- regular expressions


@pytest.mark.parametrize(
    ("pattern", "options", "text", "score"),
    [
        (r"\d{2}", {}, "in 42 words", 1),
        (r"\d{2}", {"full": True}, "in 42 words", 0),
        (r"\d{2}", {"full": True}, " 42\n", 1),
        ("<think>.*</think>", {}, "<think>\na\n</think>", 1),
        ("yes", {}, "YES", 0),
        ("yes", {"ignore_case": True}, "YES", 1),
        (BACKTRACKS, {"seconds": 0.05}, LONG, None),
    ],
)
def test_regex(pattern: str, options: dict, text: str, score: float | None) -> None:
    rule = Regex(pattern, **options)
    assert rule([text]) == [score]
    assert rule([[{"role": "assistant", "content": text}]]) == [score]


def test_a_slow_match_lets_other_threads_run() -> None:
    """Without that, no time limit of a reward could end it."""
    slow = threading.Thread(target=Regex(BACKTRACKS, seconds=0.3), args=([LONG],))
    slow.start()
    time.sleep(0.01)
    assert slow.is_alive()
    slow.join()


# ---- mathematics


@pytest.fixture(scope="module")
def math_rule() -> Math:
    pytest.importorskip("math_verify")
    return Math(seconds=1)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so it is $\\boxed{42}$", "42", 1),
        ("so it is 41", "42", 0),
        ("0.5", "\\frac{1}{2}", 1),
        ("$1/2$", "$\\frac{1}{2}$", 1),
        ("$3+2x$", "2x+3", 1),
        ("2", "2x+3", 0),
        ("2", "2\\sqrt{3}", 0),
        ("$\\sqrt{12}$", "2\\sqrt{3}", 1),
        ("The sum is 1,000.", 1000, 1),
        ("12", "12 apples", 1),
        ("7", ["6", "7"], 1),
        ("no idea", "42", 0),
        ("42", None, None),
        ("\ud800 42", "42", 1),
    ],
)
def test_math(math_rule: Math, text: str, answer: Any, score: float | None) -> None:
    assert scores(math_rule, (text, answer)) == [score]


def test_math_that_takes_too_long_has_no_reward(math_rule: Math, caplog) -> None:
    began = time.monotonic()
    cases = ("$9^{9^{9^{9}}}$", "42"), ("42", "42"), ("42", "?!")
    assert scores(math_rule, *cases) == [None, 1.0, None]
    assert time.monotonic() - began < 20
    assert "1 of 3 completions could not be compared within 1 seconds" in caplog.text
    assert "column 'answer': math-verify cannot read the answers of 1 of 3" in caplog.text
    assert math_rule.take_metrics() == {"late": 1.0, "unread": 1.0}


def test_math_works_in_a_thread_and_after_its_process_was_killed(math_rule: Math) -> None:
    examples = [Example("p", None, {"answer": "3"})]
    reward = resolve_reward([math_rule, Length(9)], timeout=60)
    assert reward.score(examples, ["$1+2$"]) == [2.0]
    assert math_rule._worker is not None
    math_rule._worker._process.kill()
    math_rule._worker._process.wait()
    assert reward.score(examples, ["$1+2$"]) == [2.0]


# ---- length


@pytest.mark.parametrize(
    ("options", "text", "score"),
    [
        ({"most": 3}, "one two three", 1),
        ({"most": 3}, "one two three four", 0),
        ({"most": 2, "slack": 4}, "one two three", 0.75),
        ({"most": 2, "slack": 4}, "1 2 3 4 5 6 7 8", 0),
        ({"least": 2}, "one", 0),
        ({"least": 2, "slack": 2}, "one", 0.5),
        ({"most": 3, "unit": "characters"}, "four", 0),
        ({"most": 0}, "", 1),
    ],
)
def test_length(options: dict, text: str, score: float) -> None:
    assert Length(**options)([text]) == [score]


def test_length_in_tokens(tiny_model: Path) -> None:
    """The tiny model's tokens are characters."""
    assert Length(3, unit="tokens", tokenizer=tiny_model)(["abc", "abcd"]) == [1, 0]


# ---- JSON

PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer"}},
    "required": ["age"],
}


@pytest.mark.parametrize(
    ("schema", "text", "score"),
    [
        (PERSON, '{"age": 3}', 1),
        (PERSON, '{"age": "3"}', 0),
        (PERSON, "{}", 0),
        (PERSON, "age: 3", 0),
        (PERSON, 'Here it is:\n```json\n{"age": 3}\n```\nDone.', 1),
        (PERSON, '```\n{"age": 3}\n```\n```\n{"age": 4}\n```', 0),
        (True, "NaN", 0),
        (True, '{"a": [1, null]}', 1),
        (True, "[" * 100_000, 0),
        (True, "1" * 5000, 0),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, "null", 1),
    ],
    ids=range(11),
)
def test_json_schema(schema: Any, text: str, score: float, tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert JSONSchema(schema)([text]) == [score]
    assert JSONSchema(tmp_path / "schema.json")([text]) == [score]
    rows = [schema, json.dumps(schema), None]
    rule = JSONSchema(column="form")
    assert scores(rule, *((text, row) for row in rows), column="form") == [score, score, None]


def test_json_schema_downloads_nothing() -> None:
    pytest.importorskip("jsonschema")
    rule = JSONSchema({"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(RewardError, match="json_schema: the schema refers to what it does not"):
        rule(["1"])


# ---- what is refused, and what a run sees


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactMatch("completions"), "column must be the name of a column"),
        (lambda: ExactMatch(3), "column must be the name of a column of the dataset.* got 3"),
        (lambda: ExactMatch(extract="("), r"'\(' is not a regular expression: missing \)"),
        (lambda: ExactMatch(name=" "), "the name of a reward must be text that is not blank"),
        (lambda: Regex("a{2"[::-1] + "("), "is not a regular expression"),
        (lambda: Regex(3), "3 is not a regular expression"),
        (lambda: Regex("a", seconds=0), "seconds must be above 0, got 0"),
        (lambda: Math(seconds=0.5), "seconds must be a whole number of at least 1, got 0.5"),
        (lambda: Length(), "needs most, least or both"),
        (lambda: Length(3, least=4), "most must be at least least=4, got 3"),
        (lambda: Length(-1), "most must be a number of at least 0, got -1"),
        (lambda: Length(3, unit="lines"), "unit must be one of characters, words, tokens"),
        (lambda: Length(3, unit="tokens"), 'unit="tokens" needs a tokenizer'),
        (lambda: Length(3, tokenizer="a"), 'unit="tokens" needs a tokenizer'),
        (lambda: JSONSchema(), "needs a schema or the column that holds them"),
        (lambda: JSONSchema({"type": "text"}), "schema is not a valid JSON schema: 'text' is not"),
        (lambda: JSONSchema([1]), "schema must be a JSON schema, got a list"),
        (lambda: JSONSchema("absent.json"), "the schema 'absent.json' cannot be read: .*No such"),
        (lambda: JSONSchema(__file__), "holds text that is not JSON"),
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        make()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    for make in (Math, lambda: JSONSchema(True)):
        with pytest.raises(UserError, match=r"needs .*: pip install \"grao-fast\[rules\]\""):
            make()


def test_rules_are_rewards(tmp_path: Path) -> None:
    examples = [Example("p", "4", {"answer": "4"}), Example("p", "5", {"answer": "5"})]
    reward = resolve_reward(
        ["ExactMatch()", 'ExactMatch("references", name="same")', Regex(r"\d")],
        weights=[1, 10, 100],
    )
    assert reward.names == ["exact_match", "same", "regex"]
    reward.check(examples, reward_type="pointwise")
    assert reward.score(examples, ["4", "x"]) == [111, 0]
    with pytest.raises(RewardError, match="reward exact_match needs `solution`, which the dataset"):
        resolve_reward(ExactMatch("solution")).check(examples, reward_type="pointwise")
    # a checkpoint states the settings, so that a run is not resumed with others
    assert RunIdentity.of(examples, reward).reward[1:] == [
        "same(column='references', extract=None, ignore_case=False)",
        "regex(pattern='\\\\d', full=False, ignore_case=False)",
    ]


def test_a_row_without_an_answer_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("searched")

    rule = ExactMatch("answer", extract=r"\d+")
    monkeypatch.setattr("grao_fast.rewards.rules.patterns.Pattern.last", never)
    assert rule(["1"], answer=[None]) == [None]
