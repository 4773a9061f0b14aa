"""Prompts of messages, and the turns that answer them, as a chat template writes them.

A prompt is rendered with the header of the turn that follows it; one that ends in an assistant's
turn is left open instead, and what follows continues that turn. An answer is what the template
writes behind its prompt when it renders both together, up to the end of the last turn.

Where the template writes the two together otherwise than the prompt alone, or leaves out a part of
the answer, a plain answer is its own text and the template's end of a turn. This is so of templates
that strip reasoning from turns, or open `<think>` in the header alone; what the header has opened
the answer does not open again.
"""

from __future__ import annotations

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
_LONGEST_REFUSAL = 300  # characters; Transformers quotes the whole conversation
# What code of a template, or of Transformers around it, raises of messages that it cannot render.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


# How an answer came about: as the template writes it behind its prompt; otherwise, as the prompt is
# not how the template begins both; or without a part that the template leaves out.
Written = Literal["rendered", "no prefix", "in part"]


class TemplateRefusal(UserError):
    """The chat template does not render a conversation; the message is its own words, one line."""


class Chat:
    """A tokenizer's chat template.

    Args:
        end_texts: texts of the tokens that end a completion.
        continues: whether a prompt that ends in an assistant's turn is continued; False opens
            another turn.
        options: for `apply_chat_template`.
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

    def prompt(self, messages: Messages) -> str:
        """The text of a prompt, ready to be answered. Raises TemplateRefusal."""
        if self._continued(messages):
            return self._render(messages, continue_final_message=True)
        return self._render(messages, add_generation_prompt=True)

    def answer(
        self, messages: Messages, prompt_text: str, reference: str | Messages
    ) -> tuple[str, Written]:
        """What a reference adds to `prompt(messages)`. Raises TemplateRefusal."""
        turns = [{"role": "assistant", "content": reference}]
        if not isinstance(reference, str):
            turns = list(reference)
        turns[-1] = {**turns[-1], **self._without_end(turns[-1])}
        whole = self._render(self._joined(messages, turns))
        text: str | None = None
        written: Written = "no prefix"
        if whole.startswith(prompt_text):
            text, written = self._closed(messages, whole[len(prompt_text) :]), "in part"
        elif whole.startswith(prompt_text.rstrip()):  # but for blanks, it is
            text = self._closed(messages, whole[len(prompt_text.rstrip()) :].lstrip())

        tag = _open_tag(prompt_text)
        contents = _contents(turns)
        contents[0], opens_again = _without_tag(contents[0], tag)
        kept = text is not None and _holds(text, contents)
        if kept and opens_again:
            kept = _squeezed(text or "").startswith(_squeezed(contents[0]))
        if text is not None and kept and _holds(text, _beside(turns)):
            return text, "rendered" if written == "in part" else written
        one_turn = len(turns) == 1 and not turns[0].get("tool_calls")
        reasoning = next((turns[0][key] for key in REASONING if turns[0].get(key)), "")
        if one_turn and tag and reasoning:
            own = f"{reasoning}\n{tag[0]}/{tag[1:]}\n\n{contents[0]}"
            return own + self.closing(messages), written
        if one_turn and not kept:
            return contents[0] + self.closing(messages), written
        if text is None:
            text = self._closed(messages, whole[_shared_length(prompt_text, whole) :])
        return text, written

    def closing(self, messages: Messages) -> str:
        """What the template keeps behind the last turn's text: the end of the turn."""
        if self._closing is None:
            whole = self._render(self._joined(messages, [{"role": "assistant", "content": _MARK}]))
            _, mark, closing = whole.rpartition(_MARK)
            if not mark:
                raise TemplateRefusal("it leaves out what an assistant says as text")
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
        """A rendered answer without what the template writes behind the end of its last turn."""
        kept = self.closing(messages)
        assert self._closing is not None
        if text.endswith(self._closing):
            return text.removesuffix(self._closing) + kept
        return text.rstrip()

    def _kept(self, closing: str) -> str:
        ends = [closing.find(end) + len(end) for end in self.end_texts if end in closing]
        return closing[: min(ends)] if ends else closing.rstrip()

    def _without_end(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """A turn's content without the end-of-sequence tokens that its text ends in."""
        content = turn.get("content")
        if not isinstance(content, str):
            return {}
        while content.rstrip().endswith(self.end_texts):
            end = next(end for end in self.end_texts if content.rstrip().endswith(end))
            content = content.rstrip().removesuffix(end)
        return {"content": content}

    def _render(self, messages: Messages, **how: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, **{"add_generation_prompt": False} | how, **self.options
            )
        except _REFUSALS as error:
            reason = one_line(error, _LONGEST_REFUSAL)
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise TemplateRefusal(kind + reason) from error
        return str(text)


def _contents(turns: Messages) -> list[str]:
    """The texts of the assistant's turns, and at least one."""
    return [t.get("content", "") for t in turns if t["role"] == "assistant"] or [""]


def _beside(turns: Messages) -> list[str]:
    """What the assistant's turns hold beside texts: reasoning, and the names of tools they call."""
    beside = []
    for turn in turns:
        beside += [turn[key] for key in REASONING if key in turn]
        calls = turn.get("tool_calls") or []
        beside += [call.get("function", call).get("name", "") for call in calls]
    return [text for text in beside if isinstance(text, str)]


def _holds(text: str, parts: list[str]) -> bool:
    """Whether a text holds others, blanks aside, which templates trim and add."""
    squeezed = _squeezed(text)
    return all(_squeezed(part) in squeezed for part in parts)


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _open_tag(prompt_text: str) -> str:
    """The tag of reasoning that ends a prompt, as `<think>`; empty where none does."""
    found = _OPEN_TAG.search(prompt_text)
    return found[1] if found else ""


def _without_tag(text: str, tag: str) -> tuple[str, bool]:
    """A text without the tag that it opens again, and whether it does."""
    if not tag or not text.lstrip().startswith(tag):
        return text, False
    return text.lstrip().removeprefix(tag).removeprefix("\n"), True


def _shared_length(prompt_text: str, whole: str) -> int:
    """How much two texts share, up to a blank or the end of a tag: `<th` is not a share."""
    pairs = enumerate(zip(prompt_text, whole, strict=False))
    length = next((place for place, (a, b) in pairs if a != b), min(len(prompt_text), len(whole)))
    while length and not (prompt_text[length - 1].isspace() or prompt_text[length - 1] in ">]"):
        length -= 1
    return length
