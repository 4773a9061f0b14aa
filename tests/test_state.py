"""Tests of the data cursor, the seeds, and the checks of a run's options."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from grao_fast.config import GRAOConfig
from grao_fast.objectives.grao import GRAO
from grao_fast.training.optim import count_steps
from grao_fast.training.state import DataStream, step_seed


def test_every_epoch_holds_every_example_once():
    stream = DataStream(size=7, batch_size=3, seed=1)
    drawn = [i for step in range(14) for i in stream.batch(step)]
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert DataStream(size=7, batch_size=3, seed=2).batch(0) != stream.batch(0)


def test_seeds_differ_by_step_and_by_run():
    seeds = {step_seed(seed, step) for seed in range(5) for step in range(-5, 20)}
    assert len(seeds) == 5 * 25
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"max_steps": 5}, 5), ({"num_train_epochs": 2.0}, 7), ({"num_train_epochs": 0.0}, 1)],
)
def test_length_of_a_run(options: dict, steps: int):
    assert count_steps(GRAOConfig(**options).optimisation, prompts=10, prompts_per_step=3) == steps


def test_the_importance_weights_are_on_for_vllm_alone():
    assert GRAOConfig().objective_options.sampler_cap is None
    assert GRAOConfig(use_vllm=True).objective_options.sampler_cap == 3.0
    off = GRAOConfig(use_vllm=True, vllm_importance_sampling_clip_max=None)
    assert off.objective_options.sampler_cap is None
    assert GRAOConfig(num_iterations=2, epsilon=0.1).objective_options.clip == (0.1, 0.1)
    assert GRAOConfig(num_iterations=2, epsilon_high=0.28).objective_options.clip == (0.2, 0.28)


def test_config_refuses_values_of_another_type():
    for field in dataclasses.fields(GRAOConfig):
        if "None" not in str(field.type):
            with pytest.raises(ValueError, match=rf"{field.name} must be .*, got None: leave it"):
                GRAOConfig(**{field.name: None})
    for options, message in [
        ({"share_prefix": "False"}, "share_prefix must be true or false, got 'False'"),
        ({"bf16": "no"}, "bf16 must be true or false, got 'no'"),
        ({"gradient_checkpointing": 0}, "gradient_checkpointing must be true or false, got 0"),
        ({"max_steps": True}, "max_steps must be an integer, got True"),
        ({"learning_rate": "1e-6"}, "learning_rate must be a number, got '1e-6'"),
        ({"reward_weights": [1.0, "2"]}, "reward_weights must be a number, got '2'"),
        ({"reward_timeout": [1.0, "2"]}, "reward_timeout must be a number, got '2'"),
        ({"vllm_server_base_url": 8000}, "vllm_server_base_url must be text, got 8000"),
        ({"seed": 2**32}, "seed must be at most 4294967295, got 4294967296"),
    ]:
        with pytest.raises(ValueError, match=message):
            GRAOConfig(**options)
    numpy = GRAOConfig(max_steps=np.int64(2), learning_rate=np.float64(0.5), bf16=np.bool_(True))
    assert numpy == GRAOConfig(max_steps=2, learning_rate=0.5, bf16=True)
    assert json.dumps(numpy.to_dict())
    assert GRAOConfig(beta=1, reward_weights=[1, 2.5]).reward_weights == (1, 2.5)
    limits = GRAOConfig(reward_timeout=[1, None])
    assert limits.reward_timeout == (1, None)
    assert GRAOConfig.from_dict(json.loads(json.dumps(limits.to_dict()))) == limits


def test_config_rejects_what_cannot_be_right():
    for options, message in [
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0, got nan"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"statistics": "all"}, "statistics must be one of group, samples; got 'all'"),
        ({"reward_timeout": 0}, "reward_timeout must be above 0, got 0"),
        ({"reward_timeout": (2.0, 0.0)}, "reward_timeout must be above 0, got 0"),
        ({"reward_timeout": (None, -1.0)}, "reward_timeout must be at least 0, got -1.0"),
        ({"report_to": "wandb"}, "report_to must be a list"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be below 1, got 1.5"),
        ({"max_new_tokens": 5e2}, "max_new_tokens must be an integer, got 500.0"),
        ({"device": "gpu"}, "device must be .* got 'gpu'"),
        ({"kl_coef": -0.1}, "kl_coef must be at least 0, got -0.1"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
        ({"epsilon": 1.5, "num_iterations": 2}, "epsilon must be at most 1, got 1.5"),
        ({"epsilon": 0.1}, "no effect with num_iterations=1"),
        ({"epsilon_high": 0.3}, "no effect with num_iterations=1"),
        ({"vllm_mode": "server"}, "vllm_mode='server' has no effect without use_vllm=True"),
        ({"use_vllm": True, "vllm_mode": "local"}, "vllm_mode must be one of server, colocate"),
        (
            {"use_vllm": True, "vllm_server_base_url": "http://there"},
            "vllm_server_base_url='http://there' has no effect without vllm_mode='server'",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_max_model_length": 9},
            "vllm_max_model_length=9 has no effect without vllm_mode='colocate'",
        ),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 0}, "must be above 0, got 0"),
        ({"use_vllm": True, "vllm_importance_sampling_clip_max": 0}, "must be above 0, got 0"),
        ({"use_vllm": True, "cache_implementation": "static"}, "no effect without use_vllm=False"),
        ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
    ]:
        with pytest.raises(ValueError, match=message):
            GRAOConfig(**options)
    with pytest.raises(ValueError, match="unknown key 'lerning_rate'"):
        GRAOConfig.from_dict({"lerning_rate": 1})
    config = GRAOConfig(beta=0.1, reward_weights=[1.0, 2.0])
    assert GRAOConfig.from_dict(config.to_dict()) == config
    assert config.objective_options.formula == GRAO(beta=0.1)
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(config)}  # no views
