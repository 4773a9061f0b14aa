"""Compiles the kernels ahead of time for devices that may be absent, and prints facts as JSON.

    python tests/kernels/compile_kernels.py [DEVICE ...]

test_compile.py runs it in its own process, as one process cannot interpret and compile kernels.
Pointers and strides are marked divisible by 16 exactly where the launcher's are.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grao_fast.kernels.rows import triton_kernels as row_kernels
from grao_fast.kernels.rows import triton_rows
from grao_fast.kernels.rows.forms import RATIOS, SHAPINGS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_LINKER = Path("/opt/rocm/llvm/bin/ld.lld")
if Version(triton.__version__) < Version("3.5") and not _LINKER.exists():
    del TARGETS["gfx942"]  # its linker came with Triton 3.5
# Rows of 4096 and 8192 are read once. Wider ones are read twice, by code that depends on V only in
# whether 16 divides it.
VOCABULARIES = (49152, 128256, 151936, 262144, 32001, 8192, 4096, 7)


def compile_kernel(kernel, types: dict[str, str], constants: dict, aligned, target, warps: int):
    names = [*types, *constants]
    assert names == list(kernel.arg_names), kernel.arg_names
    source = ASTSource(
        kernel,
        types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


def rows(
    target,
    gradient: str,
    V: int,
    transformed: bool,
    write_gradient: bool,
    entropy: bool = False,
    forms: bool = False,
    entropy_weight: bool = False,
    ratio: str = "clipped",
    shaping: str | None = None,
    kl_times_ratio: bool = False,
):
    shape = triton_rows.launch_shape(V, target.warp_size)
    types = {
        **row_types(gradient),
        "weight_ptr": "*fp32",
        "logprob_ptr": "*fp32",
        "entropy_ptr": "*fp32",
        "entropy_weight_ptr": "*fp32",
        **dict.fromkeys(("top1_ptr", "row_constants_ptr", "kl_coef_ptr"), "*fp32"),
        **dict.fromkeys(("constants_stride", "row_stride", "V"), "i32"),
        **dict.fromkeys(
            ("slope", "inner", "cap", "low", "high", "importance_cap"),
            "fp32",
        ),
    }
    constants = {
        "HAS_BIAS": transformed,
        "HAS_CAP": transformed,
        "HAS_ENTROPY": entropy,
        "HAS_ENTROPY_WEIGHT": entropy_weight,
        "HAS_TOP1": forms,
        "RATIO": RATIOS[ratio].number if forms else 0,
        "SHAPING": 0 if shaping is None else SHAPINGS[shaping].number,
        "KL_TIMES_RATIO": kl_times_ratio,
        "WRITE_GRADIENT": write_gradient,
        "ROW_FITS": shape.row_fits,
        "BLOCK": shape.block,
    }
    kernel = row_kernels._policy_rows_kernel
    return compile_kernel(kernel, types, constants, aligned_rows(V), target, shape.warps)


def row_types(gradient: str) -> dict[str, str]:
    """The first parameters of the row kernels, or some of them."""
    return {
        "logits_ptr": "*fp32",
        "dlogits_ptr": f"*{gradient}",
        "target_grad_ptr": "*fp32",
        "bias_ptr": "*fp32",
        "target_ptr": "*i64",
    }


def aligned_rows(V: int) -> list[str]:
    return ["logits_ptr", "dlogits_ptr", "bias_ptr", "row_stride"] + ["V"] * (V % 16 == 0)


def shard_statistics(target, V: int, transformed: bool, entropy: bool):
    shape = triton_rows.launch_shape(V, target.warp_size)
    types = row_types("fp32") | {"statistics_ptr": "*fp32"} | shard_scalars()
    del types["dlogits_ptr"], types["target_grad_ptr"]
    constants = {"HAS_BIAS": transformed, "HAS_CAP": transformed, "HAS_ENTROPY": entropy}
    constants["BLOCK"] = shape.block
    aligned = [name for name in aligned_rows(V) if name in types]
    kernel = row_kernels._row_statistics_kernel
    return compile_kernel(kernel, types, constants, aligned, target, shape.warps)


def shard_gradient(target, gradient: str, V: int, transformed: bool, entropy: bool):
    shape = triton_rows.launch_shape(V, target.warp_size)
    types = {name: row_types(gradient)[name] for name in ("logits_ptr", "dlogits_ptr", "bias_ptr")}
    types |= {"zero_ptr": "*i64", "factors_ptr": "*fp32"} | shard_scalars()
    constants = {"HAS_BIAS": transformed, "HAS_CAP": transformed, "HAS_PULL": entropy}
    constants["BLOCK"] = shape.block
    kernel = row_kernels._row_gradient_kernel
    return compile_kernel(kernel, types, constants, aligned_rows(V), target, shape.warps)


def shard_scalars() -> dict[str, str]:
    return dict.fromkeys(("R", "row_stride", "V"), "i32") | dict.fromkeys(
        ("slope", "inner", "cap"), "fp32"
    )


def scale(target, in_place: bool):
    types = {"gradient_ptr": "*bf16", "out_ptr": "*bf16", "scale_ptr": "*fp32", "numel": "i64"}
    constants = {"IN_PLACE": in_place, "BLOCK": triton_rows._SCALE_BLOCK}
    return compile_kernel(
        row_kernels._scale_kernel, types, constants, ["gradient_ptr", "out_ptr"], target, 8
    )


def facts(compiled) -> dict:
    """Registers, spilled bytes, shared memory and widths of global accesses."""
    found = {"shared": compiled.metadata.shared}
    if "ptx" in compiled.asm:
        found |= resource_usage(compiled.asm["cubin"])
        accesses = re.findall(r"\b(ld|st)\.global((?:\.\w+)*)", compiled.asm["ptx"])
        widths = Counter(f"{kind}{access_bits(suffix)}" for kind, suffix in accesses)
    else:
        assembly = compiled.asm["amdgcn"]
        found["registers"] = int(re.findall(r"\.vgpr_count:\s+(\d+)", assembly)[0])
        spills = r"(?:gpr_spill_count|private_segment_fixed_size):\s+(\d+)"
        found["spilled"] = sum(int(number) for number in re.findall(spills, assembly))
        accesses = re.findall(r"(?:global|buffer)_(load|store)_(\w+)", assembly)
        bits = {"dwordx4": 128, "dwordx2": 64, "dword": 32}
        widths = Counter(
            f"{'ld' if kind == 'load' else 'st'}{bits.get(width, 16)}" for kind, width in accesses
        )
    return found | {"accesses": widths}


def access_bits(suffix: str) -> int:
    vector = re.search(r"\.v(\d)", suffix)
    return int(re.findall(r"\.[bfus](\d+)", suffix)[-1]) * int(vector[1] if vector else 1)


def resource_usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}


def compile_for(name: str) -> dict[str, dict]:
    """Facts of every kernel and variant for one device, by device, kernel and variant."""
    target, results = TARGETS[name], {}
    for gradient, V, transformed in product(("fp32", "bf16"), VOCABULARIES, (False, True)):
        form = "transformed" if transformed else "plain"
        compiled = rows(target, gradient, V, transformed, True)
        results[f"{name} rows {gradient} {V} {form}"] = facts(compiled)
    results[f"{name} logprobs"] = facts(rows(target, "fp32", 49152, True, False))
    results[f"{name} entropies"] = facts(rows(target, "fp32", 49152, True, False, True))
    for gradient, transformed in product(("fp32", "bf16"), (False, True)):
        compiled = rows(target, gradient, 49152, transformed, True, True, entropy_weight=True)
        results[f"{name} entropy-rows {gradient} {transformed}"] = facts(compiled)
        compiled = rows(target, gradient, 49152, transformed, True, True, True)
        results[f"{name} off-policy-rows {gradient} {transformed}"] = facts(compiled)
        form = "transformed" if transformed else "plain"  # as `grao_fast.train` runs them
        compiled = rows(target, gradient, 49152, transformed, True, True)
        results[f"{name} trained-rows {gradient} {form}"] = facts(compiled)
    compiled = rows(target, "bf16", 49152, True, True, True, True, kl_times_ratio=True)
    results[f"{name} rho-kl-rows bf16"] = facts(compiled)
    for ratio, shaping in (("truncated", None), *product(["clipped"], SHAPINGS)):
        options = {"forms": True, "ratio": ratio, "shaping": shaping}
        compiled = rows(target, "bf16", 49152, True, True, True, **options)
        results[f"{name} {shaping or ratio}-rows bf16"] = facts(compiled)
    for transformed, entropy in ((False, False), (True, True)):
        form = (18992, transformed, entropy)  # an eighth of 151936
        results[f"{name} shard-statistics {form}"] = facts(shard_statistics(target, *form))
        for gradient in ("fp32", "bf16"):
            compiled = shard_gradient(target, gradient, *form)
            results[f"{name} shard-gradient {gradient} {form}"] = facts(compiled)
    results[f"{name} scale"] = facts(scale(target, True))
    return results


if __name__ == "__main__":
    devices = [name for name in sys.argv[1:] or TARGETS if name in TARGETS]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        found = [item for results in pool.map(compile_for, devices) for item in results.items()]
    print(json.dumps(dict(found)))
