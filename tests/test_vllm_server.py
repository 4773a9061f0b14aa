"""Sampling from a vLLM server, against a local one that speaks its API (tests/vllm_server.py)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_trainer import CONFIG, ROWS, StopAt, letters, lines, rarely_equal, run, same_bits
from tiny import character_tokenizer
from transformers import AutoModelForCausalLM
from vllm_server import FakeVLLM, serving

import grao_fast
from grao_fast.sampling.loaded import LoadedPolicy
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.transformers import TransformersSampler
from grao_fast.sampling.vllm import VLLMServerSampler
from grao_fast.system.lock import LOCK_FILE

pytest.importorskip("openai", reason="openai, the client of a vLLM server, is not installed")

EOS = 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [16, 17]]
SEEDS = [11, 7, 5, 3]
SAMPLE = {"num_generations": 3, "max_new_tokens": 6, "temperature": 0.7, "seeds": SEEDS}


@pytest.fixture
def fake(tiny_model) -> FakeVLLM:
    return FakeVLLM(tiny_model)


@pytest.fixture
def url(fake: FakeVLLM) -> Iterator[str]:
    with serving(fake) as url:
        yield url


def sampler(url: str, tiny_model, **options) -> VLLMServerSampler:
    options = {
        "model": str(tiny_model),
        "tokenizer": character_tokenizer(),
        "eos_token_ids": [EOS],
        "sync_dir": None,
    } | options
    return VLLMServerSampler(url, **options)


def config(url: str, **changes):
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
    return CONFIG.replace(**options | {"max_steps": 3, "save_steps": 0} | changes)


def test_it_returns_what_the_server_drew(fake: FakeVLLM, url: str, tiny_model):
    """Every prompt's own samples in the order of their indices, with their log-probs."""
    groups = sampler(url, tiny_model).sample(PROMPTS, **SAMPLE)
    own = TransformersSampler(
        fake.model, Decoding(eos_token_ids=[EOS], pad_token_id=0, batch_size=64)
    )
    for prompt, seed, group in zip(PROMPTS, SEEDS, groups, strict=True):
        assert [group] == own.sample([prompt], **SAMPLE | {"seeds": [seed]})


def test_a_prompt_is_requested_with_its_own_seed(fake: FakeVLLM, url: str, tiny_model):
    """Whether all are sampled in one call, or another process samples every second one."""
    remote = sampler(url, tiny_model)
    whole = remote.sample(PROMPTS, **SAMPLE)
    seeds = dict(zip(map(tuple, PROMPTS), SEEDS, strict=True))
    for place in (1, 0):
        share = remote.sample(PROMPTS[place::2], **SAMPLE | {"seeds": SEEDS[place::2]})
        assert share == whole[place::2]
    bodies = fake.paths("/v1/completions")
    assert len(bodies) == 8
    assert all(body["seed"] == seeds[tuple(body["prompt"])] for body in bodies)


def test_training_keeps_the_server_at_the_policys_weights(fake, url, tiny_model, tmp_path):
    options = {"config": config(url), "reward": rarely_equal, "eval_dataset": ROWS[:3]}
    result = run(tiny_model, tmp_path, **options)
    assert len(fake.paths("/collective_rpc")) == 5  # twice before the first step, once after each
    assert len(fake.paths("/reset_prefix_cache")) == 5
    for row in lines(tmp_path):
        if "loss" in row:
            assert 0 < row["sampling/logp_diff"] <= row["sampling/logp_diff_max"] < 1e-4
    theirs = fake.model.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in result.model.state_dict().items())
    assert result.metrics["grad_norm"] > 0


def test_a_run_of_stored_completions_is_evaluated_by_the_server(fake, url, tiny_model, tmp_path):
    columns = {"completions": ["ab", "b"], "rewards": [1.0, 0.0], "reference_reward": 0.5}
    options = {"config": config(url, sampler="dataset", num_generations=8)}
    options |= {"dataset": [row | columns for row in ROWS], "reward": rarely_equal}
    result = run(tiny_model, tmp_path, **options, eval_dataset=ROWS[:3])
    assert (
        len(fake.paths("/collective_rpc")) == 3
    )  # twice before the first answers, once at the end
    theirs = fake.model.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in result.model.state_dict().items())


