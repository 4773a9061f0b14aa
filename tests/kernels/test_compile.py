"""The kernels' machine code for several devices: registers, spills, width of accesses."""

from __future__ import annotations

import json
import subprocess
from collections import Counter

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")


DEVICES = (
    "sm_90",
    "gfx942",
    *(pytest.param(d, marks=pytest.mark.slow) for d in ("sm_80", "sm_100")),
)


@pytest.fixture(scope="module")
def all_compiled(compiler: subprocess.Popen[str]) -> dict[str, dict]:
    """Facts of each kernel, by device, kernel and variant."""
    printed, said = compiler.communicate()
    assert compiler.returncode == 0, said[-4000:]
    return json.loads(printed)


@pytest.fixture(scope="module", params=DEVICES)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def compiled(all_compiled: dict[str, dict], target: str) -> dict[str, dict]:
    """Those of one device."""
    found = {name: facts for name, facts in all_compiled.items() if name.startswith(f"{target} ")}
    if target == "gfx942" and not found:
        assert Version(triton.__version__) < Version("3.5")
        pytest.skip("its linker came with Triton 3.5")
    return found


def test_every_kernel_is_there(compiled: dict[str, dict]) -> None:
    assert {name.split()[1] for name in compiled} == {
        "rows",
        "logprobs",
        "entropies",
        "entropy-rows",
        "off-policy-rows",
        "rho-kl-rows",
        "truncated-rows",
        "dft-rows",
        "chord-rows",
        "luffy-rows",
        "trained-rows",
        "shard-statistics",
        "shard-gradient",
        "scale",
    }


def test_nothing_spills_and_shared_memory_is_small(compiled: dict[str, dict]) -> None:
    for name, facts in compiled.items():
        assert facts["spilled"] == 0, name
        assert facts["shared"] <= 1024, name


def test_registers_leave_room_for_programs(compiled: dict[str, dict]) -> None:
    """Of an SM's 65536 registers, 512 threads of 40 take a third, of 64 a half, of 104 most."""
    for name, facts in compiled.items():
        counted = any(kind in name for kind in (" rows ", " trained-rows ", " shard-"))
        if "gfx942" in name or not counted:
            continue
        allowed = (64, 64) if " trained-rows " in name else (40, 64)  # with the entropy's sums
        if " 8192 " in name or " 4096 " in name:  # a whole row in registers
            allowed = (64, 104) if " 8192 " in name else (48, 64)
        assert facts["registers"] <= allowed["plain" not in name], name


def test_forms_cost_no_register_and_one_load(compiled: dict[str, dict], target: str) -> None:
    """A form is chosen when the kernel is compiled: of another form, nothing is in its code.

    A truncated ratio, and a KL multiplied by the ratio, read what a clipped ratio reads. A shaping
    reads one more number a row: which rows are shaped. Rows without a form read none of these.
    """
    clipped = compiled[f"{target} off-policy-rows bf16 True"]
    for kernel in ("rho-kl-rows", "truncated-rows", "dft-rows", "chord-rows", "luffy-rows"):
        facts = compiled[f"{target} {kernel} bf16"]
        assert facts["registers"] <= clipped["registers"], kernel
        more = Counter(facts["accesses"])
        more.subtract(clipped["accesses"])
        expected = {} if kernel in ("rho-kl-rows", "truncated-rows") else {"ld32": 1}
        assert {width: n for width, n in more.items() if n} == expected, kernel
    plain = Counter(compiled[f"{target} trained-rows bf16 transformed"]["accesses"])
    assert sum(plain.values()) < sum(clipped["accesses"].values()) - 3


def test_rows_that_fit_are_read_once(compiled: dict[str, dict]) -> None:
    """8192 logits over 512 threads are four 16-byte loads, 4096 are two; twice two otherwise."""
    for name, facts in compiled.items():
        if name.startswith("sm_") and " rows " in name and "plain" in name:
            reads = {" 8192 ": 4, " 4096 ": 2, " 49152 ": 4, " 151936 ": 4}
            for V, expected in reads.items():
                if V in name:
                    assert facts["accesses"]["ld128"] == expected, (name, facts["accesses"])


def test_blocks_are_read_and_written_16_bytes_at_a_time(compiled: dict[str, dict]) -> None:
    """Only a row's scalars are narrower: weight, target, its logit and bias; and log-prob and
    target gradient, each in two branches."""
    for name, facts in compiled.items():
        accesses = Counter(facts["accesses"])
        reads = sum(number for width, number in accesses.items() if width.startswith("ld"))
        writes = sum(number for width, number in accesses.items() if width.startswith("st"))
        if " rows " in name and " 7 " not in name:
            assert accesses["ld128"] >= 1 and reads - accesses["ld128"] <= 4, (name, accesses)
            assert accesses["st128"] >= 2 and writes - accesses["st128"] <= 4, (name, accesses)
        if " shard-" in name:  # and up to five factors, or six statistics
            assert accesses["ld128"] >= 1 and reads - accesses["ld128"] <= 6, (name, accesses)
        if " shard-gradient " in name:
            assert accesses["st128"] >= 1 and writes == accesses["st128"], (name, accesses)
