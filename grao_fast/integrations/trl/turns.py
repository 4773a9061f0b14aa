"""Encodes references as TRL builds samples: what the model says, and what tools answer, in turns.

A sample under tools is the model's turn, the tokens of the tools' results, the model's next turn,
and so on. A reference that is a list of messages becomes the same: each of the assistant's turns is
encoded behind all that comes before it, and the results between them are TRL's own rendering. Their
tokens are read, and not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from grao_fast.data.encoder import Encoder, TokenIds
from grao_fast.data.encoding import check_tokens
from grao_fast.data.fields import Messages
from grao_fast.system.errors import UserError, explained

Tools = list[Callable]


class Turns(NamedTuple):
    """One reference; all are empty if it is absent.

    learned: of each token, 1 if it is the assistant's, 0 if it belongs to a tool's result.
    completion: in the form in which TRL calls rewards.
    """

    token_ids: list[int]
    learned: list[int]
    completion: Any


class TurnEncoder:
    """Encodes references behind their prompts, each with an end-of-sequence token.

    Args:
        embedding_rows: the number of tokens that the model embeds.
        suffix_ids: the tokens that TRL puts behind a turn for these results of tools, up to the
            header of the next turn.
        parse: the message that TRL makes of a turn's token ids, behind the given ids and with the
            given tools.
    """

    def __init__(
        self,
        encoder: Encoder,
        embedding_rows: int,
        suffix_ids: Callable[[Messages], list[int]],
        parse: Callable[[list[int], list[int], Tools], dict[str, Any]],
    ) -> None:
        self.encoder, self.embedding_rows = encoder, embedding_rows
        self.suffix_ids, self.parse = suffix_ids, parse

    def encode(
        self,
        prompts: Sequence[str | Messages],
        references: Sequence[str | Messages | None],
        tools: Sequence[Tools],
    ) -> list[Turns]:
        """Encode references; `tools` are those of each prompt.

        Raises:
            UserError: the chat template cannot render a reference, turns other than tools' results
                stand between the assistant's, or the model does not embed a token.
        """
        spoken = [_spoken(reference) for reference in references]
        contexts, turns, options = [], [], []
        for prompt, reference, places, own in zip(prompts, references, spoken, tools, strict=True):
            for place in places:
                alone = not isinstance(reference, list)
                contexts.append(prompt if alone else [*prompt, *reference[:place]])
                turns.append(reference if alone else [reference[place]])
                options.append({"tools": own} if own else {})
        encoded = self.encoder.encode(contexts, turns, options=options)
        self.encoder.report()
        check_tokens(encoded, self.encoder.tokenizer, self.embedding_rows, references=True)
        each = iter(encoded)
        return [
            self._joined(prompt, reference, [next(each) for _ in places], own)
            for prompt, reference, places, own in zip(
                prompts, references, spoken, tools, strict=True
            )
        ]

    def _joined(
        self,
        prompt: str | Messages,
        reference: str | Messages | None,
        turns: list[TokenIds],
        tools: Tools,
    ) -> Turns:
        first = turns[0]
        if not first.reference:
            return Turns([], [], None)
        if isinstance(prompt, str):
            text = self.encoder.tokenizer.decode(first.reference, skip_special_tokens=True)
            return Turns(first.reference, [1] * len(first.reference), text)
        results = _results(reference) if isinstance(reference, list) else []
        ids: list[int] = []
        learned: list[int] = []
        said: list[dict[str, Any]] = []
        for n, turn in enumerate(turns):
            said.append(self.parse(turn.reference, first.prompt + ids, tools))
            ids += turn.reference
            learned += [1] * len(turn.reference)
            if n < len(results):
                with explained("the chat template cannot render a tool's result", ValueError):
                    suffix = self.suffix_ids(results[n])
                ids += suffix
                learned += [0] * len(suffix)
                said += results[n]
        return Turns(ids, learned, said)


def check_turns(reference: str | Messages | None, where: str) -> None:
    """Raise UserError for a reference whose turns cannot be told apart. where: its name."""
    _spoken(reference, where)
    if isinstance(reference, list):
        _results(reference, where)


def _spoken(reference: str | Messages | None, where: str = "a reference") -> list[int]:
    """The places of the assistant's turns; UserError if there is more than tools' results beside.

    One place, 0, for a reference that is text or absent.
    """
    if not isinstance(reference, list):
        return [0]
    roles = [turn["role"] for turn in reference]
    places = [n for n, role in enumerate(roles) if role == "assistant"]
    between = [roles[a + 1 : b] for a, b in pairwise(places)]
    if places[0] != 0 or not all(each and {*each} == {"tool"} for each in between):
        raise UserError(
            f"{where} has turns of {', '.join(roles)}: it must begin with the assistant's turn "
            "and have tools' results, and nothing else, between two of them; what comes before "
            "the turns to be learned belongs into `prompt`"
        )
    return places


def _results(reference: Messages, where: str = "a reference") -> list[Messages]:
    """The tools' results behind each of the assistant's turns but the last, with their names."""
    found: list[Messages] = []
    for turn in reference[:-1]:
        if turn["role"] == "assistant":
            names = [_name(call) for call in turn.get("tool_calls") or []]
            found.append([])
            continue
        called = names[len(found[-1])] if len(found[-1]) < len(names) else None
        name = turn.get("name") or called
        if name is None:
            raise UserError(
                f"{where} has a tool's result, {turn['content']!r}, without `name`, and its turn "
                "has no call for it: give the tool's name"
            )
        found[-1].append({"role": "tool", "name": name, "content": turn["content"]})
    return found


def _name(call: Mapping[str, Any]) -> str | None:
    return (call.get("function") or call).get("name")
