"""Reads the fields of a row: text, messages, and HH transcripts.

Every function takes `where`, the name of the row and column for errors, and raises ValueError for
a field that it cannot read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from grao_fast.system.errors import UserError, explained

Messages = list[dict[str, Any]]

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message's reasoning
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")

# Arguments of `apply_chat_template` that decide what is rendered, and in which form.
_NOT_OF_ROWS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
)
_ASKING = ("user", "system", "developer")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant):")


def check_text(value: Any, where: str, within: tuple[int, ...] = ()) -> None:
    """Raise UserError for lone surrogates, which JSON can hold and no tokenizer or file can.

    within: identities of the containers around the value, since a row may contain itself.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: character {error.start} is {value[error.start]!a}, half a surrogate "
                f"pair, which is not text: repair the row or leave it out"
            ) from error
    elif isinstance(value, (Mapping, list, tuple)) and id(value) not in within:
        within = (*within, id(value))
        items = chain.from_iterable(value.items()) if isinstance(value, Mapping) else value
        for item in items:
            check_text(item, where, within)


def read_prompt(value: Any, where: str) -> str | Messages:
    """Read a prompt: text that is not blank, or messages."""
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{where} is empty")
        return value
    return read_messages(value, where)


def read_reference(
    value: Any, where: str, prompt: str | Messages | None = None
) -> str | Messages | None:
    """Read a reference: text, or messages if it is more than the text of one answer.

    Returns None for a blank reference, and for one whose last turn is blank: without content, tool
    calls or reasoning. Messages that repeat the prompt are left out; the others are
    the turns that follow it, with tool calls and reasoning, and end in an assistant's turn.
    """
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    turns = _without_prompt(read_messages(value, where), prompt)
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{where} must end in an assistant turn, got role {turns[-1]['role']!r}")
    if not (turns[-1].get("content", "").strip() or beside_text(turns[-1])):
        return None
    more = (
        "several turns" if len(turns) > 1 else next(map("`{}`".format, beside_text(turns[0])), "")
    )
    if more and isinstance(prompt, str):
        raise UserError(
            f"{where} has {more}, which only a chat template can render: give the prompt as "
            "messages too"
        )
    if more or (turns[0].keys() - {"role", "content"} and not isinstance(prompt, str)):
        return turns
    return turns[0]["content"]


def beside_text(message: Mapping[str, Any]) -> list[str]:
    """The keys of a message that hold output of a model other than its content."""
    return [key for key in (*REASONING, "tool_calls") if message.get(key)]


def _without_prompt(messages: Messages, prompt: str | Messages | None) -> Messages:
    """Messages without the prompt that they begin with."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    start, skipped = (_after_system(m) for m in (messages, asked))
    shared = len(asked) - skipped
    same = [
        (one["role"], one.get("content")) == (other["role"], other.get("content"))
        for one, other in zip(messages[start:], asked[skipped:], strict=False)
    ]
    if shared and len(messages) - start > shared and all(same):
        return messages[start + shared :]
    # The prompt is worded differently: the answer is what follows the last question.
    last = max((n for n, m in enumerate(messages[:-1]) if m["role"] in _ASKING), default=-1)
    return messages[last + 1 :] if messages[0]["role"] in _ASKING else messages


def _after_system(messages: Messages) -> int:
    """The number of system and developer turns that a conversation begins with."""
    roles = [message["role"] for message in messages]
    return next((n for n, role in enumerate(roles) if role not in _ASKING[1:]), len(roles))


def read_messages(value: Any, where: str) -> Messages:
    """Read a conversation: one or more dicts with `role` and `content` as text.

    The content may be missing from an assistant's turn with tool calls or reasoning. Content that
    is a list of text parts, [{"type": "text", "text": ...}, ...], becomes one text.
    """
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise UserError(f"{where} must be text or messages, got {type(value).__name__}")
    if not value:
        raise UserError(f"{where} holds no messages")
    messages = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}, message {position} must be a dict with `role` and `content`, "
                f"got {type(message).__name__}"
            )
        # Arrow gives every message the keys of all messages, and None for those it did not have.
        present = {key: item for key, item in message.items() if item is not None}
        if isinstance(present.get("content"), Sequence):
            present["content"] = _joined_parts(present["content"], f"{where}, message {position}")
        needed = ["role", "content"]
        if present.get("role") == "assistant" and beside_text(present):
            needed = ["content"] if "content" in present else []
        for key in needed:
            if not isinstance(present.get(key), str):
                raise UserError(
                    f"{where}, message {position}: `{key}` must be text, "
                    f"got {type(message.get(key)).__name__}"
                )
        messages.append(present)
    return messages


def _joined_parts(content: Any, where: str) -> str:
    """The text of a message's content, which may be given in parts."""
    if isinstance(content, (str, bytes)):
        return content
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "str") or not isinstance(text, str):
            raise UserError(
                f"{where}: part {place} of `content` is {kind}, and only text can be rendered: "
                'give {"type": "text", "text": ...}'
            )
        texts.append(text)
    return "".join(texts)


