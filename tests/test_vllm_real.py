"""vLLM's own server and engine, on CPUs.

GRAO_VLLM names the folder of a `vllm` executable (CONTRIBUTING.md says how to make one); its Python
needs grao-fast too, for the engine.
"""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_vllm import BIN, RealServer, environment, save_model, save_plugin
from test_trainer import CONFIG, StopAt, lines, rarely_equal, run, same_bits
from vllm_server import FakeVLLM, serving

from grao_fast.callbacks import Callback
from grao_fast.sampling import weights
from grao_fast.sampling.loading import load_policy
from grao_fast.sampling.vllm.requests import sampling_options, scoring_options
from grao_fast.sampling.weights import WeightFolder

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not (BIN / "vllm").exists(), reason="GRAO_VLLM names no folder with a vllm executable"
    ),
]

KEY = "sk-of-the-tests"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(folder / name, tied=name == "tied") for name in ("tied", "untied")}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def tied(models: dict[str, Path], logs: Path) -> Iterator[RealServer]:
    """Serves the tied model, under a key."""
    server = RealServer(models["tied"], logs / "tied.log", "--api-key", KEY)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAO_TEST_KEY", KEY)


def config(server: RealServer, **changes):
    options = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": server.url,
        "vllm_server_api_key_env": "GRAO_TEST_KEY",
        "max_steps": 4,
        "save_steps": 0,
    }
    return CONFIG.replace(**options | changes)


def gaps(output: Path) -> list[float]:
    return [row["sampling/logp_diff"] for row in lines(output) if "loss" in row]


def test_a_tied_model_stays_the_policys_over_several_steps(tied, models, tmp_path):
    result = run(models["tied"], tmp_path, config=config(tied), reward=rarely_equal)
    assert len(gaps(tmp_path)) == 4
    assert max(gaps(tmp_path)) < 2e-6
    assert result.metrics["grad_norm"] > 0


def test_a_head_that_stays_as_it_was_ends_the_run(tied, models, tmp_path, monkeypatch):
    """As where the folder has it under one name with the embeddings."""
    whole = weights._unshared

    def without_head(tensors):
        return {k: v for k, v in whole(tensors).items() if k != "lm_head.weight"}

    loaded = load_policy(models["tied"], config=config(tied))
    loaded.sampler.sync(loaded.policy)  # whatever the tests before have left there
    monkeypatch.setattr(weights, "_unshared", without_head)
    with pytest.raises(ValueError, match=r"does not hold.*it kept its own head, which is tied"):
        run(models["tied"], tmp_path, config=config(tied, learning_rate=1e-6))
    assert not (tmp_path / "final").exists()


def test_a_server_restarted_in_the_middle_gets_the_weights_again(tied, models, tmp_path, caplog):
    class Restart(Callback):
        def on_step_end(self, step: int, metrics: dict[str, float]) -> bool:
            if step == 2:
                tied.stop()
                tied.start()
            return False

    with caplog.at_level("WARNING"):
        run(
            models["tied"],
            tmp_path,
            config=config(tied),
            reward=rarely_equal,
            callbacks=[Restart()],
        )
    assert "was restarted or given other weights" in caplog.text
    assert max(gaps(tmp_path)) < 2e-6


def test_a_run_resumes_bit_for_bit(tied: RealServer, models, tmp_path: Path):
    options = {"config": config(tied, save_steps=1), "reward": rarely_equal}
    run(models["tied"], tmp_path / "whole", **options)
    run(models["tied"], tmp_path / "parts", **options, callbacks=[StopAt(2)])
    run(models["tied"], tmp_path / "parts", **options, resume_from_checkpoint=True)
    assert same_bits(tmp_path / "whole" / "final", tmp_path / "parts" / "final")


def test_another_model_and_another_key_are_refused(tied: RealServer, models, monkeypatch):
    with pytest.raises(ValueError, match=r"serves \['.*tied'\], not '.*untied': serve it, or set"):
        load_policy(models["untied"], config=config(tied))
    monkeypatch.setenv("GRAO_TEST_KEY", "another")
    with pytest.raises(ValueError, match="asks for another API key"):
        load_policy(models["tied"], config=config(tied))


