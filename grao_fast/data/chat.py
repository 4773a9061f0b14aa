"""Renders prompts of messages, and the turns that answer them, through a chat template.

A prompt is rendered with the generation prompt, the header of the assistant's turn. A prompt that
ends in an assistant's turn is left open instead, and the answer continues that turn. The text of an
answer is what the template adds to the prompt when it renders both together, up to the end of the
last turn.

Some templates render a conversation differently from its prompt alone: they strip the reasoning of
earlier turns, or write `<think>` only in the generation prompt. If the rendered conversation does
not start with the rendered prompt, or lacks a part of the answer, an answer of one turn is its own
text plus the template's end of turn. A tag that the generation prompt opens is not opened again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from grao_fast.data.fields import REASONING, Messages
from grao_fast.system.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "@@answer@@"
_OPEN_TAG = re.compile(r"([<\[◁](?:think|thinking|thought|reasoning)[>\]▷])\s*\Z", re.IGNORECASE)
_KEPT = 64  # templates with options of rows, each of which knows how it ends a turn
_LONGEST_REFUSAL = 300  # characters of an error; Transformers quotes the whole conversation
# What a template, or Transformers around it, raises for messages that it cannot render.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

# How the text of an answer was found: it follows the rendered prompt ("rendered"), the rendered
# conversation does not start with the prompt ("no prefix"), or it lacks some of the answer
# ("in part").
Written = Literal["rendered", "no prefix", "in part"]


class TemplateRefusal(UserError):
    """A chat template that cannot render a conversation; the message is the template's own."""


class Chat:
    """A tokenizer's chat template.

    Args:
        end_texts: the texts of the tokens that end a completion.
        continues: True if the answer continues an assistant's turn that ends the prompt; False if
            it is a new turn.
        options: further arguments for `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_texts: Iterable[str],
        *,
        continues: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_texts = tuple(end_texts)
        self.continues = continues
        self.options = dict(options or {})
        self._closing: str | None = None
        self._with: dict[str, Chat] = {}  # by further options

    def with_options(self, more: Mapping[str, Any]) -> Chat:
        """Return this template with further arguments, such as a row's tools."""
        if not more:
            return self
        key = json.dumps(more, sort_keys=True, default=str)
        if key not in self._with:
            if len(self._with) == _KEPT:
                self._with.clear()
            self._with[key] = Chat(
                self.tokenizer,
                self.end_texts,
                continues=self.continues,
                options={**self.options, **more},
            )
        return self._with[key]

    def prompt(self, messages: Messages) -> str:
        """Return the text of a prompt, generation prompt included. Raises TemplateRefusal."""
        if self._continued(messages):
            return self._render(messages, continued=True)
        return self._render(messages, generation_prompt=True)

    def answer(
        self, messages: Messages, prompt_text: str, reference: str | Messages
    ) -> tuple[str, Written]:
        """Return the text that a reference adds to `prompt_text`, and how it was found.

        prompt_text: `prompt(messages)`. Raises TemplateRefusal.
        """
        turns = [{"role": "assistant", "content": reference}]
        if not isinstance(reference, str):
            turns = list(reference)
        turns[-1] = {**turns[-1], **self._without_end(turns[-1])}
        whole = self._render(self._joined(messages, turns))
        text, written = self._after_prompt(messages, prompt_text, whole)

        tag = _open_tag(prompt_text)
        contents = _contents(turns)
        contents[0], opens_again = _without_tag(contents[0], tag)
        has_contents = text is not None and _holds(text, contents)
        if has_contents and opens_again:
            has_contents = without_blanks(text or "").startswith(without_blanks(contents[0]))
        if text is not None and has_contents and _holds(text, _beside(turns)):
            return text, written

        written = "in part" if written == "rendered" else written
        one_turn = len(turns) == 1 and not turns[0].get("tool_calls")
        reasoning = next((turns[0][key] for key in REASONING if turns[0].get(key)), "")
        if one_turn and tag and reasoning:
            own = f"{reasoning}\n{tag[0]}/{tag[1:]}\n\n{contents[0]}"
            return own + self.closing(messages), written
        if one_turn and not has_contents:
            return contents[0] + self.closing(messages), written
        if text is None:
            text = self._closed(messages, whole[_shared_length(prompt_text, whole) :])
        return text, written

    def _after_prompt(
        self, messages: Messages, prompt_text: str, whole: str
    ) -> tuple[str | None, Written]:
        """Return what follows the prompt in a rendered conversation; None if that begins otherwise.

        White space at the end of the prompt may differ, which counts as "no prefix".
        """
        if whole.startswith(prompt_text):
            return self._closed(messages, whole[len(prompt_text) :]), "rendered"
        bare = prompt_text.rstrip()
        if whole.startswith(bare):
            return self._closed(messages, whole[len(bare) :].lstrip()), "no prefix"
        return None, "no prefix"

    def closing(self, messages: Messages) -> str:
        """Return the text with which the template ends an assistant's turn."""
        if self._closing is None:
            whole = self._render(self._joined(messages, [{"role": "assistant", "content": _MARK}]))
            _, mark, closing = whole.rpartition(_MARK)
            if not mark:
                raise TemplateRefusal("it leaves out assistant content that is given as text")
            self._closing = closing
        return self._kept(self._closing)

    def _continued(self, messages: Messages) -> bool:
        return self.continues and messages[-1]["role"] == "assistant"

    def _joined(self, messages: Messages, turns: Messages) -> Messages:
        if not (self._continued(messages) and turns[0]["role"] == "assistant"):
            return [*messages, *turns]
        content = messages[-1].get("content", "") + turns[0].get("content", "")
        return [*messages[:-1], {**messages[-1], **turns[0], "content": content}, *turns[1:]]

    def _closed(self, messages: Messages, text: str) -> str:
        """Cut what the template writes after the end of an answer's last turn."""
        kept = self.closing(messages)
        assert self._closing is not None
        if text.endswith(self._closing):
            return text.removesuffix(self._closing) + kept
        return text.rstrip()

    def _kept(self, closing: str) -> str:
        ends = [closing.find(end) + len(end) for end in self.end_texts if end in closing]
        return closing[: min(ends)] if ends else closing.rstrip()

    def _without_end(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """Return a turn's content without end-of-sequence tokens at its end, as a new field."""
        content = turn.get("content")
        if not isinstance(content, str):
            return {}
        while content.rstrip().endswith(self.end_texts):
            end = next(end for end in self.end_texts if content.rstrip().endswith(end))
            content = content.rstrip().removesuffix(end)
        return {"content": content}

    def _render(
        self, messages: Messages, *, generation_prompt: bool = False, continued: bool = False
    ) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                continue_final_message=continued,
                **self.options,
            )
        except _REFUSALS as error:
            reason = one_line(error, _LONGEST_REFUSAL)
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise TemplateRefusal(kind + reason) from error
        return str(text)


