"""Checkpoints of several processes: written by all, read by any number of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import CONFIG, ROWS, VARIANTS, Variant, model_of, reward_of
from processes import Ended, launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grao_fast
from grao_fast.models import sharded_saving
from grao_fast.training.checkpoint import choose_checkpoint, list_checkpoints, verify

# Of weights of order 1 after two steps of 1e-3, as in test_parity.
ROUNDING = 5e-5
SHORT = CONFIG.replace(
    max_steps=2, save_steps=1, prompts_per_step=3, num_generations=3, max_new_tokens=6
)
FEW = ["LoRA, KL, two updates", "mixture"]
# every way to shard, on as many processes as it needs, and what may be saved otherwise
MANY = ["untied", "hybrid", "LoRA", "mixture, odd"]


def run(name: str, output: Path, models: Path) -> None:
    """Train a variant in this process or as one of several, from where its folder is."""
    torch.set_num_threads(1)
    variant = VARIANTS[name]
    model, tokenizer = model_of(variant.model, models / variant.model)
    grao_fast.train(
        model,
        ROWS,
        reward_of(0.0),
        config=SHORT.replace(**options_of(variant)),
        tokenizer=tokenizer,
        peft_config=lora() if variant.lora else None,
        output_dir=output,
        resume_from_checkpoint="auto",
    )


def options_of(variant: Variant) -> dict[str, Any]:
    """Without replicas where there are too few processes for them."""
    if "replicas" in variant.options and int(os.environ.get("WORLD_SIZE", "1")) < 4:
        return {}
    return variant.options


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def run_all(outputs: Iterable[tuple[str, Path]], folder: Path, size: int) -> None:
    """Run variants, each in its folder, in `size` processes that are started once."""
    outputs = list(outputs)

    def body(rank: int) -> None:
        for name, output in outputs:
            run(name, output, folder / "models")

    (folder / "printed").mkdir(exist_ok=True)
    ended = launch(body, folder / "printed", size=size, timeout=600)
    assert all(process.status == 0 for process in ended), [process.stderr for process in ended]


def cut_short(whole: Path, cut: Path) -> Path:
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(whole, cut)
    for name in ("final", "checkpoint-2"):
        shutil.rmtree(cut / name)
    (cut / "summary.json").unlink()
    return cut


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def off(one: Path, other: Path) -> float:
    ours, theirs = saved(one / "final"), saved(other / "final")
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def resume(folder: Path, names: list[str], pairs: list[tuple[int, int]]) -> None:
    """Run `names` in the numbers of processes in `pairs`; then resume runs of the one in another.

    A run is in "NAME 2", and one of 2 processes that 4 had begun in "NAME 4 2".
    """
    for kind in ("tied", "untied"):
        model_of(kind, folder / "models" / kind)
    for size in sorted({size for pair in pairs for size in pair}):
        run_all([(name, folder / f"{name} {size}") for name in names], folder, size)
    for name in names:
        for first, then in pairs:
            cut_short(folder / f"{name} {first}", folder / f"{name} {first} {then}")
    for size in {then for _, then in pairs}:
        cuts = [f"{first} {then}" for first, then in pairs if then == size]
        run_all([(name, folder / f"{name} {cut}") for name in names for cut in cuts], folder, size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    resume(folder, FEW, [(2, 1), (1, 2), (2, 2)])
    return folder


def check_resumed(folder: Path, name: str, first: int, then: int) -> None:
    resumed = folder / f"{name} {first} {then}"
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").open()]
    assert steps == [1, 2]
    for whole in (first, then):
        assert off(folder / f"{name} {whole}", resumed) <= ROUNDING
    for path in (*list_checkpoints(resumed), *list_checkpoints(folder / f"{name} {first}")):
        verify(path)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_in_another_number_of_processes(
    folder: Path, name: str, first: int, then: int
) -> None:
    check_resumed(folder, name, first, then)


@pytest.mark.parametrize("name", FEW)
def test_it_has_the_same_bits_in_the_same_number(folder: Path, name: str) -> None:
    whole, resumed = (saved(folder / run / "final") for run in (f"{name} 2", f"{name} 2 2"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole.keys() | resumed.keys())


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_four_two_and_one_process_go_on_with_each_others_runs(tmp_path: Path, name: str) -> None:
    pairs = [(4, 2), (2, 1), (1, 4), (4, 4), (4, 1)]
    resume(tmp_path, [name], pairs)
    for first, then in pairs:
        check_resumed(tmp_path, name, first, then)
    whole, resumed = (saved(tmp_path / run / "final") for run in (f"{name} 4", f"{name} 4 4"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole.keys() | resumed.keys())


def test_all_processes_write_a_model_that_loads(folder: Path) -> None:
    """Its files are named, and its tensors called, as one process's `save_pretrained` does."""
    one, two = (folder / f"mixture {size}" / "final" for size in (1, 2))
    weights = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    files = {path.name for path in two.iterdir()}
    assert files == {path.name for path in one.iterdir()} - {"model.safetensors"} | weights | {
        "model.safetensors.index.json"
    }
    index = json.loads((two / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == saved(one).keys()
    assert set(index["weight_map"].values()) == weights
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved(two).values())
    assert index["metadata"]["total_size"] == size
    for text in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (one / text).read_text() == (two / text).read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(two, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForCausalLM.from_pretrained(one).state_dict()
    for key, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=ROUNDING)


def fail_on_rank_1(folder: Path, failing: str) -> list[Ended]:
    """A run of two processes, of which rank 1 finds no room in a folder whose path holds a word.

    Temporary folders are in `folder / "tmp"`.
    """
    own = sharded_saving.save_file

    def body(rank: int) -> None:
        def full(tensors: object, path: Path, **options: object) -> None:
            if failing in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            own(tensors, path, **options)

        if rank == 1:
            sharded_saving.save_file = full
        run("untied", folder / "run", folder / "models")

    for name in ("printed", "tmp"):
        (folder / name).mkdir()
    model_of("untied", folder / "models" / "untied")
    return launch(body, folder / "printed")


def test_a_process_without_room_ends_all_with_its_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    ended = fail_on_rank_1(tmp_path, "checkpoint-2")
    assert [each.status for each in ended] == [1, 1], ended
    said = [line for each in ended for line in each.lines if "SaveError: " in line]
    assert len(said) == 1, ended
    assert "No space left on device" in said[0] and "rank 1 of 2" in said[0]
    assert not list(tmp_path.glob(".grao-fast-*"))
    assert choose_checkpoint(tmp_path / "run", True).name == "checkpoint-1"
    run_all([("untied", tmp_path / "run")], tmp_path, 2)
    whole, resumed = saved(folder / "untied 2" / "final"), saved(tmp_path / "run" / "final")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_where_that_folder_takes_nothing_all_write_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    fail_on_rank_1(tmp_path, str(tmp_path / "run"))
    assert list_checkpoints(tmp_path / "run") == []
    (left,) = (tmp_path / "tmp").glob("grao-fast-rescued-*/checkpoint-1")
    verify(left)
    left.rename(tmp_path / "run" / left.name)
    run_all([("untied", tmp_path / "run")], tmp_path, 2)
    whole, resumed = saved(folder / "untied 2" / "final"), saved(tmp_path / "run" / "final")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
