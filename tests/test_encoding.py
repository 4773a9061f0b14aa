"""Tests of tokenising references: the tokens that a sample with the same text would have."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from datasets import Dataset
from tiny import character_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grao_fast.data.decoding import completion_texts
from grao_fast.data.encoding import Encoded, Limits, encode_examples
from grao_fast.data.examples import load_examples

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Takes reasoning from its own field or out of the content; the last turn always has a block of it.
QWEN3 = (
    "{% for m in messages %}{% set text = m.content or '' %}{% set why = m.reasoning_content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and (loop.last or why) %}<think>\n{{ why or '' }}\n</think>\n\n"
    "{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The generation prompt opens <think>; turns are rendered without the text before </think>.
OPENS_THINK = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
# The generation prompt opens <think>; a turn is a block of its reasoning field, then its content.
FIELD_ONLY = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
SHORT_BLOCK = FIELD_ONLY.replace("<think>\n{{ m.reasoning_content or '' }}\n", "<think>")
STRIPS_THINK = OPENS_THINK.replace("<think>\n", "")
TRIMS = CHATML.replace("m.content", "m.content.strip()")
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no\nsystem turn') }}{% endif %}"
) + CHATML
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def encode(
    rows: Any,
    tokenizer: Any,
    *,
    ends: tuple[str, ...] = (),
    trained: bool = True,
    **limits: int,
) -> list[Encoded]:
    return encode_examples(
        load_examples(rows),
        tokenizer,
        Limits(max_new_tokens=4, **limits),
        eos_token_ids=tokenizer.convert_tokens_to_ids(list(ends)),
        trained=trained,
    )


def written(encoded: Encoded, tokenizer: Any) -> str:
    return tokenizer.decode(encoded.reference_ids)


def chat(reference: Any, template: str, **options: Any) -> tuple[str, str | None]:
    """Return the text that is trained on, and the one that is scored, after one user turn."""
    tokenizer = character_tokenizer(*SPECIAL, chat_template=template)
    rows = [{"prompt": [user("hi")], "completion": reference}]
    (encoded,) = encode(rows, tokenizer, ends=("<|im_end|>",), **options)
    return written(encoded, tokenizer), encoded.reference_text


def sentencepiece(prepend: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes spaces as "\u2581", and adds one at the start of a text."""
    pieces = [
        "<unk>",
        "</s>",
        "<s>",
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz?<>\n",
        "ye",
        "yes",
        "\u2581yes",
    ]
    raw = Tokenizer(
        models.BPE(
            {piece: n for n, piece in enumerate(pieces)},
            [("y", "e"), ("ye", "s"), ("\u2581", "yes")],
            unk_token="<unk>",
        )
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme=prepend)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}<{{ m.role }}>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}",
    )


