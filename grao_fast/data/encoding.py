"""From prompts and references to token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from grao_fast.data.chat import Chat, TemplateRefusal
from grao_fast.data.decoding import completion_texts, ending_ids
from grao_fast.data.fields import Messages
from grao_fast.system.errors import UserError
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_BATCH = 1024
# Texts behind which a text keeps its own tokens, unlike at the beginning of a text, where a
# SentencePiece tokenizer puts a space before it.
_ANCHORS = ("\n", "a")

_REASONS = {
    "no prefix": "%d of %d prompts are not how the chat template begins prompt and reference "
    "together (example %d is the first): there the reference follows the prompt as it is",
    "in part": "the chat template leaves out a part of %d of %d references, or opens again what "
    "the prompt has opened (example %d is the first): one turn of text follows the prompt as it "
    "is, more than that as the template has it",
    "early end": "%d of %d references hold an end-of-sequence token before their end (example %d "
    "is the first): a sample would have ended there",
    "altered": "the tokenizer cannot write %d of %d references as they are (example %d is the "
    "first): they are scored as their tokens read",
    "merged": "the last tokens of %d of %d prompts would be others with the reference behind them "
    "(example %d is the first): there the reference is encoded by itself",
}


class TokenIds(NamedTuple):
    """Of a prompt and its reference, and what the latter's say; empty where it is absent."""

    prompt: list[int]
    reference: list[int]
    text: str


