"""docs/troubleshooting.md has every error and warning of the package, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/troubleshooting.md"
EXCEPTIONS = re.compile(
    r"(?!Assertion|Attribute|Timeout)\w*Error$|ProcessDied|SlowProcess|_TooSlow|KeyboardInterrupt|TemplateRefusal"
)
# their functions return what is shown, or their constants are its words
RETURNED = (
    "cli/messages.py",
    "data/encoder.py",
    "distributed/links.py",
    "rewards/judge/remedies.py",
    "training/diagnosis.py",
)
NO_MESSAGES = (
    "a list [{}, ...]",
    "an integer of {} bits",
    "a value that cannot be printed",
    "one of {}",
)
SHORT = 5  # characters of a message that name nothing


def text_of(node: ast.expr) -> str:
    """Return an expression's text, with {} in place of each part that is known only in a run."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "{}"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return "{}"


def messages_of(source: str, *, returned: bool) -> Iterator[str]:
    """Yield the texts of errors that a module makes, of its warnings, and of functions that make
    such a text; with returned=True, of all functions, and the module's constants."""
    tree = ast.parse(source)
    made = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        logged = ast.unparse(call.func) in ("logger.warning", "logger.error")
        if call.args and (logged or EXCEPTIONS.match(name)):
            made.append(call.args[0])
            yield text_of(call.args[0])
    called = {
        call.func.id
        for call in (node for argument in made for node in ast.walk(argument))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if returned or function.name in called:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and node.value is not None:
                    yield text_of(node.value)
    for constant in (node.value for node in tree.body if isinstance(node, ast.Assign)):
        if returned:
            yield from map(
                text_of, constant.values if isinstance(constant, ast.Dict) else [constant]
            )


def normal(text: str) -> str:
    """Return the text with one kind of placeholder and of space."""
    return " ".join(re.sub(r"\{[^}]*\}|%[-\d.]*[a-z]|…", "{}", text).split())


def all_messages() -> dict[str, str]:
    """Return the places of all messages that have words of their own."""
    places: dict[str, str] = {}
    for folder in ("grao_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = str(path.relative_to(ROOT))
            for text in messages_of(path.read_text("utf-8"), returned=module.endswith(RETURNED)):
                words = normal(text)
                if len(words.replace("{}", "").strip()) > SHORT and words not in NO_MESSAGES:
                    places[words] = module
    return places


def phrases(page: str) -> list[str]:
    """Return the parts of messages in the first column of the tables."""
    cells = re.findall(r"^\| (`.*?`) \| ", page, re.MULTILINE)
    return [normal(phrase) for cell in cells for phrase in re.findall(r"`(.+?)`(?:, |$)", cell)]


def test_every_message_has_an_entry() -> None:
    known = phrases(PAGE.read_text("utf-8"))
    assert len(known) > 200
    missing = [
        f"{module}: {message}"
        for message, module in all_messages().items()
        if not any(phrase in message for phrase in known)
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_every_entry_is_of_a_message() -> None:
    messages = list(all_messages())
    known = phrases(PAGE.read_text("utf-8"))
    stale = [phrase for phrase in known if not any(phrase in message for message in messages)]
    assert not stale


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise UserError(f"{name!r} is " + "bad")', "{} is bad"),
        ('logger.warning("%d of %d rows", 1, 2)', "{} of {} rows"),
        ('def f():\n    return f"gone: {x}"\nraise UserError(f())', "gone: {}"),
    ],
)
def test_messages_are_found(source: str, found: str) -> None:
    assert found in [normal(text) for text in messages_of(source, returned=False)]