def read_template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the columns of a row that are arguments of its chat template."""
    tools, more = (row.get(name) for name in TEMPLATE_COLUMNS)
    if isinstance(tools, str):
        with explained(f"{where}, `tools` is text, but not JSON", json.JSONDecodeError):
            tools = json.loads(tools)
    is_list = isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)
    if tools is not None and not is_list:
        raise UserError(
            f"{where}, `tools` must be a list of JSON schemas, got {type(tools).__name__}"
        )
    if more is not None and not isinstance(more, Mapping):
        raise UserError(
            f"{where}, `chat_template_kwargs` must be a dict, got {type(more).__name__}"
        )
    own = next((name for name in _NOT_OF_ROWS if name in (more or {})), None)
    if own is not None:
        raise UserError(
            f"{where}, `chat_template_kwargs` holds {own!r}, which is set for every prompt: leave "
            "it out"
        )
    return ({"tools": list(tools)} if tools else {}) | dict(more or {})


def answer_text(reference: str | Messages | None) -> str | None:
    """The text of a reference that has not been tokenised; of messages, the last content."""
    if reference is None or isinstance(reference, str):
        return reference
    return reference[-1].get("content", "")


def is_hh_transcript(text: str) -> bool:
    """Whether a text looks like a transcript of Anthropic's HH data."""
    return text.lstrip().startswith(("Human:", "Assistant:"))


def parse_hh_transcript(text: str, where: str) -> tuple[Messages, str | None]:
    """Split "\\n\\nHuman: ...\\n\\nAssistant: ..." into prompt messages and the last answer.

    In a few transcripts of the published data (6 of the 1,700 we looked at) a speaker takes two
    turns in a row. These are joined, as paragraphs of one turn, since many chat templates require
    alternating roles. Blank turns are left out; a blank last answer is None.
    """
    before, *rest = _TURN.split("\n\n" + text.strip())
    roles = [_ROLES[name] for name in rest[0::2]]
    if before.strip() or "assistant" not in roles:
        raise UserError(
            f"{where} is not a transcript of '\\n\\nHuman:' and '\\n\\nAssistant:' turns"
        )
    end = len(roles) - roles[::-1].index("assistant")  # the last answer ends the transcript
    turns: Messages = []
    for position, (role, content) in enumerate(
        zip(roles[:end], map(str.strip, rest[1::2][:end]), strict=True)
    ):
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".rstrip()
        elif content or position == end - 1:
            turns.append({"role": role, "content": content})
    *prompt, answer = turns
    if not prompt:
        raise UserError(f"{where} has no Human turn before its last answer")
    return prompt, answer["content"] or None


def shared_prefix(chosen: str, rejected: str) -> str:
    """The common beginning of two texts, up to its last whole word, without trailing spaces."""
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    # Stop at white space: of answers "The" and "This", "Th" is not part of the prompt.
    while 0 < end < len(chosen) and not chosen[end - 1].isspace():
        end -= 1
    while end > 0 and chosen[end - 1] == " ":  # the space belongs to the answer's first token
        end -= 1
    return chosen[:end]
