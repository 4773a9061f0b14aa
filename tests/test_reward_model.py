"""Tests of reward models: their scores, what they refuse, and where they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from tiny import CHAT_TEMPLATE, character_tokenizer, save_tiny_classifier, sums

import grao_fast
from grao_fast.config import GRAOConfig
from grao_fast.data.examples import Example
from grao_fast.models.sharding import sharded_modules
from grao_fast.rewards import Length, RewardError, RewardModel, batches, resolve_reward
from grao_fast.system.errors import UserError

TEXTS = ["a", "bc", "some longer text", "b" * 90, "bc", "x" * 40]
SHORT = GRAOConfig(
    num_generations=4, max_new_tokens=8, prompts_per_step=3, max_steps=2, learning_rate=1e-3,
    temperature=1.0, save_steps=0, log_completions_steps=0, disable_tqdm=True, device="cpu",
    max_tokens_per_microbatch=300,
)  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_classifier(tmp_path_factory.mktemp("rewards") / "scorer")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "labelled"
    return save_tiny_classifier(folder, labels=("bad", "so-so", "good"))


def alone(folder: Path, text: str, **options: Any) -> torch.Tensor:
    """The logits of one text, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", **options)
    with torch.no_grad():
        return model(ids["input_ids"]).logits[0]


# ---- scores


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 16384])
def test_batched_scores_are_those_of_texts_alone(classifier: Path, tokens_per_batch: int) -> None:
    model = RewardModel(classifier, tokens_per_batch=tokens_per_batch)
    scores = model(["p "] * len(TEXTS), TEXTS)
    expected = [float(alone(classifier, f"p {text}")[0]) for text in TEXTS]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores[1] == scores[4]  # equal, not only close: else a dead group would not be dead
    assert len(set(scores)) == 5