def test_weights_that_the_server_cannot_read_are_said(tied, models, tmp_path, monkeypatch):
    """And it serves on, with what it had."""
    loaded = load_policy(models["tied"], config=config(tied))
    sampler: Any = loaded.sampler
    sampler.sync(loaded.policy)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError, match="did not load the"):
        patch.setattr(WeightFolder, "write", lambda self, policy: tmp_path / "nowhere")
        sampler.sync(loaded.policy)
    sampler.sync(loaded.policy)
    sampler.sample([[5, 6]], num_generations=1, max_new_tokens=2, temperature=1.0, seeds=[0])


def test_the_stand_in_answers_as_vllm_does(tied: RealServer, models):
    """Status, fields and types of every route that is used, for requests that are made."""
    fake = FakeVLLM(str(models["tied"]))
    fake.api_key = KEY
    with serving(fake) as url:
        for path, body, key in _requests(models["tied"]):
            real, stand_in = (
                _ask(base + path, body and {"model": name} | body, key)
                for base, name in ((tied.url, str(models["tied"])), (url, "policy"))
            )
            assert stand_in[0] == real[0], path
            assert _lacking(stand_in[1], real[1]) == [], path


def _requests(model: Path) -> Iterator[tuple[str, dict | None, str]]:
    """Paths, bodies (None: a GET) and keys, in an order that leaves the server going."""
    yield "/v1/models", None, KEY
    yield "/v1/models", None, "another"
    yield "/server_info?config_format=json", None, KEY
    yield "/no_such_route", None, KEY
    yield "/is_paused", None, KEY
    for mode in ("abort", "keep"):
        yield f"/pause?mode={mode}", {}, KEY
        yield "/resume", {}, KEY
    yield "/pause?mode=wait", {}, KEY
    yield "/is_paused", None, KEY
    yield (
        "/collective_rpc",
        {"method": "reload_weights", "kwargs": {"weights_path": str(model)}},
        KEY,
    )
    yield "/reset_prefix_cache", {}, KEY
    yield "/resume", {}, KEY
    yield "/update_weight_version", {"new_version": "1"}, KEY
    yield "/weight_info", None, KEY
    prompt = {"prompt": [5, 6, 7, 8], "return_token_ids": True}
    options = sampling_options(num_generations=2, max_new_tokens=3, temperature=0.7, eos_ids=[1])
    yield "/v1/completions", prompt | options | {"seed": 3}, KEY
    yield "/v1/completions", prompt | options | {"seed": 3}, "another"
    yield "/v1/completions", prompt | scoring_options(), KEY


