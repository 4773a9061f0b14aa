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

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from grao_fast.fields import REASONING, Messages, beside_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "@@answer@@"
_LONGEST_REFUSAL = 300  # characters; Transformers quotes the whole conversation
# What code of a template, or of Transformers around it, raises of messages that it cannot render.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


# How an answer came about: as the template writes it behind its prompt; otherwise, as the prompt is
# not how the template begins both; or without a part that the template leaves out.
Written = Literal["rendered", "no prefix", "in part"]


class TemplateRefusal(ValueError):
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
        written: Written = "no prefix"
        if whole.startswith(prompt_text):
            text = self._closed(messages, whole[len(prompt_text) :])
            if all(_squeezed(said) in _squeezed(text) for said in _said(turns)):
                return text, "rendered"
            if not _is_plain(turns):
                return text, "in part"
            written = "in part"
        header, closing = self._around_answer(messages)
        shared = _shared_length(prompt_text, header)
        if _is_plain(turns):
            own = _not_opened_twice(prompt_text[shared:], turns[0]["content"])
            return own + self._kept(closing), written
        return self._closed(messages, whole[shared:]), written

    def closing(self, messages: Messages) -> str:
        """What the template keeps behind the last turn's text: the end of the turn."""
        if self._closing is None:
            self._closing = self._around_answer(messages)[1]
        return self._kept(self._closing)

    def _continued(self, messages: Messages) -> bool:
        return self.continues and messages[-1]["role"] == "assistant"

    def _joined(self, messages: Messages, turns: Messages) -> Messages:
        if not (self._continued(messages) and turns[0]["role"] == "assistant"):
            return [*messages, *turns]
        content = messages[-1].get("content", "") + turns[0].get("content", "")
        return [*messages[:-1], {**messages[-1], **turns[0], "content": content}, *turns[1:]]

    def _around_answer(self, messages: Messages) -> tuple[str, str]:
        """What the template writes up to an answer's text, and behind it."""
        whole = self._render(self._joined(messages, [{"role": "assistant", "content": _MARK}]))
        header, _, closing = whole.rpartition(_MARK)
        return header, closing

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
            words = " ".join(str(error).split())[:_LONGEST_REFUSAL]
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            raise TemplateRefusal(kind + words) from error
        return str(text)


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = (place for place, (a, b) in pairs if a != b)
    return next(differ, min(len(one), len(other)))


def _is_plain(turns: Messages) -> bool:
    return len(turns) == 1 and not beside_text(turns[0])


def _said(turns: Messages) -> list[str]:
    """What the assistant's turns hold: texts, reasoning, and the names of the tools they call."""
    said = []
    for turn in turns:
        if turn["role"] == "assistant":
            said += [turn[key] for key in ("content", *REASONING) if key in turn]
            calls = turn.get("tool_calls") or []
            said += [call.get("function", call).get("name", "") for call in calls]
    return [text for text in said if isinstance(text, str)]


def _squeezed(text: str) -> str:
    """Without blanks, which templates trim and add."""
    return "".join(text.split())


def _not_opened_twice(opened: str, text: str) -> str:
    """The text without what its prompt has opened already, as `<think>` and a line break."""
    tag = opened.strip()
    if not tag or not text.lstrip().startswith(tag):
        return text
    text = text.lstrip().removeprefix(tag)
    blank = opened[len(opened.rstrip()) :]
    return text.removeprefix(blank)