@pytest.mark.parametrize("prepend", ["first", "always"])
@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ([user("ok?")], ["yes", "</s>"]),
        ("ok?", ["yes", "</s>"]),
        ("ok? ", ["yes", "</s>"]),  # the prompt's tokens end in the space
        ("ok?\n", ["yes", "</s>"]),
    ],
)
def test_a_reference_gets_no_space_that_its_context_would_not_have(prepend, prompt, tokens):
    tokenizer = sentencepiece(prepend)
    (encoded,) = encode([{"prompt": prompt, "reference": "yes"}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.reference_ids) == tokens
    assert encoded.reference_text == "yes"


def test_a_space_before_the_reference_is_kept_and_scored():
    tokenizer = sentencepiece("first")
    (encoded,) = encode([{"prompt": "ok?", "reference": " yes"}], tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.reference_ids) == ["\u2581yes", "</s>"]
    assert encoded.reference_text == " yes"


@pytest.mark.parametrize("template", [CHATML, QWEN3, TRIMS, OPENS_THINK])
def test_prompt_and_reference_are_what_the_template_writes(template: str) -> None:
    tokenizer = character_tokenizer(*SPECIAL, chat_template=template)
    turns = [user("a"), assistant("b"), user("c"), assistant("d\n\ne")]
    (encoded,) = encode(
        [{"prompt": turns[:-1], "reference": "d\n\ne"}], tokenizer, ends=("<|im_end|>",)
    )
    whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    if template is OPENS_THINK:
        header, answer = whole.rsplit("assistant: ", 1)
        whole = f"{header}assistant: <think>\n{answer}"
    assert tokenizer.decode(encoded.prompt_ids + encoded.reference_ids) == whole


@pytest.mark.parametrize(
    ("template", "reference", "expected", "scored"),
    [
        (CHATML, "ok", "ok<|im_end|>", "ok"),
        (CHATML, "ok<|im_end|>", "ok<|im_end|>", "ok"),  # one end, not two
        (CHATML, "ok<eos>\n", "ok<|im_end|>", "ok"),
        (CHATML, " ok \n", " ok \n<|im_end|>", " ok \n"),
        (TRIMS, " ok \n", "ok<|im_end|>", "ok"),
        # a block of reasoning, as the template renders it, once
        (QWEN3, "ok", "<think>\n\n</think>\n\nok<|im_end|>", "<think>\n\n</think>\n\nok"),
        (QWEN3, "<think>a</think>b", "<think>\na\n</think>\n\nb<|im_end|>", None),
        (QWEN3, [assistant("b", reasoning_content="a")],
         "<think>\na\n</think>\n\nb<|im_end|>", None),
        (OPENS_THINK, "<think>\na\n</think>b", "a\n</think>b<|im_end|>", "a\n</think>b"),
        (OPENS_THINK, "<think>a</think>b", "a</think>b<|im_end|>", "a</think>b"),
        (OPENS_THINK, "b", "b<|im_end|>", "b"),
        (OPENS_THINK, [assistant("b", reasoning_content="a")],
         "a\n</think>\n\nb<|im_end|>", "a\n</think>\n\nb"),
        (OPENS_THINK, [assistant("<tool_call>"), user("b"), assistant("c")],
         "<tool_call><|im_end|>\nuser: b<|im_end|>\nassistant: c<|im_end|>", None),
        (SHORT_BLOCK, "b", "</think>\n\nb<|im_end|>", None),
        (FIELD_ONLY, "b", "\n</think>\n\nb<|im_end|>", None),
        (FIELD_ONLY, "<think>a</think>b", "a</think>b<|im_end|>", None),
        (FIELD_ONLY, [assistant("b", reasoning_content="a")], "a\n</think>\n\nb<|im_end|>", None),
        (STRIPS_THINK, "<think>a</think>b", "<think>a</think>b<|im_end|>", "<think>a</think>b"),
        # all turns of a completion
        (CHATML, [assistant("a"), user("b"), assistant("c")],
         "a<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>", None),
        (CHATML, [user("hi"), assistant("a")], "a<|im_end|>", "a"),  # with its prompt
        (CHATML, [{"role": "system", "content": "s"}, user("hi"), assistant("a")],
         "a<|im_end|>", "a"),
        (QWEN3,
         [assistant(None, tool_calls=[{"function": {"name": "f"}}]),
          {"role": "tool", "content": "1"}, assistant("c")],
         "<tool_call>f</tool_call><|im_end|>\n<|im_start|>tool\n1<|im_end|>\n"
         "<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>", None),
        # a turn ends in a line break only
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", "ok\n", "ok\n<eos>", "ok\n"),
    ],
)  # fmt: skip
def test_references_to_chats(template, reference, expected, scored) -> None:
    text = expected.removesuffix("<|im_end|>") if scored is None else scored
    assert chat(reference, template) == (expected, text)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [(" 4", " 4<|im_end|>"), ([assistant(" 4")], " 4<|im_end|>"),
     ([assistant(" 4"), user("b"), assistant("c")],
      " 4<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>")],
)  # fmt: skip
def test_a_prompt_that_ends_in_an_assistant_turn_is_continued(reference, expected) -> None:
    tokenizer = character_tokenizer(*SPECIAL, chat_template=CHATML)
    rows = [{"prompt": [user("2+2"), assistant("It is")], "reference": reference}]
    (encoded,) = encode(rows, tokenizer, ends=("<|im_end|>",))
    assert tokenizer.decode(encoded.prompt_ids).endswith("<|im_start|>assistant\nIt is")
    assert written(encoded, tokenizer) == expected


def test_an_end_of_turn_that_does_not_end_samples(caplog) -> None:
    """The samples of a base model continue to the EOS; neither token is part of the scored text."""
    tokenizer = character_tokenizer(*SPECIAL, chat_template=CHATML)
    (encoded,) = encode([{"prompt": [user("hi")], "reference": "ok"}], tokenizer)
    assert (written(encoded, tokenizer), encoded.reference_text) == ("ok<|im_end|><eos>", "ok")
    assert "ends a turn with <|im_end|>, which does not end samples of this model" in caplog.text


@pytest.mark.parametrize("reference", ["ok", "ok<eos>", "ok<eos>\n", "ok<eos><eos>"])
def test_a_reference_to_a_text_ends_once(reference: str) -> None:
    tokenizer = character_tokenizer()
    (encoded,) = encode([{"prompt": "hi ", "reference": reference}], tokenizer)
    assert (written(encoded, tokenizer), encoded.reference_text) == ("ok<eos>", "ok")


def test_a_prompt_that_holds_its_bos_gets_no_other() -> None:
    tokenizer = sentencepiece("first")
    plain, with_bos = encode(
        [{"prompt": prompt, "reference": "no"} for prompt in ("ok?", "<s>ok?")], tokenizer
    )
    assert plain.prompt_ids.count(2) == with_bos.prompt_ids.count(2) == 1
    assert plain.reference_ids == with_bos.reference_ids