def test_a_padding_token_at_the_end_of_a_text_is_read_as_alone(tmp_path: Path) -> None:
    """Where the padding token ends texts too, the score is read before it, with padding or not."""
    folder = save_tiny_classifier(tmp_path / "padded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    texts = ["a<eos>", "abc<eos>", "a long text"]
    scores = RewardModel(folder)(["p"] * 3, texts)
    assert scores == pytest.approx(
        [float(alone(folder, "p" + each)[0]) for each in texts], abs=1e-5
    )


def test_batches_are_of_similar_lengths_within_the_budget() -> None:
    texts = [batches.Ids((0,) * n) for n in (3, 50, 4, 9, 10, 3)]
    lengths = [[len(text.tokens) for text in batch] for batch in batches.batches(texts, 20)]
    assert lengths == [[50], [10, 9], [4, 3, 3]]
    texts = [batches.Ids((0,) * n) for n in (5, 20, 74, 80, 100)]
    lengths = [[len(text.tokens) for text in batch] for batch in batches.batches(texts, 1000)]
    assert lengths == [[100, 80], [74], [20, 5]]


def test_a_label_is_chosen_by_number_or_name(labelled: Path) -> None:
    logits = alone(labelled, "pa")
    by_name = RewardModel(labelled, label="good")
    assert by_name(["p"], ["a"]) == pytest.approx([float(logits.softmax(0)[2])], abs=1e-6)
    assert RewardModel(labelled, label=2)(["p"], ["a"]) == by_name(["p"], ["a"])
    logit = RewardModel(labelled, label=0, output="logit")
    assert logit(["p"], ["a"]) == pytest.approx([float(logits[0])], abs=1e-6)


def test_a_single_label_as_a_probability(classifier: Path) -> None:
    probability = RewardModel(classifier, output="probability")(["p"], ["a"])
    assert probability == pytest.approx([float(alone(classifier, "pa")[0].sigmoid())], abs=1e-6)


# ---- how prompt and completion are joined


def test_conversations_are_rendered_by_the_template(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    expected = alone(classifier, "user: hi\nassistant: yes\n").tolist()
    for template in (CHAT_TEMPLATE, tmp_path / "template.jinja"):
        model = RewardModel(classifier, chat_template=template)
        messages = [{"role": "user", "content": "hi"}]
        answer = [{"role": "assistant", "content": "yes"}]
        assert model([messages], [answer]) == pytest.approx(expected, abs=1e-6)
        assert model(["hi"], ["yes"]) == model([messages], [answer])
        begun = [*messages, {"role": "assistant", "content": "y"}]  # which the answer continues
        assert model([begun], [[{"role": "assistant", "content": "es"}]]) == model(["hi"], ["yes"])
    joined = RewardModel(classifier, chat_template=CHAT_TEMPLATE, layout="joined")
    assert joined(["hi"], ["yes"]) == pytest.approx(alone(classifier, "hiyes").tolist(), abs=1e-6)


def test_pairs_of_an_encoder(tmp_path: Path) -> None:
    """BERT tells the two texts of a pair apart by the kinds of their tokens."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = character_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B:1 <eos>:1", special_tokens=[("<eos>", 1)]
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "initializer_range": 0.5}  # fmt: skip
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=64, num_labels=1, **sizes)
    bert = BertForSequenceClassification(config).eval()
    model = RewardModel(bert, tokenizer=tokenizer, layout="pair", device="cpu")
    with torch.no_grad():
        expected = [
            float(bert(**tokenizer("hi", text, return_tensors="pt")).logits) for text in TEXTS
        ]
        plain = bert(**tokenizer("hi" + TEXTS[0], return_tensors="pt")).logits
    scores = model(["hi"] * len(TEXTS), TEXTS)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert abs(scores[0] - float(plain)) > 0.01


def test_texts_that_are_too_long(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    long, text = "b" * 300, "b" * 255
    model = RewardModel(classifier)
    assert model(["p", "p"], [long, text])[0] is None
    assert "1 of 2 conversations have more than 256 tokens, and have no reward" in caplog.text
    assert [model.take_metrics() for _ in range(2)] == [{"too_long": 1.0}, {"too_long": 0.0}]
    cut = RewardModel(classifier, too_long="cut")(["p"], [long])
    assert cut == pytest.approx([float(alone(classifier, "b" * 256)[0])], abs=1e-5)
    assert "are scored without their beginning" in caplog.text
    shorter = RewardModel(classifier, max_length=20, too_long="error")
    assert shorter(["p"], ["a" * 19]) == model(["p"], ["a" * 19])
    with pytest.raises(RewardError, match="1 of 1 conversations have more than 20 tokens: lower"):
        shorter(["p"], ["a" * 20])


# ---- what is refused


def test_models_that_are_refused(tiny_model: Path, classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    shutil.copytree(classifier, tmp_path / "other")
    config = json.loads((classifier / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    for model, message in {
        tmp_path / "absent": "model folder '.*absent' does not exist",
        tmp_path / "empty": "cannot load reward model '.*empty'",
        tiny_model: r"holds no score\.weight .* it is no sequence classifier",
        tmp_path / "other": r"holds no score\.weight of the shapes",
        tmp_path / "adapter": "is an adapter: merge it into its base first",
        3: "model must be a folder, a hub id or a model of AutoModelForSeq.* got int",
    }.items():
        with pytest.raises(UserError, match=message):
            RewardModel(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"label must be chosen: the reward model has 0 \(bad\), 1 \(so-so\), 2 \(good\)"),
        ({"label": 3}, "there is no label 3: the reward model has 0"),
        ({"label": "best"}, "there is no label 'best'"),
        ({"label": 0, "output": "score"}, "output must be one of logit, probability"),
        ({"label": 0, "layout": "text"}, "layout must be one of chat, joined, pair"),
        ({"label": 0, "layout": "chat"}, "needs a chat template, which the tokenizer lacks"),
        ({"label": 0, "chat_template": "absent.jinja"}, "'absent.jinja' cannot be read"),
        ({"label": 0, "too_long": None}, "too_long must be one of none, cut, error; got None"),
        ({"label": 0, "dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"label": 0, "max_length": 0}, "max_length must be a whole number above 0"),
        ({"label": 0, "max_length": 300}, "max_length=300 is more than the 256 tokens of"),
        ({"label": 0, "tokenizer": "./absent"}, "model folder './absent' does not exist"),
        ({"label": 0, "name": ""}, "the name of a reward must be text"),
    ],
)
def test_wrong_arguments(labelled: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardModel(labelled, **options)


def test_prompts_that_cannot_be_rendered_are_refused_before_a_run(classifier: Path) -> None:
    messages = [Example([{"role": "user", "content": "hi"}], "yes", {})]
    reward = resolve_reward(RewardModel(classifier))
    with pytest.raises(UserError, match=r"prompts are messages, which .* layout 'joined' cannot"):
        reward.check(messages, reward_type="pointwise")
    refusing = RewardModel(classifier, chat_template="{{ raise_exception('no user') }}")
    with pytest.raises(UserError, match=r"chat template cannot render a prompt: .*no user"):
        resolve_reward(refusing).check(messages, reward_type="pointwise")


# ---- in a run


def run(tiny_model: Path, folder: Path, model: RewardModel, **options: Any) -> Any:
    return grao_fast.train(
        tiny_model,
        sums(6),
        [model, Length(6, unit="characters")],
        eval_dataset=sums(2),
        metric=model,
        config=SHORT.replace(reward_weights=(1.0, 0.5), reward_timeout=(60, None), **options),
        output_dir=folder,
    )


def test_a_run_scores_by_a_model_and_a_rule(tiny_model: Path, classifier: Path, tmp_path) -> None:
    model = RewardModel(classifier, chat_template=CHAT_TEMPLATE)
    metrics = run(tiny_model, tmp_path / "run", model).metrics
    total = metrics["rewards/scorer/mean"] + 0.5 * metrics["rewards/length/mean"]
    assert metrics["reward"] == pytest.approx(total)
    assert metrics["rewards/scorer/too_long"] == 0
    final = grao_fast.evaluate(tmp_path / "run/final", sums(2), model, config=SHORT)
    assert final.reward is not None


def test_another_head_is_another_reward(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "scorer")
    assert RewardModel(tmp_path / "scorer").identity == RewardModel(classifier).identity
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "scorer/model.safetensors")
    weights["score.weight"] *= 2
    save_file(weights, tmp_path / "scorer/model.safetensors", metadata={"format": "pt"})
    assert RewardModel(tmp_path / "scorer").identity != RewardModel(classifier).identity


def test_two_processes_shard_it_and_train_as_one(
    tiny_model: Path, classifier: Path, tmp_path: Path
) -> None:
    def body(rank: int) -> None:
        model = RewardModel(classifier, chat_template=CHAT_TEMPLATE)
        run(tiny_model, tmp_path / "two", model, sharding="full")
        assert len(sharded_modules(model._model)) == 3  # two layers, and the root
        checked = grao_fast.check(
            tiny_model, sums(6), model, config=SHORT.replace(sharding="full"), check_prompts=2
        )
        assert not [each for each in checked.findings if "scorer" in each.value and each.remedy]
        with pytest.raises(RewardError, match="reward scorer is sharded over the processes of a"):
            model(["hi"], ["yes"])

    run(tiny_model, tmp_path / "one", RewardModel(classifier, chat_template=CHAT_TEMPLATE))
    ended = launch(body, tmp_path, size=2, timeout=120)
    assert [each.status for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    rows = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    compared = 0
    for one, two in zip(*rows, strict=True):
        for name in {"reward", "rewards/scorer/mean", "eval/metric"} & one.keys():
            assert two[name] == pytest.approx(one[name], abs=1e-4)
            compared += 1
    assert compared == 6  # two steps, and two evaluations