def _contents(turns: Messages) -> list[str]:
    """The contents of the assistant's turns; one empty text if there are none."""
    return [t.get("content", "") for t in turns if t["role"] == "assistant"] or [""]


def _beside(turns: Messages) -> list[str]:
    """What the assistant's turns hold besides content: reasoning, and the names of called tools."""
    beside = []
    for turn in turns:
        beside += [turn[key] for key in REASONING if key in turn]
        calls = turn.get("tool_calls") or []
        beside += [call.get("function", call).get("name", "") for call in calls]
    return [text for text in beside if isinstance(text, str)]


def _holds(text: str, others: list[str]) -> bool:
    """Whether a text contains all others, white space aside, which templates trim and add."""
    return all(without_blanks(other) in without_blanks(text) for other in others)


def without_blanks(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def _open_tag(prompt_text: str) -> str:
    """The reasoning tag, such as `<think>`, that a prompt ends in; empty if it ends in none."""
    found = _OPEN_TAG.search(prompt_text)
    return found[1] if found else ""


def _without_tag(text: str, tag: str) -> tuple[str, bool]:
    """A text without a leading `tag`, and whether it had one."""
    if not tag or not text.lstrip().startswith(tag):
        return text, False
    return text.lstrip().removeprefix(tag).removeprefix("\n"), True


def _shared_length(prompt_text: str, whole: str) -> int:
    """Length of the common prefix of two texts, cut back to white space or the end of a tag."""
    pairs = enumerate(zip(prompt_text, whole, strict=False))
    length = next((place for place, (a, b) in pairs if a != b), min(len(prompt_text), len(whole)))
    while length and not (prompt_text[length - 1].isspace() or prompt_text[length - 1] in ">]"):
        length -= 1
    return length
