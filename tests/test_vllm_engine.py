"""A colocated vLLM engine, against an object with the methods of `vllm.LLM` that are used.

What is tested is what is asked of it, and what is made of its answers; test_vllm_real.py has vLLM's
own.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import parity
import pytest
import torch
from parity import VARIANTS, Variant, differences, run_all
from processes import launch
from test_parity import ROUNDING
from test_trainer import CONFIG, lines, rarely_equal, run
from tiny import character_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from grao_fast.distributed.world import World
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.model_sampler import Decoding
from grao_fast.sampling.transformers import TransformersSampler
from grao_fast.sampling.vllm import VLLMColocatedSampler


@dataclass
class SamplingParams:
    """The fields that are set, without defaults: what is left out is not accepted."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    seed: int | None = None
    prompt_logprobs: int | None = None


@dataclass
class LLM:
    model: str
    dtype: torch.dtype
    gpu_memory_utilization: float
    max_model_len: int | None
    logprobs_mode: str
    distributed_executor_backend: str | None = None
    tensor_parallel_size: int = 1
    reloads: list[str] = field(default_factory=list)
    resets: int = 0

    def __post_init__(self) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if self.distributed_executor_backend == "external_launcher":
            assert int(os.environ["RANK"]) == torch.distributed.get_rank()
            self.llm_engine = SimpleNamespace(engine_core=self)
        torch.set_num_threads = None  # as vLLM does on CPUs
        engines.append(self)
        if failures:
            raise failures.pop()
        self.weights = AutoModelForCausalLM.from_pretrained(self.model)

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> list[None]:
        assert method == "reload_weights"
        if failures:
            raise failures.pop()
        self.reloads.append(kwargs["weights_path"])
        self.weights = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"])
        return [None]

    def shutdown(self) -> None:
        """As vLLM's, which leaves the default group."""
        torch.distributed.destroy_process_group()
        print("the engine was shut down")

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def generate(self, prompts, sampling_params, use_tqdm: bool):
        assert not use_tqdm
        if failures:
            raise failures.pop()
        pairs = zip(prompts, sampling_params, strict=True)
        return [
            self._scored(p) if o.prompt_logprobs is not None else self._draw(p, o) for p, o in pairs
        ]

    @torch.no_grad()
    def _scored(self, prompt):
        ids = prompt["prompt_token_ids"]
        logprobs = self.weights(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
        behind_first = [
            {token: SimpleNamespace(logprob=row[token])}
            for row, token in zip(logprobs, ids[1:], strict=False)
        ]
        return SimpleNamespace(prompt_logprobs=[None, *behind_first])

    def _draw(self, prompt, options: SamplingParams):
        if self.tensor_parallel_size > 1:
            print("drawn")
        (group,) = own(self.weights).sample(
            [prompt["prompt_token_ids"]],
            num_generations=options.n,
            max_new_tokens=options.max_tokens,
            temperature=options.temperature,
            seeds=[options.seed],
        )
        outputs = [
            SimpleNamespace(
                token_ids=tuple(sample.token_ids),
                logprobs=[
                    {token: SimpleNamespace(logprob=value)}
                    for token, value in zip(sample.token_ids, sample.logprobs, strict=True)
                ],
            )
            for sample in group
        ]
        return SimpleNamespace(outputs=outputs)


engines: list[LLM] = []
failures: list[Exception] = []  # raised by the next calls


def own(model) -> TransformersSampler:
    return TransformersSampler(model, Decoding(eos_token_ids=[1], pad_token_id=0, batch_size=64))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    engines.clear()
    failures.clear()


def test_training_starts_one_engine_and_keeps_it_at_the_policys_weights(
    vllm, tiny_model, tmp_path: Path
):
    config = CONFIG.replace(
        max_steps=3, save_steps=0, use_vllm=True, vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.4,
    )  # fmt: skip
    result = run(tiny_model, tmp_path, config=config, reward=rarely_equal)
    (engine,) = engines
    assert (engine.gpu_memory_utilization, engine.max_model_len) == (0.4, 64)
    assert (engine.logprobs_mode, engine.dtype) == ("processed_logprobs", torch.float32)
    assert len(set(engine.reloads) | {engine.model}) == 5  # twice before the first step
    assert engine.resets == 4
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ
    torch.set_num_threads(torch.get_num_threads())
    for row in lines(tmp_path):
        assert 0 < row["sampling/logp_diff"] < 1e-4
    theirs = engine.weights.state_dict()
    assert all(torch.equal(theirs[k], v) for k, v in result.model.state_dict().items())


def test_it_returns_what_the_engine_drew(vllm, tiny_model):
    loaded = load_policy(tiny_model, config=CONFIG.replace(use_vllm=True, bf16=True))
    loaded.sampler.sync(loaded.policy)
    assert engines[0].dtype == torch.bfloat16
    prompts = [[5, 6, 7], [8], [9, 10, 11]]
    options = {"num_generations": 3, "max_new_tokens": 6, "temperature": 0.7}
    groups = loaded.sampler.sample(prompts, **options, seeds=[4, 9, 2])
    for prompt, seed, group in zip(prompts, [4, 9, 2], groups, strict=True):
        assert [group] == own(engines[0].weights).sample([prompt], **options, seeds=[seed])


@pytest.mark.parametrize(
    "method, what",
    [("sync", "did not start"), ("sync", "did not take over the weights"), ("sample", "failed")],
)
def test_a_failing_engine_is_one_line(vllm, tiny_model, method: str, what: str):
    loaded = load_policy(tiny_model, config=CONFIG.replace(use_vllm=True))
    if what != "did not start":
        loaded.sampler.sync(loaded.policy)
    failures.append(RuntimeError("no memory for the cache\n\n  raise it to 3.5 GiB"))
    sample = {"num_generations": 1, "max_new_tokens": 2, "temperature": 1.0, "seeds": [0]}
    arguments = ([loaded.policy], {}) if method == "sync" else ([[[5]]], sample)
    with pytest.raises(
        ValueError, match=rf"vLLM's engine {what}.*: RuntimeError: no memory for"
    ) as e:
        getattr(loaded.sampler, method)(*arguments[0], **arguments[1])
    assert "\n" not in str(e.value)


def test_an_engine_that_keeps_old_weights_is_refused(vllm, tiny_model, monkeypatch):
    monkeypatch.setattr(LLM, "collective_rpc", lambda *args, **kwargs: [None])
    loaded = load_policy(tiny_model, config=CONFIG.replace(use_vllm=True))
    with pytest.raises(ValueError, match="vLLM's engine does not hold the policy's weights"):
        loaded.sampler.sync(loaded.policy)


def test_a_vllm_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r'use_vllm needs vllm: pip install "grao-fast\[vllm\]"'):
        VLLMColocatedSampler(
            tokenizer=character_tokenizer(),
            eos_token_ids=[1],
            sync_dir=None,
            gpu_memory_utilization=0.3,
            max_model_length=None,
        )