def test_exceptions_are_reported_once_with_example_and_count(caplog) -> None:
    tokenizer = character_tokenizer(*SPECIAL, chat_template=OPENS_THINK)
    rows = [{"prompt": [user("a")], "reference": "b"}] * 3
    with caplog.at_level(logging.WARNING):
        encode([{"prompt": "text", "reference": "b"}, *rows], tokenizer, ends=("<|im_end|>",))
    assert [r.message.split(")")[0] for r in caplog.records] == [
        "for 3 of 4 examples (first: example 1"
    ]
    caplog.clear()
    encode(
        [{"prompt": f"ok?{' ' * n}", "reference": "yes"} for n in (0, 1)], sentencepiece("first")
    )
    assert "the last tokens of 1 of 2 prompts would merge with" in caplog.text
    assert "first: example 1" in caplog.text


def test_references_that_the_tokenizer_alters_are_counted(caplog) -> None:
    tokenizer = character_tokenizer()
    references = ["a b", "\u00fc", "a\u00fc", " b "]
    encoded = encode([{"prompt": "hi ", "reference": r} for r in references], tokenizer)
    assert [item.reference_text for item in encoded] == ["a b", "<unk>", "a<unk>", " b "]
    assert "cannot represent 2 of 4 references exactly (first: example 1)" in caplog.text


def test_references_with_an_end_inside_are_counted(caplog) -> None:
    tokenizer = character_tokenizer(*SPECIAL, chat_template=CHATML)
    references = ["a", "a<|im_end|>b", [assistant("a"), user("b"), assistant("c")]]
    rows = [{"prompt": [user("hi")], "reference": reference} for reference in references]
    encode(rows, tokenizer, ends=("<|im_end|>",))
    assert [record.message.split(")")[0] for record in caplog.records] == [
        "1 of 3 references contain an end-of-sequence token before their end (first: example 1"
    ]


def test_a_template_that_refuses_is_quoted_on_one_line() -> None:
    tokenizer = character_tokenizer(*SPECIAL, chat_template=NEEDS_SYSTEM)
    good = {"prompt": [{"role": "system", "content": "s"}, user("a")], "reference": "b"}
    assert encode([good], tokenizer)
    bad = {"prompt": [user("a")], "reference": "b"}
    with pytest.raises(ValueError, match=r"example 1 and 1 more of 4: the chat .*: no system t"):
        encode([good, bad, good, bad], tokenizer)
    with pytest.raises(ValueError, match=r"example 0 of 1: the chat template refuses .*TypeError"):
        encode([bad], character_tokenizer(chat_template="{{ messages[0].content + 1 }}"))


def test_a_template_that_wants_content_in_parts_is_refused() -> None:
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out assistant content that is given as text"):
        chat("b", parts)


def test_reasoning_needs_a_template() -> None:
    rows = [{"prompt": "a", "completion": [assistant("b", reasoning_content="c")]}]
    with pytest.raises(
        ValueError, match="row 0, `completion` has `reasoning_content`, which only a"
    ):
        load_examples(rows)
    rows = [{"prompt": "a", "completion": [assistant("b"), user("c"), assistant("d")]}]
    with pytest.raises(
        ValueError, match="row 0, `completion` has several turns, which only a chat"
    ):
        load_examples(rows)


def test_tokens_beyond_the_embedding_are_named() -> None:
    tokenizer = character_tokenizer("<new>")
    rows = [{"prompt": "a", "reference": "b"}, {"prompt": "a", "reference": "<new>b"}]
    size = len(tokenizer) - 1
    with pytest.raises(ValueError, match=rf"example 1 of 2: token {size}, '<new>', .*{size} rows"):
        encode(rows, tokenizer, embedding_rows=size)
    assert encode(rows, tokenizer, embedding_rows=size + 1)
    assert encode(rows, tokenizer, embedding_rows=size, trained=False)
    rows[0]["prompt"] = "<new>"
    with pytest.raises(ValueError, match="example 0 of 2: token"):
        encode(rows, tokenizer, embedding_rows=size, trained=False)


# ---- what is scored


def test_a_cut_reference_is_scored_as_it_was_cut() -> None:
    tokenizer = character_tokenizer()
    rows = [{"prompt": "hi ", "reference": "a good one"}]
    (cut,) = encode(rows, tokenizer, max_reference_length=3)
    assert (written(cut, tokenizer), cut.scored.reference) == ("a g", "a g")
    (whole,) = encode(rows, tokenizer, max_reference_length=3, trained=False)
    assert whole.scored.reference == "a good one"
    assert whole.example.reference == "a good one" and whole.scored.prompt == "hi "


