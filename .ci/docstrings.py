"""Griffe extension of the site: writes the entries of docstrings as Markdown lists.

Docstrings here describe several parameters in one entry, have sections of their own ("Objective:"
in GRAOConfig), and list fields without a section. Griffe's parser of Google's style takes none of
these.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_SECTION = re.compile(r"^([A-Z][^\n:]*):\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(?=\S)", re.MULTILINE)
_NAMED = re.compile(r"((?:\w+,\s+)*\w+): (.*)", re.DOTALL)


def as_markdown(docstring: str) -> str:
    """Return a docstring with a heading in bold for each section and a list item for each entry.

    A section is a line that ends in a colon, above indented lines. An entry, "name: text", begins a
    line, in a section or in a paragraph of its own; what continues it is indented.
    """
    parts = _SECTION.split(docstring + "\n")
    text = _paragraphs(parts[0])
    for title, body, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        text += f"\n\n**{title}**\n\n{_entries(inspect.cleandoc(body))}\n\n{_paragraphs(rest)}"
    return text.strip()


def _paragraphs(text: str) -> str:
    return "\n\n".join(
        _entries(paragraph) if re.match(r"[a-z]", paragraph) else paragraph
        for paragraph in text.strip("\n").split("\n\n")
    )


def _entries(text: str) -> str:
    """Return the text as a list if each of its entries has a name, else as it is."""
    named = [_NAMED.fullmatch(entry.strip()) for entry in _ENTRY.split(text) if entry.strip()]
    if not all(named):
        return text
    return "\n".join(
        f"- {_code(entry[1])}: {' '.join(entry[2].split())}" for entry in named if entry
    )


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in re.split(r",\s+", names))


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring by `as_markdown`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(inspect.cleandoc(obj.docstring.value))