def _ask(url: str, body: dict | None, key: str) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _lacking(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """What the first has that the second has not, or has of another type."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            where
            for name, value in ours.items()
            for where in (
                _lacking(value, theirs[name], f"{path}.{name}")
                if name in theirs
                else [f"{path}.{name}"]
            )
        ]
    if isinstance(ours, list) and isinstance(theirs, list):
        pairs = zip(ours, theirs, strict=False)
        return [x for one, other in pairs for x in _lacking(one, other, f"{path}[]")]
    return [] if type(ours) is type(theirs) else [path]


@pytest.fixture(scope="module")
def untied(models: dict[str, Path], logs: Path) -> Iterator[RealServer]:
    """Serves the untied model, and adapters."""
    server = RealServer(models["untied"], logs / "untied.log", "--enable-lora")
    try:
        yield server.start()
    finally:
        server.stop()


def test_an_untied_model_stays_the_policys_over_several_steps(untied, models, tmp_path):
    run(models["untied"], tmp_path, config=config(untied), reward=rarely_equal)
    assert len(gaps(tmp_path)) == 4
    assert max(gaps(tmp_path)) < 2e-6


def test_an_adapter_is_sent_alone(untied: RealServer, models, logs: Path, tmp_path: Path, caplog):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    loaded = load_policy(models["untied"], config=config(untied))
    # the base again: the test before has left other weights there
    loaded.sampler.sync(loaded.policy)
    adapter = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    options = {"config": config(untied, learning_rate=0.02), "reward": rarely_equal}
    with caplog.at_level("INFO"):
        run(models["untied"], tmp_path, **options, peft_config=adapter)
    assert "gets the adapter alone" in caplog.text
    assert len(gaps(tmp_path)) == 4
    assert max(gaps(tmp_path)) < 2e-6
    assert "Loaded new LoRA adapter" in (logs / "untied.log").read_text()


def test_a_server_without_development_mode_is_refused(models, logs: Path):
    server = RealServer(models["tied"], logs / "plain.log", dev_mode=False)
    try:
        server.start()
        with pytest.raises(ValueError, match="is not there; start the server as: VLLM_SERVER_DEV"):
            load_policy(models["tied"], config=config(server))
    finally:
        server.stop()


SCRIPT = """
import grao_fast

def rare(prompts, completions):
    return [float(sum(map(ord, text)) % 101) for text in completions]

rows = [{"prompt": p, "reference": p[::-1]} for p in ["one", "two and", "three", "4", "five"]]
config = grao_fast.GRAOConfig(
    num_generations=4, max_new_tokens=8, prompts_per_step=4, max_tokens_per_microbatch=120,
    learning_rate=3e-3, max_steps=3, save_steps=0, temperature=1.0, disable_tqdm=True, device="cpu",
    use_vllm=True, OPTIONS
)
grao_fast.train("MODEL", rows, rare, config=config, output_dir="output")
"""


def run_script(
    model: Path, folder: Path, options: str, *, before: str = "", processes: int = 1, **env: str
) -> subprocess.CompletedProcess:
    """A plain script, without a guard for its main module, run by vLLM's Python."""
    command = [str(BIN / "python")]
    if processes > 1:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    imports = subprocess.run([BIN / "python", "-c", "import grao_fast"], capture_output=True)
    if imports.returncode:
        pytest.skip(f"grao-fast is not installed for {BIN / 'python'}")
    script = folder / "script.py"
    script.write_text(before + SCRIPT.replace("MODEL", str(model)).replace("OPTIONS", options))
    return subprocess.run(
        [*command, script], cwd=folder, env=environment(**env), capture_output=True, text=True
    )


ENGINE = "vllm_max_model_length={}, vllm_gpu_memory_utilization=0.1"


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_an_engine_in_a_plain_script_stays_the_policys(models, tmp_path: Path, name: str):
    done = run_script(models[name], tmp_path, ENGINE.format(64))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(gaps(tmp_path / "output")) == 3
    assert max(gaps(tmp_path / "output")) < 2e-6
    assert "EngineCore pid" not in done.stdout + done.stderr  # no process but the script's


def test_an_engine_that_cannot_start_is_one_line(models, tmp_path: Path):
    done = run_script(models["tied"], tmp_path, ENGINE.format(10_000))
    assert done.returncode != 0
    assert "UserError: vLLM's engine did not start: " in done.stderr.strip().splitlines()[-1]


def test_weights_go_by_vllms_own_routes_where_it_was_started_for_them(models, logs, tmp_path):
    """start_weight_update, update_weights, finish_weight_update; a tied head arrives too."""
    plugin = save_plugin(tmp_path)
    transfer = ("--weight-transfer-config", '{"backend": "folder"}')
    server = RealServer(models["tied"], logs / "transfer.log", *transfer, plugin=plugin)
    try:
        server.start()
        done = run_script(
            models["tied"],
            tmp_path,
            f'vllm_mode="server", vllm_server_base_url="{server.url}"',
            before="import folder_transfer\nfolder_transfer.register_trainer('.')\n".replace(
                "'.'", repr(str(tmp_path))
            ),
            PYTHONPATH=str(plugin),
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(gaps(tmp_path / "output")) == 3
    assert max(gaps(tmp_path / "output")) < 2e-6
    assert len(list(tmp_path.glob("*.safetensors"))) == 5  # two for the proof, one a step
    said = server.log.read_text()
    routes = ("/pause", "/start_weight_update", "/update_weights", "/finish_weight_update")
    assert all(said.count(f"POST {route}") == 5 for route in routes)
    assert "/collective_rpc" not in said.split("Application startup complete")[1]
