# SPDX-License-Identifier: Apache-2.0
"""Without a GPU: the 4-bit KV-cache kernels compile for every supported architecture, and run in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia")

from vllm_comet.kernels import kv4_cache, kv4_decode, kv4_prefill  # noqa: E402

D, BLOCK = 128, 16
SHAPE = {"GROUP": 4, "D": D, "GROUPS": 1, "BLOCK": BLOCK, "LANES": 32}
KERNELS = {
    "plan": (kv4_decode._plan_kernel, {"MAX_REQUESTS": 128, "T": 64, "CHUNK": 1024}, 1),
    "decode": (kv4_decode._decode_kernel, SHAPE | {"T": 64, "ROWS": 8, "PART_ROWS": 4, "CUTS": 1}, 1),
    # planes of 64 lanes cut in two, as they span groups
    "decode-256-32": (
        kv4_decode._decode_kernel,
        SHAPE | {"D": 256, "GROUPS": 8, "T": 32, "ROWS": 8, "PART_ROWS": 4, "CUTS": 2},
        1,
    ),
    "merge": (kv4_decode._merge_kernel, {"GROUP": 4, "D": D, "PART_ROWS": 4, "E": 128, "CHUNK": 8}, 1),
    "prefill": (kv4_prefill._prefill_kernel, SHAPE | {"T": 128, "QUERIES": 32, "HEADS": 4}, 8),
    # planes of 24 lanes that span groups
    "prefill-96-32": (
        kv4_prefill._prefill_kernel, SHAPE | {"D": 96, "GROUPS": 3, "T": 128, "QUERIES": 32, "HEADS": 4}, 8),
    "gather": (kv4_prefill._gather_kernel, {k: v for k, v in SHAPE.items() if k != "GROUP"} | {"T": 32}, 4),
    "store": (
        kv4_cache._store_kernel,
        {k: v for k, v in SHAPE.items() if k != "GROUP"} | {"ROWS": 16, "ROUND_TRIP": True},
        2,
    ),
}
POINTERS = {"codes_ptr": "*i16", "meta_ptr": "*i32", "partial_ptr": "*fp32", "lse_ptr": "*fp32", "slot_ptr": "*i64"}
FLOATING = ("q_ptr", "out_ptr", "key_ptr", "value_ptr", "key_out_ptr", "value_out_ptr")


def compiled(name, arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps = KERNELS[name]
    if "PDL" in kernel.arg_names:
        constants = constants | {"PDL": arch >= 90}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            integer = POINTERS.get(argument, "*i32") if name != "store" or argument != "meta_ptr" else "*fp16"
            signature[argument] = "*bf16" if argument in FLOATING else integer
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale_log2" else "i64" if "stride" in argument else "i32"
            if "stride" in argument:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": 3})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize(
    ("name", "arch"),
    [("decode", 80), ("decode", 89), ("decode", 90), ("decode-256-32", 90), ("prefill", 80), ("prefill", 90),
     ("prefill-96-32", 90), ("plan", 90), ("merge", 90), ("gather", 90), ("store", 80), ("store", 90)],
)  # fmt: skip
def test_compiles(name, arch):
    ptx = compiled(name, arch).asm["ptx"]
    if name.startswith("decode"):  # tensor cores, asynchronous copies, and nibbles unpacked two at a time
        assert "mma.sync.aligned.m16n8k16" in ptx and "cp.async" in ptx
        assert len(re.findall(r"and\.b32 [^;]*0x000F000F", ptx)) >= 64
    if name == "prefill":
        assert ("wgmma" if arch == 90 else "mma.sync") in ptx


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already in the interpreter")
def test_kernels_in_the_interpreter():
    """Every kernel against its reference, without a GPU."""
    tests = Path(__file__).parent
    files = [str(tests / f"test_kernels_kv4_{name}.py") for name in ("gpu", "backend")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=tests.parent,
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and re.search(r"\d+ passed", run.stdout), run.stdout[-3000:] + run.stderr[-2000:]