class Encoder:
    """Encodes prompts and references of a dataset, in as many calls as it takes.

    A reference's tokens are those of the prompt and the reference together, less the prompt's: what
    a sample would have to be to say the same. Where the prompt's tokens change when the reference
    follows, the reference is encoded by itself, as it stands inside a text. It ends in one
    end-of-sequence token: the one that it or the chat template writes, or else the tokenizer's.

    Args:
        eos_token_ids: all tokens that end a completion of the model.
        max_reference_length: references are cut to so many tokens; None: never.
        continues: whether a prompt that ends in an assistant's turn is continued.
        template_options: for the tokenizer's `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int] = (),
        *,
        max_reference_length: int | None = None,
        continues: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.end_ids = {*eos_token_ids, cast(int, tokenizer.eos_token_id)}
        self.max_reference_length = max_reference_length
        ends = tokenizer.convert_ids_to_tokens(sorted(self.end_ids))
        self.end_texts = tuple(end for end in ends if end)
        self.ending_ids = ending_ids(tokenizer, eos_token_ids)
        self.chat = Chat(tokenizer, self.end_texts, continues=continues, options=template_options)
        self._rows = 0
        self._refusals: list[tuple[int, str]] = []
        # Rows whose reference is not what the template or the tokenizer makes of both, by reason.
        self._apart: dict[str, list[int]] = {reason: [] for reason in _REASONS}
        self._said: set[str] = set()
        self._ends_of_turns: list[int] = []  # that end no completion; where there are chats

    def encode(
        self,
        prompts: Sequence[str | Messages],
        references: Sequence[str | Messages | None],
    ) -> list[TokenIds]:
        """Token ids of every row. Raises ValueError of messages without a chat template."""
        encoded: list[TokenIds] = []
        for start in range(0, len(prompts), _BATCH):
            encoded += self._encode_batch(
                prompts[start : start + _BATCH], references[start : start + _BATCH]
            )
        return encoded

    def check(
        self, prompts: Sequence[str | Messages], references: Sequence[str | Messages | None]
    ) -> None:
        """Raise ValueError where a template is missing, or refuses rows; nothing is encoded."""
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
            self._texts(row, prompt, reference)
        self._rows = len(prompts)
        self._raise_refusals()

    def report(self) -> None:
        """Refuse what the chat template refused, and say once what is not as it is rendered."""
        self._raise_refusals()
        if self._ends_of_turns and "turns" not in self._said:
            self._said.add("turns")
            logger.warning(
                "the chat template ends a turn with %s, at which samples of this model do not "
                "stop; references have the EOS behind it. Where the model does end turns so, add "
                "it to eos_token_id of its generation_config",
                " ".join(self.tokenizer.convert_ids_to_tokens(self._ends_of_turns)),
            )
        for reason, rows in self._apart.items():
            if rows and reason not in self._said:
                self._said.add(reason)
                logger.warning(_REASONS[reason], len(rows), self._rows, rows[0])

    def _raise_refusals(self) -> None:
        if self._refusals:
            row, words = self._refusals[0]
            more = f" (and {len(self._refusals) - 1} more of {self._rows})"
            raise UserError(
                f"example {row}{more if len(self._refusals) > 1 else ''}: the chat template "
                f"refuses the prompt or its answer: {words}; give it the turns that it asks for, "
                "or another chat template"
            )

    def _encode_batch(
        self,
        prompts: Sequence[str | Messages],
        references: Sequence[str | Messages | None],
    ) -> list[TokenIds]:
        first = self._rows
        self._rows += len(prompts)
        texts, answers = [], []
        for row, (prompt, reference) in enumerate(zip(prompts, references, strict=True), first):
            text, answer = self._texts(row, prompt, reference)
            texts.append(text)
            answers.append(answer)
        plain = [isinstance(prompt, str) for prompt in prompts]
        prompt_ids = self._tokenize(texts, plain)
        for ids, text, is_plain in zip(prompt_ids, texts, plain, strict=True):
            # Some tokenizers close every text with an EOS; nothing could follow such a prompt.
            closed = is_plain and ids[-1:] == [self.tokenizer.eos_token_id]
            if closed and not text.endswith(str(self.tokenizer.eos_token)):
                ids.pop()
        present = [n for n, answer in enumerate(answers) if answer is not None]
        whole_ids = self._tokenize(
            [texts[n] + str(answers[n]) for n in present], [plain[n] for n in present]
        )
        reference_ids: list[list[int]] = [[] for _ in prompts]
        merged = []
        for n, whole in zip(present, whole_ids, strict=True):
            length = len(prompt_ids[n])
            if whole[:length] == prompt_ids[n]:
                reference_ids[n] = whole[length:]
            else:
                merged.append(n)
        apart = self._encode_inside([str(answers[n]) for n in merged])
        for n, ids in zip(merged, apart, strict=True):
            reference_ids[n] = ids
        self._apart["merged"] += [first + n for n in merged]
        for n in present:
            ids = self._ended(reference_ids[n])[: self.max_reference_length]
            if _is_one_turn(references[n]) and not self.end_ids.isdisjoint(ids[:-1]):
                self._apart["early end"].append(first + n)
            reference_ids[n] = ids
        said = completion_texts(self.tokenizer, prompt_ids, reference_ids, self.ending_ids)
        for n in present:
            # a reference that was cut may end within a character
            if not "".join(str(answers[n]).split()).startswith(
                "".join(said[n].split()).rstrip("\ufffd")
            ):
                self._apart["altered"].append(first + n)
        return list(map(TokenIds, prompt_ids, reference_ids, said))

    def _texts(
        self, row: int, prompt: str | Messages, reference: str | Messages | None
    ) -> tuple[str, str | None]:
        """The prompt as text, and what the reference adds to it; None where it is absent."""
        if isinstance(prompt, str):
            assert reference is None or isinstance(reference, str)
            if reference is not None and reference.rstrip().endswith(self.end_texts):
                reference = reference.rstrip()
            return prompt, reference
        if self.tokenizer.chat_template is None and self.chat.options.get("chat_template") is None:
            raise UserError(
                f"example {row}: the prompt is a list of messages, and the tokenizer has no chat "
                "template: set tokenizer.chat_template, or give the prompts as text"
            )
        self._ends_of_turns = sorted(self.ending_ids - self.end_ids)
        try:
            text = self.chat.prompt(prompt)
            if reference is None:
                return text, None
            answer, written = self.chat.answer(prompt, text, reference)
        except TemplateRefusal as error:
            self._refusals.append((row, str(error)))
            return "", None
        if written != "rendered":
            self._apart[written].append(row)
        return text, answer

    def _tokenize(self, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
        """Ids of texts; those that no template wrote get the tokenizer's own BOS, once."""
        ids: list[list[int]] = [[] for _ in texts]
        for special in (True, False):
            chosen = [n for n, is_plain in enumerate(plain) if is_plain == special]
            encoded = self._call([texts[n] for n in chosen], add_special_tokens=special)
            for n, row in zip(chosen, encoded, strict=True):
                if special and row[:2] == [self.tokenizer.bos_token_id] * 2:
                    row = row[1:]
                ids[n] = row
        return ids

    def _encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are inside a text, not at its beginning."""
        ids: list[list[int] | None] = [None] * len(texts)
        for anchor in (*_ANCHORS, ""):
            left = [n for n, row in enumerate(ids) if row is None]
            (before,) = self._call([anchor], add_special_tokens=False)
            whole_ids = self._call([anchor + texts[n] for n in left], add_special_tokens=False)
            for n, whole in zip(left, whole_ids, strict=True):
                if whole[: len(before)] == before:
                    ids[n] = whole[len(before) :]
        return [row or [] for row in ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """With one end-of-sequence token at the end."""
        if not ids or ids[-1] not in self.end_ids:
            return [*ids, self.tokenizer.eos_token_id]
        while len(ids) > 1 and ids[-2] in self.end_ids:
            ids = [*ids[:-2], ids[-1]]
        return ids

    def _call(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the tokenizer's own warning about length names no row; ours is an error.
        return self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]


def _is_one_turn(reference: str | Messages | None) -> bool:
    return isinstance(reference, str) or (reference is not None and len(reference) == 1)
