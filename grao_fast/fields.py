"""What the fields of a dataset's row mean: text, messages, and HH transcripts.

Every function takes `where`, the row and column as an error should name them, and raises
ValueError on what it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, str]]

_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def check_text(value: Any, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can hold and no tokenizer or file can."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: character {error.start} is {value[error.start]!a}, half a "
                f"surrogate pair and no text; repair the row or leave it out"
            ) from error
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_text(key, where)
            check_text(item, where)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_text(item, where)


def read_prompt(value: Any, where: str) -> str | Messages:
    """A prompt: text that is not blank, or messages."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{where} is empty")
        return value
    return read_messages(value, where)


def read_reference(value: Any, where: str) -> str | None:
    """A reference: text, or the assistant's turn that ends the messages; None where blank."""
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    last = read_messages(value, where)[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{where} must end in an assistant turn, got role {last['role']!r}")
    return last["content"] if last["content"].strip() else None


def read_messages(value: Any, where: str) -> Messages:
    """A conversation: one or more dicts with `role` and `content` as text."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise ValueError(f"{where} must be text or messages, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{where} holds no messages")
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{where}, message {position} must be a dict with `role` and `content`, "
                f"got {type(message).__name__}"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"{where}, message {position}: `{key}` must be text, "
                    f"got {type(message.get(key)).__name__}"
                )
        # Arrow gives every message the keys of all messages, with None where there was none.
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def is_hh_transcript(text: str) -> bool:
    """Whether a text reads as one of Anthropic's HH transcripts."""
    return text.lstrip().startswith(("Human:", "Assistant:"))


def parse_hh_transcript(text: str, where: str) -> tuple[Messages, str | None]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." into prompt messages and the last answer.

    The published data holds a few transcripts in which a speaker takes two turns running (6 of
    the 1,700 we looked at): they are one turn of two paragraphs, as many chat templates insist
    that roles alternate. Blank turns are left out; a blank last answer is None.
    """
    before, *parts = _TURN.split("\n\n" + text.strip())
    roles = [_ROLES[name] for name in parts[0::2]]
    if before.strip() or "assistant" not in roles:
        raise ValueError(f"{where} is no transcript of '\\n\\nHuman:' and '\\n\\nAssistant:' turns")
    end = len(roles) - roles[::-1].index("assistant")  # the last answer ends the transcript
    turns: Messages = []
    for position, (role, content) in enumerate(
        zip(roles[:end], map(str.strip, parts[1::2][:end]), strict=True)
    ):
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".rstrip()
        elif content or position == end - 1:
            turns.append({"role": role, "content": content})
    *prompt, answer = turns
    if not prompt:
        raise ValueError(f"{where} has no Human turn before its last answer")
    return prompt, answer["content"] or None


def shared_prefix(chosen: str, rejected: str) -> str:
    """The text that two answers begin with, up to the last whole word and without its space."""
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    # Answers that begin alike ("The", "This") must not lend their first letters to the prompt.
    while 0 < end < len(chosen) and not chosen[end - 1].isspace():
        end -= 1
    while end > 0 and chosen[end - 1] == " ":  # the space belongs to the answer's first token
        end -= 1
    return chosen[:end]
