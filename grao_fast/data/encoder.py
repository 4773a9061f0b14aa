"""Tokenises prompts and references: texts or messages in, token ids out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from grao_fast.data.chat import Chat, TemplateRefusal, without_blanks
from grao_fast.data.decoding import completion_texts, ending_ids
from grao_fast.data.fields import Messages
from grao_fast.system.errors import UserError, first_of
from grao_fast.system.visible import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

_BATCH = 1024  # examples tokenised in one call
# To tokenise a text as it stands inside a longer text, it is put behind one of these: at the start
# of a text, SentencePiece would add a space.
_ANCHORS = ("\n", "a")

# Reasons for which a reference does not simply follow the rendered prompt, as warnings.
_REASONS = {
    "no prefix": "for %d of %d examples (first: example %d), the chat template renders prompt and "
    "reference together with another beginning than the prompt alone: the text of the reference is "
    "appended to the prompt",
    "in part": "the chat template omits some of the text of %d of %d references, or opens a tag "
    "that the prompt has opened (first: example %d): a reference of one turn is appended to the "
    "prompt as it is, a longer one as the template renders it",
    "early end": "%d of %d references contain an end-of-sequence token before their end (first: "
    "example %d): a sample would have ended there",
    "altered": "the tokenizer cannot represent %d of %d references exactly (first: example %d): "
    "rewards see their decoded tokens",
    "merged": "the last tokens of %d of %d prompts would merge with the reference (first: example "
    "%d): the reference is tokenised separately",
}


class TokenIds(NamedTuple):
    """Token ids of a prompt and its reference, and the reference's text as its tokens decode.

    The last two are empty if the example has no reference.
    """

    prompt: list[int]
    reference: list[int]
    text: str


class Encoder:
    """Tokenises the prompts and references of a dataset, in one or more calls of `encode`.

    Prompt and reference are tokenised together, and the reference gets what follows the prompt's
    tokens: the tokens that a sample with the same text would have. If appending the reference
    changes the prompt's last tokens, the reference is tokenised separately, as text that continues
    another. It ends in one end-of-sequence token: its own, the chat template's, or the tokenizer's.

    Args:
        eos_token_ids: all tokens that end a completion of the model.
        max_reference_length: the number of tokens that references are cut to; None: not cut.
        answer: what references are called in warnings.
        continues: True if a reference continues an assistant's turn that ends the prompt.
        template_options: further arguments for the tokenizer's `apply_chat_template`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int] = (),
        *,
        max_reference_length: int | None = None,
        answer: str = "reference",
        continues: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token: set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.end_ids = {*eos_token_ids, cast(int, tokenizer.eos_token_id)}
        self.max_reference_length, self.answer = max_reference_length, answer
        ends = tokenizer.convert_ids_to_tokens(sorted(self.end_ids))
        self.end_texts = tuple(end for end in ends if end)
        self.ending_ids = ending_ids(tokenizer, eos_token_ids)
        self.chat = Chat(tokenizer, self.end_texts, continues=continues, options=template_options)
        self._count = 0  # examples so far
        self._refusals: list[tuple[int, str]] = []  # example, reason
        self._exceptions: dict[str, list[int]] = {reason: [] for reason in _REASONS}  # examples
        self._reported: set[str] = set()
        # tokens that end a turn of the chat template and no completion; empty without messages
        self._ends_of_turns: list[int] = []

    def encode(
        self,
        prompts: Sequence[str | Messages],
        references: Sequence[str | Messages | None],
        *,
        numbers: Sequence[int] | None = None,
        options: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[TokenIds]:
        """Tokenise examples. Raises UserError for messages without a chat template.

        numbers: of the examples, in errors and warnings; None: they are counted over all calls.
        options: further arguments of each example for `apply_chat_template`.
        """
        options = [{}] * len(prompts) if options is None else options
        if numbers is None:
            numbers = range(self._count, self._count + len(prompts))
        encoded: list[TokenIds] = []
        for start in range(0, len(prompts), _BATCH):
            part = slice(start, start + _BATCH)
            encoded += self._encode_batch(
                prompts[part], references[part], numbers[part], options[part]
            )
        return encoded

    def check(
        self,
        number: int,
        prompt: str | Messages,
        reference: str | Messages | None,
        options: Mapping[str, Any],
    ) -> None:
        """Render an example without tokenising it; `raise_refusals` raises if it was refused."""
        self._render(number, prompt, reference, options)
        self._count += 1

    def report(self) -> None:
        """Raise UserError for refused examples, and log each kind of warning once."""
        self.raise_refusals()
        if self._ends_of_turns and "turns" not in self._reported:
            self._reported.add("turns")
            logger.warning(
                "the chat template ends a turn with %s, which does not end samples of this model; "
                "an EOS is added to references. If the model does stop there, add that token to "
                "eos_token_id in its generation_config",
                " ".join(self.ends_of_turns),
            )
        for reason, examples in self._exceptions.items():
            if examples and reason not in self._reported:
                self._reported.add(reason)
                text = _REASONS[reason].replace("reference", self.answer)
                logger.warning(text, len(examples), self._count, examples[0])
            examples.clear()  # said once, however many more are drawn

    @property
    def refusals(self) -> dict[int, str]:
        """The examples that the chat template has refused, with its reasons."""
        return dict(self._refusals)

    @property
    def exceptions(self) -> dict[str, list[int]]:
        """The other examples whose reference does not simply follow the prompt, by the reason."""
        return {reason: list(examples) for reason, examples in self._exceptions.items()}

    @property
    def ends_of_turns(self) -> list[str]:
        """Tokens with which the chat template ends a turn, and that end no sample."""
        return self.tokenizer.convert_ids_to_tokens(self._ends_of_turns)

    def raise_refusals(self) -> None:
        """Raise UserError if the chat template has refused examples."""
        if self._refusals:
            refused, reason = [index for index, _ in self._refusals], self._refusals[0][1]
            raise UserError(
                f"example {first_of(refused)} of {self._count}: the chat template "
                f"refuses the prompt or its answer: {reason}; give it the turns that it asks for, "
                "or set another chat template"
            )

    def _encode_batch(
        self,
        prompts: Sequence[str | Messages],
        references: Sequence[str | Messages | None],
        numbers: Sequence[int],
        options: Sequence[Mapping[str, Any]],
    ) -> list[TokenIds]:
        self._count += len(prompts)
        each = zip(numbers, prompts, references, options, strict=True)
        rendered = [self._render(*example) for example in each]
        texts = [text for text, _ in rendered]
        answers = {n: answer for n, (_, answer) in enumerate(rendered) if answer is not None}
        plain = [isinstance(prompt, str) for prompt in prompts]
        prompt_ids = self._prompt_ids(texts, plain)
        reference_ids: list[list[int]] = [[] for _ in prompts]
        behind, merged = self._reference_ids(texts, plain, answers, prompt_ids)
        self._exceptions["merged"] += [numbers[n] for n in merged]
        for n, ids in behind.items():
            reference_ids[n] = ids = self._ended(ids)[: self.max_reference_length]
            if _is_one_turn(references[n]) and not self.end_ids.isdisjoint(ids[:-1]):
                self._exceptions["early end"].append(numbers[n])
        decoded = completion_texts(self.tokenizer, prompt_ids, reference_ids, self.ending_ids)
        for n, answer in answers.items():
            # a reference that was cut may end inside a character
            read = without_blanks(decoded[n]).rstrip("\ufffd")
            if not without_blanks(answer).startswith(read):
                self._exceptions["altered"].append(numbers[n])
        return list(map(TokenIds, prompt_ids, reference_ids, decoded))

    def _prompt_ids(self, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
        """Ids of prompts, without an EOS that the tokenizer appends to every text."""
        prompt_ids = self._tokenize(texts, plain)
        for ids, text, is_plain in zip(prompt_ids, texts, plain, strict=True):
            closed = is_plain and ids[-1:] == [self.tokenizer.eos_token_id]
            if closed and not text.endswith(str(self.tokenizer.eos_token)):
                ids.pop()
        return prompt_ids

    def _reference_ids(
        self,
        texts: Sequence[str],
        plain: Sequence[bool],
        answers: Mapping[int, str],
        prompt_ids: Sequence[list[int]],
    ) -> tuple[dict[int, list[int]], list[int]]:
        """Ids of the answers, by the position of their prompt in the batch; and those merged."""
        whole_ids = self._tokenize(
            [texts[n] + answer for n, answer in answers.items()], [plain[n] for n in answers]
        )
        reference_ids = {
            n: whole[len(prompt_ids[n]) :]
            for n, whole in zip(answers, whole_ids, strict=True)
            if whole[: len(prompt_ids[n])] == prompt_ids[n]
        }
        merged = [n for n in answers if n not in reference_ids]
        separate = self._encode_inside([answers[n] for n in merged])
        reference_ids |= dict(zip(merged, separate, strict=True))
        return {n: reference_ids[n] for n in answers}, merged

    def _render(
        self,
        index: int,
        prompt: str | Messages,
        reference: str | Messages | None,
        options: Mapping[str, Any],
    ) -> tuple[str, str | None]:
        """Return an example's prompt as text, and the text its reference adds; None without one."""
        if isinstance(prompt, str):
            assert reference is None or isinstance(reference, str)
            if reference is not None and reference.rstrip().endswith(self.end_texts):
                reference = reference.rstrip()
            return prompt, reference
        chat = self.chat.with_options(options)
        if self.tokenizer.chat_template is None and chat.options.get("chat_template") is None:
            raise UserError(
                f"example {index}: the prompt is a list of messages, and the tokenizer has no chat "
                "template: set tokenizer.chat_template, or give the prompts as text"
            )
        self._ends_of_turns = sorted(self.ending_ids - self.end_ids)
        try:
            text = chat.prompt(prompt)
            if reference is None:
                return text, None
            answer, written = chat.answer(prompt, text, reference)
        except TemplateRefusal as error:
            self._refusals.append((index, str(error)))
            return "", None
        if written != "rendered":
            self._exceptions[written].append(index)
        return text, answer

    def _tokenize(self, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
        """Ids of texts; plain ones, which no template wrote, get the tokenizer's BOS, once."""
        ids: list[list[int]] = [[] for _ in texts]
        for special in (True, False):
            chosen = [n for n, is_plain in enumerate(plain) if is_plain == special]
            encoded = self._call([texts[n] for n in chosen], add_special_tokens=special)
            for n, text_ids in zip(chosen, encoded, strict=True):
                twice = special and text_ids[:2] == [self.tokenizer.bos_token_id] * 2
                ids[n] = text_ids[1:] if twice else text_ids
        return ids

    def _encode_inside(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as they are inside a longer text, not at its start."""
        ids: list[list[int] | None] = [None] * len(texts)
        for anchor in (*_ANCHORS, ""):
            left = [n for n, found in enumerate(ids) if found is None]
            (before,) = self._call([anchor], add_special_tokens=False)
            whole_ids = self._call([anchor + texts[n] for n in left], add_special_tokens=False)
            for n, whole in zip(left, whole_ids, strict=True):
                if whole[: len(before)] == before:
                    ids[n] = whole[len(before) :]
        return [found or [] for found in ids]

    def _ended(self, ids: list[int]) -> list[int]:
        """Return ids with exactly one end-of-sequence token at the end."""
        if not ids or ids[-1] not in self.end_ids:
            return [*ids, self.tokenizer.eos_token_id]
        while len(ids) > 1 and ids[-2] in self.end_ids:
            ids = [*ids[:-2], ids[-1]]
        return ids

    def _call(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: encode_examples raises an error for long texts, which names the example
        return self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]


def _is_one_turn(reference: str | Messages | None) -> bool:
    return isinstance(reference, str) or (reference is not None and len(reference) == 1)
