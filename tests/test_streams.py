"""Tests that failing displays do not stop a run, and that control characters are escaped."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_tracking import ROW, Recorder, tracker

from grao_fast.data.examples import load_examples
from grao_fast.system.lines import read_lines
from grao_fast.system.streams import lenient_streams
from grao_fast.system.visible import VisibleFormatter, get_logger, squeezed, visible, visible_lines

# ---- streams that fail


class Broken(io.StringIO):
    """A stream of a class of its own."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def full() -> Any:
    return open("/dev/full", "w", buffering=1)


def broken_pipe() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", buffering=1)


STREAMS: dict[str, Callable[[], Any]] = {
    "closed": closed,
    "full": full,
    "broken pipe": broken_pipe,
    "absent": lambda: None,
    "raising": lambda: Broken(RuntimeError("of its own")),
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_failing_streams_stop_nothing_and_are_named_once(make, caplog, monkeypatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, make())
    before = sys.stdout, sys.stderr
    with lenient_streams(to_the_end=True):
        for _ in range(2):
            print("text")
            print("text", file=sys.stderr, flush=True)
            sys.stderr.writelines(["text\n"])
            assert sys.stdout.isatty() is sys.stderr.isatty() is False
            with lenient_streams():
                print("text", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    said = 0 if make() is None else 1
    assert caplog.text.count("standard output cannot be written") == said
    assert caplog.text.count("standard error cannot be written") == said
    for stream in filter(None, before):  # as Python does at exit
        if not stream.closed:
            stream.close()


@pytest.mark.parametrize(
    ("encoding", "has"), [("latin-1", "é"), ("cp1252", "€"), ("cp1251", "да"), ("iso8859-2", "ł")]
)
def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch, encoding, has) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    with lenient_streams():
        print(f"{has} Ð 漢")
    text = stream.buffer.getvalue().decode(encoding)  # type: ignore
    assert text in (f"{has} Ð \\u6f22\n", f"{has} \\xd0 \\u6f22\n")


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_failing_console_does_not_affect_the_files(make, terminal, tmp_path, caplog) -> None:
    screen = Console(file=make(), force_terminal=terminal)
    with tracker(tmp_path, show_progress=True, console=screen) as run:
        for step in (1, 2):
            run.log(step, {"loss": 0.5, "reward": 0.25})
            run.log_completions(step, [ROW])
            run.message("look here")
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [row["step"] for row in read_lines(tmp_path / "completions.jsonl")] == [1, 2]
    assert caplog.text.count("the console fails") <= 1


def test_closed_descriptors_do_not_become_those_of_files(tmp_path: Path) -> None:
    """Otherwise the metrics file gets the descriptor of stderr, and libraries write into it."""

    def child() -> None:
        for descriptor in range(3):
            os.close(descriptor)
        sys.stdin = sys.stdout = sys.stderr = None
        with lenient_streams(to_the_end=True), (tmp_path / "file").open("w") as file:
            os.write(2, b"of a library")
            file.write(str(file.fileno() > 2))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=20)
    assert (tmp_path / "file").read_text() == "True"


@pytest.mark.parametrize("where", [">/dev/full", "2>/dev/full", ">&-", "2>&-", "| head -c 1"])
def test_failing_streams_do_not_change_the_exit_status(where: str) -> None:
    command = f"{sys.executable} -m grao_fast --help {where}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- experiment trackers that fail


class Failing(Recorder):
    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        raise ConnectionError("no \x1b[31mserver")

    def finish(self) -> None:
        raise RuntimeError("not finished")


def test_an_experiment_tracker_that_fails_stops_nothing(tmp_path, caplog) -> None:
    sound = Recorder()
    with tracker(tmp_path, report_to=[Failing(), sound]) as run:
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
    assert sound.calls[2:] == [(1, {"loss": 0.5}), (2, {"loss": 0.25}), "finish"]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("the tracker Failing fails") == 1
    assert "(ConnectionError: no \\x1b[31mserver)" in caplog.text


# ---- control characters

HOSTILE = (
    "\x1b[31mred\x1b]52;c;clipboard\x07 \x9b2J \r over \b\x7f\x00 "
    "\u202eesrever\u2066\u2069\u200f\u061c \u2028\u2029 \ud800"
)


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


def test_visible() -> None:
    assert visible("plain é 漢字 👩\u200d👩 \\") == "plain é 漢字 👩\u200d👩 \\"
    assert visible("\x1b[1m\x9b\u202e\ud800\n\t\r") == "\\x1b[1m\\x9b\\u202e\\ud800\\n\\t\\r"
    assert visible_lines("a\n\tb\r\x1b") == "a\n\tb\\x0d\\x1b"
    assert squeezed(" a \n\t b\x1b ") == "a b\\x1b"
    assert not is_harmless(HOSTILE)
    assert is_harmless(visible(HOSTILE))
    assert visible(HOSTILE).encode()


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_and_messages_escape_control_characters(terminal: bool, tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    row = {
        **ROW,
        "prompt": [{"role": HOSTILE, "content": HOSTILE}],
        "reference": HOSTILE,
        "completions": [HOSTILE] * 3,
    }
    with tracker(tmp_path, show_progress=False, console=screen) as run:
        run._display._shown = True  # without the bar, which moves the cursor
        run.log_completions(1, [row])
        run.message(HOSTILE)
    shown = screen.file.getvalue()  # type: ignore
    assert "\\x1b[31mred" in shown
    assert is_harmless(shown)
    assert read_lines(tmp_path / "completions.jsonl")[0]["reference"] == HOSTILE  # as it is


def test_log_lines_and_errors_escape_control_characters(tmp_path, caplog) -> None:
    get_logger("grao_fast.test").warning("a column %s, 100%%", HOSTILE)
    assert is_harmless(caplog.records[0].getMessage())
    assert "100%" in caplog.records[0].getMessage()
    file = tmp_path / f"{HOSTILE[:30]}.jsonl"
    for text in ("{", f'{{"{HOSTILE[:5]}": 1}}'):
        file.write_text(text)
        for dataset in (str(file), [{HOSTILE: 1}]):
            with pytest.raises(ValueError, match=r"\\x1b") as caught:
                load_examples(dataset)
            error: BaseException | None = caught.value
            while error is not None:
                assert is_harmless(str(error))
                error = error.__cause__ or error.__context__


def test_log_records_are_formatted_visibly() -> None:
    record = logging.LogRecord("name", logging.INFO, "file", 1, "%s in a file", (HOSTILE,), None)
    assert is_harmless(VisibleFormatter("grao-fast: %(message)s").format(record))