STALE = {
    "everything": lambda name: True,
    "the head": lambda name: name == "lm_head.weight",
    "a layer": lambda name: name.startswith("model.layers.1."),
    "one matrix": lambda name: name == "model.layers.0.self_attn.k_proj.weight",
    "a norm": lambda name: name == "model.norm.weight",
}
NAMED = {"the head": "head, which is tied", "a layer": "layer 1;"}
STALE_CASES = [(part, False) for part in STALE] + [
    # rounding to 16 bits hides what one matrix of the tiny model does
    (part, True)
    for part in ("everything", "the head", "a layer")
]


@pytest.mark.parametrize("part, bf16", STALE_CASES)
def test_a_server_that_keeps_old_weights_ends_the_run_before_the_first_step(
    fake: FakeVLLM, url: str, tiny_model, tmp_path: Path, part: str, bf16: bool
):
    """Whatever the learning rate, and though the two agree at the start."""
    fake.keeps = STALE[part]
    with pytest.raises(
        ValueError, match=r"does not hold the policy's weights.* differ by"
    ) as error:
        run(tiny_model, tmp_path, config=config(url, learning_rate=0.0, bf16=bf16))
    assert NAMED.get(part, "") in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists() or not lines(tmp_path)


def test_a_server_that_keeps_old_weights_later_ends_the_run(fake, url, tiny_model, tmp_path):
    class KeepFrom(StopAt):
        def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
            fake.keeps = STALE["the head"]
            return False

    with pytest.raises(ValueError, match=r"does not hold.* nats a token where rounding explains"):
        run(tiny_model, tmp_path, config=config(url, learning_rate=1e-3), callbacks=[KeepFrom(9)])
    assert [row["step"] for row in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoint-2").is_dir()  # the policy itself is whole


def test_a_proof_that_failed_is_made_again(fake: FakeVLLM, url: str, tiny_model):
    loaded = policy_of(url, tiny_model)
    fake.keeps = STALE["a layer"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"kept its own layer 1"):
            loaded.sampler.sync(loaded.policy)
    fake.keeps = lambda name: False
    loaded.sampler.sync(loaded.policy)


def test_the_policy_is_what_it_was_after_the_proof(url: str, tiny_model):
    loaded = load_policy(tiny_model, config=config(url))
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    training = loaded.model.train().training
    loaded.sampler.sync(loaded.policy)
    assert all(torch.equal(before[name], p) for name, p in loaded.model.state_dict().items())
    assert loaded.model.training is training


OLDER = ("/weight_info", "/update_weight_version", "/is_paused", "/pause", "/resume")


@pytest.mark.parametrize("absent", [(), OLDER], ids=["with versions of weights", "without"])
def test_a_restarted_server_gets_the_weights_again(fake, url, tiny_model, absent, caplog):
    """It is known by its process, or by the version of its weights."""
    fake.without(*absent)
    loaded = policy_of(url, tiny_model)
    with torch.no_grad():
        loaded.policy.head()[0].mul_(3)  # not what the server starts from
    loaded.sampler.sync(loaded.policy)
    calm = loaded.sampler.sample(PROMPTS, **SAMPLE)
    fake.start()
    with caplog.at_level("WARNING"):
        assert loaded.sampler.sample(PROMPTS, **SAMPLE) == calm
    assert "was restarted or given other weights" in caplog.text
    assert len(fake.paths("/collective_rpc")) == 3
    assert not absent or not fake.paths("/pause")


def test_weights_lost_while_it_samples_end_the_run(fake: FakeVLLM, url: str, tiny_model):
    def another_run_writes(choices: list[dict]) -> list[dict]:
        fake.version = "of another run"
        return choices

    loaded = policy_of(url, tiny_model)
    loaded.sampler.sync(loaded.policy)
    fake.change_choices = another_run_writes
    with pytest.raises(ConnectionError, match="given other weights while it sampled"):
        loaded.sampler.sample(PROMPTS, **SAMPLE)


def test_a_hand_over_that_fails_leaves_the_server_going(fake: FakeVLLM, url: str, tiny_model):
    loaded = policy_of(url, tiny_model)
    fake.answers = {"/reset_prefix_cache": 500}
    with pytest.raises(ConnectionError, match="reset_prefix_cache"):
        loaded.sampler.sync(loaded.policy)
    assert not fake.paused


def test_an_api_key_comes_from_the_environment_and_is_kept_nowhere(
    fake: FakeVLLM, url: str, tiny_model, tmp_path: Path, monkeypatch, caplog
):
    fake.api_key = "sk-very-secret"
    with pytest.raises(ValueError, match="asks for another API key: set vllm_server_api_key_env"):
        run(tiny_model, tmp_path / "without", config=config(url))
    options = config(url, vllm_server_api_key_env="TINY_KEY", save_steps=1, max_steps=1)
    with pytest.raises(ValueError, match="environment variable 'TINY_KEY', which is not set"):
        run(tiny_model, tmp_path / "unset", config=options)
    with pytest.raises(ValueError, match="takes the name of an environment variable") as error:
        config(url, vllm_server_api_key_env=fake.api_key)
    assert fake.api_key not in str(error.value)
    monkeypatch.setenv("TINY_KEY", fake.api_key)
    with caplog.at_level("DEBUG"):
        run(tiny_model, tmp_path / "with", config=options)
    written = [file for file in (tmp_path / "with").rglob("*") if file.is_file()]
    assert all(fake.api_key.encode() not in file.read_bytes() for file in written)
    assert fake.api_key not in caplog.text


def test_a_run_with_a_server_resumes_bit_for_bit(url: str, tiny_model, tmp_path: Path):
    options = {"config": config(url, save_steps=1)}
    run(tiny_model, tmp_path / "whole", **options)
    run(tiny_model, tmp_path / "parts", **options, callbacks=[StopAt(2)])
    run(tiny_model, tmp_path / "parts", **options, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


def test_an_adapter_is_merged_on_the_way_and_left_as_it_was(fake: FakeVLLM, url: str, tiny_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    loaded = load_policy(tiny_model, config=config(url), peft_config=adapter)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    loaded.sampler.sync(loaded.policy)
    assert all(torch.equal(before[name], p) for name, p in loaded.model.state_dict().items())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        ours, theirs = (m.eval()(ids).logits for m in (loaded.causal_lm, fake.model))
        base = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, base, atol=1e-2)


def adapted(url: str, tiny_model, **options) -> LoadedPolicy:
    """A policy whose adapter does something."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | options
    adapter = peft.LoraConfig(**options)
    loaded = load_policy(tiny_model, config=config(url), peft_config=adapter)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return loaded


def test_an_adapter_is_sent_alone_where_the_server_takes_it(fake: FakeVLLM, url: str, tiny_model):
    fake.max_lora_rank = 8
    loaded = adapted(url, tiny_model)
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    for _ in range(3):
        loaded.sampler.sync(loaded.policy)
    assert all(torch.equal(before[name], p) for name, p in loaded.model.state_dict().items())
    assert len(fake.paths("/v1/load_lora_adapter")) == 4
    assert not fake.paths("/collective_rpc")
    (adapter,) = fake.adapters.values()  # those before are gone
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(adapter(ids).logits, loaded.model.eval()(ids).logits, atol=1e-6)


def test_a_restarted_server_gets_the_adapter_again(fake: FakeVLLM, url: str, tiny_model):
    """Before it samples, and with the next update; another's weights leave ours there."""
    fake.max_lora_rank = 8
    loaded = adapted(url, tiny_model)
    loaded.sampler.sync(loaded.policy)
    calm = loaded.sampler.sample(PROMPTS, **SAMPLE)
    fake.start()  # without adapters
    assert loaded.sampler.sample(PROMPTS, **SAMPLE) == calm
    fake.start()
    loaded.sampler.sync(loaded.policy)
    fake.version = "of another run"
    assert loaded.sampler.sample(PROMPTS, **SAMPLE) == calm
    assert len(fake.adapters) == 1


MERGED = {
    "no --enable-lora": ({"max_lora_rank": None}, {}, "without --enable-lora"),
    "a larger rank": ({}, {"r": 16}, "its rank is 16, and the server's --max-lora-rank 8"),
    "another base": ({}, {"init_lora_weights": "pissa"}, "'pissa' changes the model under it"),
    "DoRA": ({}, {"use_dora": True}, "DoRA is trained too"),
    "a bias": ({}, {"modules_to_save": ["norm"]}, "norm.* is trained too"),
}


@pytest.mark.parametrize("case", MERGED)
def test_what_cannot_be_sent_alone_is_merged_and_said(fake, url, tiny_model, case, caplog):
    server, options, reason = MERGED[case]
    vars(fake).update({"max_lora_rank": 8} | server)
    loaded = adapted(url, tiny_model, **options)
    with caplog.at_level("INFO"):
        loaded.sampler.sync(loaded.policy)
    assert re.search(f"gets the adapter merged into its model: .*{reason}", caplog.text)
    assert len(fake.paths("/collective_rpc")) == 2


@pytest.mark.parametrize("kept", ["everything", "layer 1"])
def test_a_server_that_keeps_an_old_adapter_is_refused(fake, url, tiny_model, kept, monkeypatch):
    fake.max_lora_rank = 8
    loaded = adapted(url, tiny_model)
    first: dict[str, Path] = {}

    def load(body: dict) -> tuple[int, str]:
        """The adapter that was sent first, all of it or one layer."""
        answer = FakeVLLM._v1_load_lora_adapter(fake, body)
        new = fake.adapters[body["lora_name"]]
        if not first:
            first.update(new.state_dict())
        old = {k: v for k, v in first.items() if kept == "everything" or ".layers.1." in k}
        new.load_state_dict(old, strict=False)
        return answer

    monkeypatch.setattr(fake, "_v1_load_lora_adapter", load, raising=False)
    with pytest.raises(ValueError, match=r"does not hold the.*; it kept its own .*layer 1"):
        loaded.sampler.sync(loaded.policy)


def test_weights_are_sent_in_the_dtype_of_the_passes(fake: FakeVLLM, url: str, tiny_model):
    loaded = load_policy(tiny_model, config=config(url, bf16=True))
    loaded.sampler.sync(loaded.policy)
    sent = fake.model.state_dict()
    for name, parameter in loaded.model.state_dict().items():
        assert torch.equal(sent[name].bfloat16(), parameter.bfloat16())
    assert any(not torch.equal(sent[n].float(), p) for n, p in loaded.model.state_dict().items())


def last_as_none(values: list[float]) -> list[float | None]:
    return [*values[:-1], None]


def changed(field: str, function) -> dict:
    """A change of one field of the first choice."""

    def change(choices: list[dict]) -> list[dict]:
        choices[0] = choices[0] | {field: function(choices[0][field])}
        return choices

    return {"change_choices": change}


WRONG_ANSWERS = {
    "a choice is missing": (
        {"change_choices": lambda choices: choices[1:]},
        "returned 2 completions of a prompt, not the 3 it was asked for",
    ),
    "no log-probs": (changed("logprobs", lambda _: None), "tokens with none log-probs"),
    "a log-prob is missing": (
        changed("logprobs", lambda old: {"token_logprobs": old["token_logprobs"][1:]}),
        r"returned \d tokens with \d log-probs",
    ),
    "a log-prob is null": (
        changed("logprobs", lambda old: {"token_logprobs": last_as_none(old["token_logprobs"])}),
        "log-prob that is not finite",
    ),
    "no token ids": (changed("token_ids", lambda _: None), "no token ids; version 0.22"),
    "cut early": (
        {
            "change_choices": lambda choices: [
                c | {"token_ids": [5, 5], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
                for c in choices
            ]
        },
        "cut a completion after 2 of 6 tokens: start it with --generation-config vllm",
    ),
}


@pytest.mark.parametrize("case", WRONG_ANSWERS)
def test_a_wrong_answer_is_refused(fake: FakeVLLM, url: str, tiny_model, case: str):
    change, message = WRONG_ANSWERS[case]
    remote = sampler(url, tiny_model)
    vars(fake).update(change)
    with pytest.raises(ValueError, match=message):
        remote.sample(PROMPTS, **SAMPLE)


NOT_USABLE = {
    "another model": ({"served": "other/model"}, r"serves \['policy'\], not .*vllm_server_model"),
    "raw log-probs": (
        {"logprobs_mode": "raw_logprobs"},
        "gives raw_logprobs.*start it with --logprobs-mode processed_logprobs",
    ),
    "no development mode": (
        {"answers": {"/server_info": 404}},
        "/server_info.* is not there; start the server as: VLLM_SERVER_DEV_MODE=1",
    ),
}


@pytest.mark.parametrize("case", NOT_USABLE)
def test_a_server_that_cannot_serve_is_refused_at_once(fake, url, tiny_model, tmp_path, case):
    change, message = NOT_USABLE[case]
    vars(fake).update(change)
    with pytest.raises(ValueError, match=message):
        run(tiny_model, tmp_path, config=config(url))
    assert not fake.paths("/v1/completions")


def test_the_served_name_will_do(url: str, tiny_model):
    assert sampler(url + "/v1/", tiny_model, model="policy").context_length == 512


def test_no_server_is_said_before_training(tiny_model, tmp_path: Path):
    with pytest.raises(ConnectionError, match=r"no vLLM server answers at http://127\.0\.0\.1:9/"):
        run(tiny_model, tmp_path, config=config("http://127.0.0.1:9"))


def test_a_server_with_too_short_a_context_is_said_before_training(
    fake: FakeVLLM, url: str, tiny_model, tmp_path: Path
):
    fake.max_model_len = 12
    with pytest.raises(ValueError, match=r"do not fit .* context of 12: .*max_prompt_length=4"):
        run(tiny_model, tmp_path, config=config(url))


def test_passing_failures_are_retried_and_lasting_ones_end_the_run(fake, url, tiny_model):
    remote = sampler(url, tiny_model)
    calm = remote.sample(PROMPTS[:1], **SAMPLE | {"seeds": SEEDS[:1]})
    fake.failures = [503, 500, 503]
    assert remote.sample(PROMPTS[:1], **SAMPLE | {"seeds": SEEDS[:1]}) == calm
    fake.requests.clear()
    fake.answers = {"/v1/completions": 500}
    with pytest.raises(ConnectionError, match=r"/v1/completions: .*500"):
        remote.sample(PROMPTS[:1], **SAMPLE | {"seeds": SEEDS[:1]})
    assert len(fake.requests) == 4
    fake.answers = {"/v1/completions": 400}
    with pytest.raises(ValueError, match=r"/v1/completions: .*400"):
        remote.sample(PROMPTS[:1], **SAMPLE | {"seeds": SEEDS[:1]})


def policy_of(url: str, tiny_model, **changes) -> LoadedPolicy:
    return load_policy(tiny_model, config=config(url, **changes))


def test_weights_that_do_not_arrive_are_said(fake: FakeVLLM, url: str, tiny_model):
    loaded = policy_of(url, tiny_model)
    fake.answers = {"/collective_rpc": 500}
    with pytest.raises(ConnectionError, match=r"did not load the weights in .*vllm_sync_dir"):
        loaded.sampler.sync(loaded.policy)
    fake.answers = {"/collective_rpc": 404}
    with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
        loaded.sampler.sync(loaded.policy)
    fake.answers, fake.resets_cache = {}, False
    with pytest.raises(ValueError, match="prefix cache of the old weights"):
        loaded.sampler.sync(loaded.policy)


def test_one_set_of_weights_is_kept_and_none_is_left(url: str, tiny_model, tmp_path: Path):
    loaded = policy_of(url, tiny_model, vllm_sync_dir=str(tmp_path))
    for _ in range(3):
        loaded.sampler.sync(loaded.policy)
    (root,) = tmp_path.iterdir()
    assert [folder.name for folder in root.glob("weights*")] == ["weights-4"]
    del loaded
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_users_are_left_alone(url, tiny_model, tmp_path, monkeypatch):
    """They share /tmp or /dev/shm; what they hold cannot be seen, or not be changed."""
    hidden, shown = tmp_path / "grao-fast-weights-hidden", tmp_path / "grao-fast-weights-shown"
    for folder in (hidden, shown):
        folder.mkdir()
        (folder / LOCK_FILE).touch()
    own_stat, own_open = os.stat, os.open

    def stat(path, *args, **kwargs):
        if isinstance(path, (str, Path)) and Path(path).parent == hidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own_stat(path, *args, **kwargs)

    def open(path, *args, **kwargs):
        if isinstance(path, (str, Path)) and Path(path).parent == shown:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "open", open)
    policy_of(url, tiny_model, vllm_sync_dir=str(tmp_path))
    assert hidden.is_dir() and shown.is_dir()


def test_a_folder_that_is_not_there_is_said(url: str, tiny_model, tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot write to vllm_sync_dir '.*/nowhere'"):
        policy_of(url, tiny_model, vllm_sync_dir=str(tmp_path / "nowhere"))


def test_an_evaluation_does_not_ignore_it(url: str, tiny_model):
    with pytest.raises(ValueError, match="leave use_vllm and vllm_"):
        grao_fast.evaluate(tiny_model, ROWS, letters, config=config(url))
