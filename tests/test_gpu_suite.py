"""benchmarks/gpu_suite.py: whole on a CPU, from a bare checkout; and whatever its sections do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SUITE = str(BENCHMARKS / "gpu_suite.py")
CUDA = torch.cuda.is_available()


def python(*arguments: object, executable: object = sys.executable, path: Path, cwd: Path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [str(executable), *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


def read(out: Path) -> dict[str, dict]:
    return json.loads((out / "suite.json").read_text())["sections"]


@pytest.mark.slow
def test_runs_to_its_end_where_the_package_is_not_installed(tmp_path: Path) -> None:
    """In an environment that sees torch, triton and pytest, and no installed grao_fast."""
    venv.create(tmp_path / "bare", with_pip=False)
    bare = {
        "executable": tmp_path / "bare" / "bin" / "python",
        "path": Path(torch.__file__).parents[1],  # its .pth files, of installs, do not count here
        "cwd": tmp_path,
    }
    missing = python("-c", "import torch, pytest, grao_fast", **bare)
    assert "No module named 'grao_fast'" in missing.stderr

    done = python(SUITE, tmp_path / "out", "--tiny", **bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grao_fast: bare checkout" in done.stdout
    sections = read(tmp_path / "out")
    statuses = {name: entry["status"] for name, entry in sections.items()}
    needs_cuda = dict.fromkeys(("addressing", "attention", "sync"), "skipped")
    names = (
        "facts tests widths addressing shapes occupancy tokens step attention train_step rows "
        "determinism sync compile"
    )
    assert statuses == dict.fromkeys(names.split(), "ok") | ({} if CUDA else needs_cuda)
    table = done.stdout.splitlines()[-len(statuses) :]
    assert [line.split()[0] for line in table] == names.split()
    if not CUDA:
        assert table[3].split("  ")[-1] == "skipped: needs CUDA"
    assert len(list((tmp_path / "out").iterdir())) <= 8

    # What an empty section could not have.
    assert sections["tests"]["report"]["test_rows.py"]["passed"] >= 10
    assert sections["widths"]["report"]["passed"] == 19
    ours = sections["shapes"]["report"]["T=512 D=64 V=1031"]["grao"]
    assert ours["rounds"] == 2 and ours["median"] > 0 and max(ours["errors"].values()) < 1e-4
    assert_tables_can_be_made(tmp_path)
    step = sections["step"]["report"]["batch"]
    assert 0.25 < step["live"] / step["T"] < 0.4
    whole = sections["train_step"]["report"]
    assert whole["step"]["ours"]["useful_tokens"] == 64
    assert whole["sampling"]["ours"]["rounds"] == 2


def assert_tables_can_be_made(tmp_path: Path) -> None:
    """Of the suite's report, by the benchmarks' own table.py."""
    script = (
        "import sys, json, pathlib\n"
        f"sys.path.insert(0, {str(Path(SUITE).parent)!r})\n"
        "import keep_suite, table\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for path in keep_suite.keep(folder / 'out' / 'suite.json', 'here', folder)[1:]:\n"
        "    result = json.loads(path.read_text())\n"
        "    print(table.MAKERS[path.stem.split('-')[0]](path.stem, result))\n"
    )
    done = python("-c", script, tmp_path, path=Path(torch.__file__).parents[1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| T=512 D=64 V=1031" in done.stdout and "| `linear_grao_loss` |" in done.stdout
    assert "25% over 100%" in done.stdout and "seconds over tokens" in done.stdout
    assert (tmp_path / "suite-here.json").exists()


def run_with_sections(tmp_path: Path, code: str):
    """The command with sections of the test's own: `code` makes a list SECTIONS."""
    script = (
        "import os, sys, time\n"
        "import gpu_suite, suite.sections\n"
        "from suite.runner import Section, Skipped\n"
        f"{code}\n"
        "suite.sections.SECTIONS = SECTIONS\n"
        f"sys.argv[1:] = [{str(tmp_path / 'out')!r}, '--tiny']\n"
        "sys.exit(gpu_suite.main())\n"
    )
    return python("-c", script, path=BENCHMARKS, cwd=tmp_path)


