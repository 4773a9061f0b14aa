"""The README's tables are what benchmarks/table.py makes of the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table_script():
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_figure_in_the_readme_was_written_by_hand(table_script):
    text = (ROOT / "README.md").read_text()
    assert "<!-- table: linear_grao-cpu -->\n| forward" in text
    assert table_script.write_tables(text) == text


def test_keep_drops_what_names_the_machine(table_script, tmp_path: Path, monkeypatch):
    shared = {"shape_TDV": [4, 2, 8], "dtype": "torch.float32", "torch": "2.13", "threads": 1}
    row = {
        "fullname": "benchmarks/test_linear_grao.py::test[naive]",
        "params": {"variant": "naive"},
        "stats": {"median": 1.5, "q1": 1.0, "q3": 2.0, "rounds": 5, "data": [1.5]},
        "extra_info": {**shared, "gemm_ratio": 1.25, "peak_extra_mib": 10.4},
    }
    run = {
        "machine_info": {
            "node": "secret-host",
            "cpu": {"brand_raw": "A processor"},
            "python_version": "3.11.7",
        },
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [row],
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    monkeypatch.setattr(table_script, "RESULTS", tmp_path)
    path = table_script.keep(tmp_path / "run.json", "here")
    assert path.name == "linear_grao-here.json"
    assert "secret-host" not in path.read_text()
    text = table_script.write_tables("<!-- table: linear_grao-here -->\nold\n<!-- end -->")
    assert "| 1.50 (1.00 to 2.00) | 1.25 | 10 |" in text
    assert "old" not in text