def test_completions_keep_special_tokens_but_those_at_their_end() -> None:
    tokenizer = character_tokenizer("<think>")
    think = tokenizer.convert_tokens_to_ids("<think>")
    a, blank = tokenizer.convert_tokens_to_ids(["a", " "])
    tokenizer.clean_up_tokenization_spaces = True
    dot = tokenizer.convert_tokens_to_ids(".")
    completions = [[think, a, blank, dot, 1], [a, think], [1], [], [a, 1, a]]
    texts = completion_texts(tokenizer, [[a]] * 5, completions, {1})
    assert texts == ["<think>a .", "a<think>", "", "", "a<eos>a"]


def test_a_completion_keeps_the_space_that_sentencepiece_drops() -> None:
    tokenizer = sentencepiece("first")
    prompt = tokenizer("ok?", add_special_tokens=False)["input_ids"]
    spaced, bare = tokenizer.convert_tokens_to_ids(["\u2581yes", "yes"])
    assert completion_texts(tokenizer, [prompt] * 2, [[spaced], [bare, 1]], {1}) == [" yes", "yes"]


def test_characters_that_are_bytes_are_scored_whole() -> None:
    pieces = ["</s>", "\u2581", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [], byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    prompts = ["\U0001f600\r\n", "\U0001f600", "a\n", "\u00e9 "]
    references = ["\u00e9", " \u00e9a", "\r\na", "\U0001f600\U0001f600"]
    rows = [{"prompt": p, "reference": r} for p in prompts for r in references]
    said = [item.reference_text for item in encode(rows, tokenizer)]
    assert said == [row["reference"] for row in rows]


TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"zone": {"x": 1}}}},
]
WITH_TOOLS = (
    "{% for t in tools or [] %}[{{ t.function | tojson }}]{% endfor %}" + CHATML
    + "{% if add_generation_prompt and thinks %}<think>\n{% endif %}"
)  # fmt: skip


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_row_gives_the_template_its_tools_and_arguments(as_dataset: bool) -> None:
    tokenizer = character_tokenizer(*SPECIAL, *'[]{}"', chat_template=WITH_TOOLS)
    rows: list[dict[str, Any]] = [
        {
            "prompt": [user("hi")],
            "reference": "yo",
            "tools": TOOLS[:1],
            "chat_template_kwargs": {},
        },
        {"prompt": [user("hi")], "reference": "yo", "chat_template_kwargs": {"thinks": True}},
        {"prompt": [user("hi")], "reference": "yo", "tools": TOOLS[1:]},
        {"prompt": [user("hi")], "reference": "yo", "tools": []},
    ]
    given = Dataset.from_list(rows) if as_dataset else rows
    encoded = encode(given, tokenizer, ends=("<|im_end|>",))
    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(each.prompt_ids) for each in encoded] == [
        f"[{json.dumps(TOOLS[0]['function'])}]{turn}",
        f"{turn}<think>\n",
        f"[{json.dumps(TOOLS[1]['function'])}]{turn}",
        turn,
    ]
    assert [written(each, tokenizer) for each in encoded] == ["yo<|im_end|>"] * 4
    assert encoded[0].example.columns["tools"] == TOOLS[:1]  # for rewards too
    rows[0]["tools"] = json.dumps(TOOLS[:1])
    assert encode(rows[:1], tokenizer)[0].prompt_ids == encoded[0].prompt_ids


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": "[{"}, "row 0, `tools` is text, but not JSON: JSONDecodeError: "),
        ({"tools": ["add"]}, "row 0, `tools` must be a list of JSON schemas, got list"),
        ({"tools": {}}, "row 0, `tools` must be a list of JSON schemas, got dict"),
        ({"chat_template_kwargs": "x"}, "`chat_template_kwargs` must be a dict, got str"),
        ({"chat_template_kwargs": {"tokenize": True}}, "holds 'tokenize', which is set for every"),
    ],
)
def test_a_template_argument_of_the_wrong_kind_is_named(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples([{"prompt": [user("hi")], **columns}])
    assert load_examples([{"prompt": "hi", **columns}])  # no template writes them


def test_content_may_be_a_list_of_text_parts() -> None:
    def parts(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text} for text in texts]

    row = {
        "prompt": [{"role": "user", "content": parts("a ", "b")}],
        "completion": [{"role": "assistant", "content": parts("c")}],
    }
    other = {"prompt": [{"role": "user", "content": "d"}], "completion": [assistant("e")]}
    for given in ([row], Dataset.from_list([row])):
        (example,) = load_examples(given)
        assert (example.prompt, example.reference) == ([user("a b")], "c")
    assert load_examples([row, other])[1].prompt == [user("d")]
    row["prompt"][0]["content"].append({"type": "image", "url": "x"})
    with pytest.raises(ValueError, match=r"row 0, `prompt`, message 0: part 2 .* is image, and"):
        load_examples([row])