@pytest.mark.slow
def test_what_one_section_does_does_not_lose_the_others(tmp_path: Path) -> None:
    code = """
def good(run):
    run.report["figure"] = 1.5
    return "fine"

def raising(run):
    run.report["before"] = 1
    raise ValueError("no such thing\\nand more")

def dying(run):
    run.in_time("what kills it")
    os.abort()

def hanging(run):
    run.report["before"] = 2
    run.in_time("what hangs")
    time.sleep(60)

def inapplicable(run):
    raise Skipped("needs CUDA")

def late(run):
    time.sleep(0.8)
    return "done" if run.in_time("the rest") else "in time"

SECTIONS = [Section(f.__name__, f, 5 if f is not hanging else 1.0) for f in
            (raising, dying, hanging, inapplicable)]
SECTIONS += [Section("late", late, 1.0), Section("good", good, 5)]
"""
    done = run_with_sections(tmp_path, code)
    assert done.returncode == 1, done.stdout + done.stderr
    sections = read(tmp_path / "out")
    assert {name: entry["status"] for name, entry in sections.items()} == {
        "raising": "failed",
        "dying": "failed",
        "hanging": "failed",
        "inapplicable": "skipped",
        "late": "ok",
        "good": "ok",
    }
    assert sections["raising"]["headline"] == "ValueError: no such thing"
    assert sections["raising"]["report"] == {"before": 1}
    assert "Traceback" in (tmp_path / "out" / "raising.log").read_text()
    assert "exit code" in sections["dying"]["headline"]
    assert "in dying" in (tmp_path / "out" / "dying.log").read_text()
    assert "past its limit of 1 s" in sections["hanging"]["headline"]
    assert "in hanging" in (tmp_path / "out" / "hanging.log").read_text()
    assert sections["hanging"]["report"] == {"before": 2} and sections["hanging"]["seconds"] < 30
    assert sections["late"]["report"]["left_out"] == {"the rest": "no time left"}
    assert sections["good"]["report"] == {"figure": 1.5}
    lines = done.stdout.splitlines()[-6:]
    assert "skipped: needs CUDA" in lines[3] and " ok " not in lines[3]
    assert lines[4].endswith("[1 left out]") and lines[5].split()[:2] == ["good", "ok"]


@pytest.mark.slow
def test_many_failures_leave_few_files(tmp_path: Path) -> None:
    code = (
        "def bad(run): raise ValueError('no')\n"
        "SECTIONS = [Section(f's{i}', bad, 5) for i in range(10)]"
    )
    assert run_with_sections(tmp_path, code).returncode == 1
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 8
    logs = "".join(file.read_text() for file in files if file.suffix == ".log")
    assert all(f"== s{i}\n" in logs for i in range(10))


def test_the_parent_touches_no_cuda(tmp_path: Path) -> None:
    """It forks, and CUDA does not survive that: nothing that may look for a device is imported."""
    code = (
        "SECTIONS = suite.sections.chosen('facts')\n"
        "import atexit, torch\n"
        "mine = os.getpid()\n"
        "atexit.register(lambda: os.getpid() == mine and print('loaded', *sys.modules))"
    )
    done = run_with_sections(tmp_path, code)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "suite.sections" in loaded
    assert loaded.isdisjoint({"problem", "measure", "peers", "triton", "grao_fast.kernels"})
    assert not any(name.startswith("torch._dynamo") for name in loaded)


def test_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"path": BENCHMARKS, "cwd": tmp_path}
    assert "no section 'nonsense'" in python(SUITE, out, "--sections", "nonsense", **options).stderr
    assert not out.exists()
    out.mkdir()
    (out / "suite.json").write_text("{}")
    assert "holds an earlier run" in python(SUITE, out, "--tiny", **options).stderr
    assert (out / "suite.json").read_text() == "{}"


@pytest.mark.skipif(CUDA, reason="there is a device")
def test_without_a_device_there_is_only_tiny(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python(SUITE, out, "--sections", "facts", path=BENCHMARKS, cwd=tmp_path)
    assert done.returncode == 1
    assert "there is only --tiny" in read(out)["facts"]["headline"]


@pytest.mark.slow
def test_an_install_of_another_checkout_is_passed_over(tmp_path: Path) -> None:
    other = tmp_path / "other" / "grao_fast"
    (other / "kernels").mkdir(parents=True)
    (other / "__init__.py").touch()
    (other / "kernels" / "__init__.py").touch()
    (tmp_path / "links").mkdir()
    code = (
        "import os, sys, grao_fast.kernels\n"
        f"sys.path.append({str(BENCHMARKS)!r})\n"
        "from pathlib import Path\n"
        "from suite.checkout import use_checkout\n"
        f"print(use_checkout(Path({str(tmp_path / 'links')!r})))\n"
        "import grao_fast.kernels\n"
        "print(os.path.realpath(grao_fast.kernels.__file__))\n"
    )
    done = python("-c", code, path=tmp_path / "other", cwd=tmp_path)
    how, where = done.stdout.splitlines() or [done.stderr, ""]
    assert how == "bare checkout" and where == str(ROOT / "kernels" / "__init__.py")


@pytest.mark.slow
def test_properties_are_skipped_where_hypothesis_is_missing(tmp_path: Path) -> None:
    files = [ROOT / "tests" / "kernels" / "test_advantage.py", "-k", "any_rewards or cancel"]
    plugin = ["-p", "suite.without_hypothesis", "-p", "no:hypothesispytest"]
    done = python("-m", "pytest", "-q", *plugin, *files, path=BENCHMARKS, cwd=ROOT)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
