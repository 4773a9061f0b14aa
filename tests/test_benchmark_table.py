"""The documents' tables are what benchmarks/table.py makes of the committed results, and the
batches that the benchmarks are run on are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import table
import token_plots
import torch
from batches import REFERENCE_ADVANTAGE, make_batch

from grao_fast.kernels import linear_grao_loss, linear_weighted_cross_entropy

ROOT = Path(__file__).parents[1]


def row(**facts: Any) -> dict[str, Any]:
    return {
        "variant": "naive",
        "label": "naive: full logits",
        "shape_TDV": [256, 2, 8],
        "dtype": "float32",
        "rounds": 3,
        "median": 1.5,
        "q1": 1.0,
        "q3": 2.0,
        "gemm_seconds": 1.2,
        "gemm_ratio": 1.25,
        "peak_extra_mib": 10.4,
    } | facts


def kept(rows: dict[str, list[dict[str, Any]]], folder: Path, monkeypatch) -> list[Path]:
    """`keep` on what pytest-benchmark would write of these rows of these files."""
    machine = {"device": "A processor", "threads": 2, "torch": "2.13", "load": 0.25}
    run = {
        "machine_info": {"node": "secret-host", "facts": machine | {"trl": "not installed"}},
        "datetime": "2026-01-02T03:04:05",
        "absent": {
            "TRL": "not installed: pip install trl",
            "CCE": "GPUs only",
            "FLCE": "GPUs only",
        },
        "benchmarks": [
            {"fullname": f"benchmarks/bench_{name}.py::test", "extra_info": own}
            for name, several in rows.items()
            for own in several
        ],
    }
    (folder / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(table, "RESULTS", folder)
    return table.keep(folder / "run.json", "here")


def filled(name: str) -> str:
    return table.write_tables(f"<!-- table: {name} -->\nold\n<!-- end -->")


STARTS = {
    "README.md": {"linear_grao-cpu": "| T="},
    "docs/memory-and-speed.md": {
        "linear_grao-cpu": "| T=",
        "occupancy-cpu": "| T=",
        "accuracy-cpu": "| T=",
        "tokens-cpu": "![",
        "step-cpu": "| optimiser step",
    },
    "docs/objectives.md": {"objectives-cpu": "| objective"},
    "docs/kernels.md": {"registers-compiled": "| ratio"},
    "docs/results/families.md": {"families-cpu": "| float32 |"},
    "docs/scaling.md": {"processes-cpu": "| 8 prompts"},
    "docs/results/trl.md": {"trainer_curves-cpu": "![", "trainers-cpu": "| trainer"},
}


@pytest.mark.parametrize("page", STARTS)
def test_no_figure_of_a_table_was_written_by_hand(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    for name, start in STARTS[page].items():
        assert f"<!-- table: {name} -->\n{start}" in text
    assert table.write_tables(text, path.parent) == text


def test_links_of_a_table_are_relative_to_its_document() -> None:
    marked = "<!-- table: tokens-cpu -->\n<!-- end -->"
    assert "](docs/results/tokens-cpu-time.png)" in table.write_tables(marked)
    text = table.write_tables(marked, ROOT / "docs")
    assert "](results/tokens-cpu-time.png)" in text
    assert "versions in `benchmarks/results/tokens-cpu.json`." in text


def test_documents_with_tables_are_filled_and_others_left(tmp_path: Path, monkeypatch) -> None:
    kept({"linear_grao": [row()]}, tmp_path, monkeypatch)
    marked = "<!-- table: linear_grao-here -->\nold\n<!-- end -->\n"
    readme, with_table, without = (tmp_path / n for n in ("README.md", "a.md", "b.md"))
    for path, text in ((readme, marked), (with_table, marked), (without, "old\r\n")):
        path.write_bytes(text.encode())
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(table, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["table.py"])
    table.main()
    for path in (readme, with_table):
        assert "| naive: full logits | 1.50" in path.read_text()
    assert without.read_bytes() == b"old\r\n"


def test_keep_drops_the_hosts_name_and_the_table_names_the_absent(tmp_path: Path, monkeypatch):
    """Each shape has a table of its own, in milliseconds where all its times are short."""
    rows = [row(), row(label="ours", median=0.5, q1=0.25, q3=0.75)]
    rows.append(row(label="fast", median=0.05, q1=0.0496, q3=0.0504, shape_TDV=[512, 2, 8]))
    (path,) = kept({"linear_grao": rows}, tmp_path, monkeypatch)
    assert path.name == "linear_grao-here.json"
    assert "secret-host" not in path.read_text()
    text = filled("linear_grao-here")
    assert "old" not in text
    ours, naive = (line for line in text.splitlines() if line.startswith(("| ours", "| naive")))
    assert ours == "| ours | 0.50 (0.25 to 0.75) | 1.25 | 10 |"  # the fastest first
    assert naive == "| naive: full logits | 1.50 (1.00 to 2.00) | 1.25 | 10 |"
    assert "| T=256 D=2 V=8, float32 | seconds" in text and "| T=512 D=2 V=8, float32 | ms" in text
    assert "| fast | 50.0 (49.6 to 50.4) |" in text
    assert "A processor, 2 CPU threads, load average 0.2 at the start; torch 2.13;" in text
    assert "Not run: TRL (not installed: pip install trl); CCE, FLCE (GPUs only)." in text


def test_occupancy_is_over_the_full_batch(tmp_path: Path, monkeypatch) -> None:
    rows = [
        row(live=1.0, median=2.0),
        row(live=0.25, median=0.5),
        row(label="b", variant="b", live=1.0),
    ]
    kept({"occupancy": rows}, tmp_path, monkeypatch)
    text = filled("occupancy-here")
    assert "100% live, seconds | 25% live, seconds | 25% over 100% |" in text
    assert "| naive: full logits | 2.00 | 0.50 | 0.25 |" in text
    assert "| b | 1.50 | - | - |" in text  # it had no memory for the other, say


def test_accuracy_marks_the_least_error(tmp_path: Path, monkeypatch) -> None:
    rows = [
        row(label=label, variant=label, logits=logits, errors={"loss": error})
        for logits in ("flat", "peaked")
        for label, error in (("a", 2e-7), ("b", 3.04e-6 if logits == "flat" else 1e-7))
    ]
    kept({"accuracy": rows}, tmp_path, monkeypatch)
    text = filled("accuracy-here")
    assert "| flat: loss | peaked: loss |" in text
    assert "| a | **2.0e-07** | 2.0e-07 |" in text
    assert "| b | 3.0e-06 | **1.0e-07** |" in text


def test_a_step_stands_beside_the_better_of_trls_ways(tmp_path: Path, monkeypatch) -> None:
    rows = [
        row(title="step, a model", case=case, variant=variant, tokens_per_s=rate, peak_extra_mib=m)
        for case, variant, rate, m in (
            ("G=4", "ours", 300.0, 7.0),
            ("G=4", "trl_whole", 100.0, 90.0),
            ("G=4", "trl_groups", 150.0, 20.0),
            ("G=8", "ours", 200.4, None),
        )
    ]
    kept({"step": rows}, tmp_path, monkeypatch)
    text = filled("step-here")
    assert "| step, a model | grao-fast, tokens a second |" in text
    assert "| G=4 | 300 | 150 | 2.00 | 7 | 20 |" in text
    assert "| G=8 | 200 | - | - | - | - |" in text


def test_families_have_one_row_each_without_times(tmp_path: Path, monkeypatch) -> None:
    pairs = {"packed, repeated": {"loss": 0.0, "worst parameter": 1.24e-6}, "b": {"loss": 3e-7}}
    rows = [
        row(
            family=family,
            variant=variant,
            errors=pairs,
            tokens={"packed": 40, "repeated": 100},
            padding=30,
        )
        for family in ("Llama", "Qwen3")
        for variant in ("packed", "repeated")
    ]
    kept({"families": rows}, tmp_path, monkeypatch)
    text = filled("families-here")
    heads = ["packed, repeated: loss", "packed, repeated: worst parameter", "b: loss"]
    assert f"| float32 | {' | '.join(heads)} |" in text
    for family in ("Llama", "Qwen3"):
        assert text.count(f"| {family} | 0.0e+00 | 1.2e-06 | 3.0e-07 | 40, 100 (70) |\n") == 1
    assert "1.5" not in text  # the median
    assert "A processor, 2 CPU threads" in text


def test_plots_have_a_line_for_every_contender(tmp_path: Path, monkeypatch) -> None:
    rows = [
        row(label=label, variant=label, shape_TDV=[tokens, 2, 8], median=tokens / 100)
        for label in ("grao", "b")
        for tokens in (256, 512, 1024)[: 2 if label == "b" else 3]
    ]
    kept({"tokens": rows}, tmp_path, monkeypatch)
    result = json.loads((tmp_path / "tokens-here.json").read_text())
    for path in token_plots.draw("tokens-here", result, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"](docs/results/{path.name})" in filled("tokens-here")
    axes = token_plots._figure(result, "time", "").axes[0]
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert lines["grao"] == [256, 512, 1024]
    assert lines["b"] == [256, 512]
    assert lines["the three bare GEMMs"] == [256, 512, 1024]


@pytest.mark.parametrize("live", [1.0, 0.5, 0.25, 0.1])
def test_batches_have_the_share_of_live_rows_they_were_asked_for(live: float) -> None:
    batch = make_batch((2048, 8, 31), torch.float32, "cpu", live=live)
    assert int((batch.weight_T != 0).sum()) == round(live * 2048)
    ours = linear_grao_loss(*batch[:5], reference_advantage=REFERENCE_ADVANTAGE).loss
    weighted = linear_weighted_cross_entropy(*batch[:3], batch.weight_T).loss
    assert ours.item() == pytest.approx(weighted.item(), rel=1e-5, abs=1e-6)
    if live < 1:  # both kinds of dead rows
        assert (batch.sequence_T < 0).any()
        assert ((batch.weight_T == 0) & (batch.sequence_T >= 0)).any()


def test_batches_refuse_parts_of_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 256, whole groups, got 300"):
        make_batch((300, 8, 31), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"live must be in \(0, 1\], got 0"):
        make_batch((256, 8, 31), torch.float32, "cpu", live=0)


def test_processes_stand_below_each_other(tmp_path: Path, monkeypatch) -> None:
    rows = [
        row(
            label="grao-fast",
            case="8 prompts",
            title="A model",
            processes=n,
            sharding="full",
            micro_batches=8 // n,
            cores=2,
            peak_mib=100.4 / n,
            held_mib=8.0 / n,
            sent_mib=0.5 * (n - 1),
            planned_mib=0.5 * (n - 1),
        )
        for n in (1, 2)
    ]
    kept({"processes": rows}, tmp_path, monkeypatch)
    text = filled("processes-here")
    assert "| grao-fast | 1 | - | 8 | 1.50 (1.00 to 2.00) | 100 | 8.0 | - | - |" in text
    assert "| grao-fast | 2 | full | 4 | 1.50 (1.00 to 2.00) | 50 | 4.0 | 0.50 | 0.50 |" in text
    assert "A model. Median of 3 rounds" in text and "of 2 cores" in text


def test_objectives_have_one_row_each_with_the_others_beside_ours(
    tmp_path: Path, monkeypatch
) -> None:
    facts = {
        "objective": "grpo",
        "passes": 1,
        "live": 0.44,
        "errors": {"loss": 1e-8, "dhead": 4e-7},
    }
    other = {"objective": "dpo(beta=0.2)", "passes": 2, "live": 0.1, "errors": {"loss": 2e-6}}
    rows = [
        row(variant="ours", median=0.5, q1=0.25, q3=0.75, **facts),
        row(variant="trl", median=1.0, **facts | {"errors": {"loss": 3e-5}}),
        row(variant="liger", median=0.75, **facts),
        row(variant="naive", median=0.25, peak_extra_mib=None, **facts),
        row(variant="ours", median=0.125, q1=0.1, q3=0.2, **other),
        row(variant="naive", median=0.5, **other),
    ]
    kept({"objectives": rows}, tmp_path, monkeypatch)
    text = filled("objectives-here")
    cells = "500 (250 to 750) | 2.00 | 1.50 | 0.50 | 10, 10, 10, - | 4e-07, 3e-05, 4e-07, 4e-07 |"
    assert f"| `grpo` | 1 | 44% | {cells}" in text
    cells = "125 (100 to 200) | - | - | 4.00 | 10, -, -, 10 | 2e-06, -, -, 2e-06 |"
    assert f"| `dpo(beta=0.2)` | 2 | 10% | {cells}" in text
    assert "T=256 D=2 V=8, float32" in text and "take 1200 ms" in text


def test_registers_have_a_row_a_form_and_say_what_has_changed(tmp_path: Path, monkeypatch) -> None:
    form = {"form": "clipped None", "ratio": "clipped", "shaping": None}
    code = {"registers": 40, "spilled": 8, "loads": 4, "stores": 2}
    result = {
        "command": "c",
        "date": "2026-01-02",
        "machine": {"triton": "3.9"},
        "kernel": "V=8",
        "rows": [
            form | code | {"device": "sm_80"},
            form | code | {"device": "sm_90", "spilled": 0},
        ],
        "before": {"commit": "abc", "kernels": 3, "gone": ["d"], "differing": {"e": {}}},
    }
    (tmp_path / "registers-here.json").write_text(json.dumps(result))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = filled("registers-here")
    assert '| `"clipped"` | none | 40; 8; 4 + 2 | 40; 0; 4 + 2 |' in text
    assert "(abc), 2 of 3 have the same" in text and "; not d, e." in text


def test_times_of_tiny_inputs_are_not_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    run = tmp_path / "run.json"
    run.write_text(json.dumps({"benchmarks": [{"fullname": "bench_step.py"}], "quick": True}))
    with pytest.raises(SystemExit, match="tiny inputs: run the benchmarks without --quick"):
        table.keep(run, "here")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