def test_each_of_two_processes_has_an_engine_and_they_train_as_one(vllm, tmp_path: Path):
    for size in (1, 2):
        run_all(["odd counts"], tmp_path, size, steps=2, options={"use_vllm": True})
    off = differences(tmp_path / "odd counts 1", tmp_path / "odd counts 2")
    assert off["samples"] == off["reward"] == 0
    assert max(off["loss"], off["weights"]) <= ROUNDING
    printed = [(tmp_path / "printed" / f"stdout-{rank}").read_text() for rank in range(2)]
    assert all("the engine was shut down" in text for text in printed)


@pytest.mark.slow
def test_processes_that_share_an_engine_sample_the_prompts_of_all(vllm, tmp_path: Path):
    options = {"use_vllm": True, "vllm_tensor_parallel_size": 2}
    run_all(["odd counts"], tmp_path, 1, steps=1, options={"use_vllm": True})
    run_all(["odd counts"], tmp_path, 2, steps=1, options=options)
    off = differences(tmp_path / "odd counts 1", tmp_path / "odd counts 2")
    assert off["samples"] == off["reward"] == 0
    drawn = [
        (tmp_path / "printed" / f"stdout-{rank}").read_text().count("drawn") for rank in range(2)
    ]
    assert drawn == [5, 5]


@pytest.mark.slow
def test_an_engine_of_one_process_that_keeps_old_weights_ends_all(vllm, tmp_path, monkeypatch):
    reload = LLM.collective_rpc

    def keeps(self: LLM, method: str, *, kwargs: dict[str, str]) -> list[None]:
        return [None] if os.environ["RANK"] == "1" else reload(self, method, kwargs=kwargs)

    monkeypatch.setattr(LLM, "collective_rpc", keeps)
    save_tiny_model(tmp_path / "models" / "tied")

    def body(rank: int) -> None:
        torch.set_num_threads(1)
        options = VARIANTS["tied"].options | {"use_vllm": True}
        parity.run(Variant(options), tmp_path / "output", tmp_path / "models", steps=1)

    ended = launch(body, tmp_path)
    assert [process.status for process in ended] == [1, 1]
    (said,) = [each.stderr for each in ended if "Error" in each.stderr]
    assert "vLLM's engine does not hold the policy's weights" in said


def test_engines_are_shared_by_a_divisor_of_the_processes(vllm, tiny_model):
    with pytest.raises(ValueError, match=r"parallel_size=2 does not divide .* 1: set"):
        load_policy(tiny_model, config=CONFIG.replace(use_vllm=True, vllm_tensor_parallel_size=2))


def test_several_machines_need_a_folder_that_all_see(vllm):
    with pytest.raises(ValueError, match="name one by vllm_sync_dir"):
        VLLMColocatedSampler(
            tokenizer=character_tokenizer(),
            eos_token_ids=[1],
            sync_dir=None,
            gpu_memory_utilization=0.3,
            max_model_length=None,
            world=World(size=4, local_size=2),
        )
