# SPDX-License-Identifier: Apache-2.0
"""Kernels compile to machine code for Ampere, Ada and Hopper, Gluon's for Hopper, on a machine without a GPU."""

import pytest

triton = pytest.importorskip("triton")

from kernel_testing import INTERPRET  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm_comet.kernels import act_quant, w4ax_gemm  # noqa: E402
from vllm_comet.kernels._triton import rewrite_ptx  # noqa: E402
from vllm_comet.kernels.tiles import Tile  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiler")
BLOCKS = 32
GEMM_TAIL = {"sums_ptr": "*i32", "as_ptr": "*fp32", "c_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}


def build(kernel, arguments, constants, capability, warps, stages=3, source=ASTSource, **options):
    """Compile ``kernel`` with ``arguments`` (name → type) and ``constants``; every pointer and N 16-byte aligned."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    multiples = ("N", "n_pad", "n_pairs", "k_pad")
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in multiples]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    positions = {(names.index(name),): value for name, value in constants.items()}
    options |= {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source(kernel, signature, positions, attributes), target=target, options=options)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("groups,split", [(1, 4), (0, 1)])
def test_triton_gemm(capability, groups, split):
    arguments = {"a_ptr": "*i8", "w_ptr": "*i8", "g_ptr": "*u8", "partial_ptr": "*i32", "counter_ptr": "*i32",
                 **dict.fromkeys(("M", "N", "n_pad", "k_pad", "low_blocks"), "i32"), **GEMM_TAIL}  # fmt: skip
    constants = {"BM": 16, "BN": 64, "SPLIT": split, "GROUP_N": 8, "GROUPS": groups, "TWO": True, "BIAS": True,
                 "ASM": True, "PDL": capability == 90}  # fmt: skip
    if groups == 0:
        constants["g_ptr"] = None
    compiled = build(w4ax_gemm._w4ax_kernel, arguments, constants, capability, 4)
    assert "mma" in compiled.asm["ptx"] and compiled.asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90])
def test_activation_quantisation(capability):
    shared = {"perm_ptr": "*i32", "codes_ptr": "*i8", "scales_ptr": "*fp32", "sums_ptr": "*i32", "x_ptr": "*bf16",
              **dict.fromkeys(("K", "k_pad", "split", "stride_x", "stride_r"), "i32")}  # fmt: skip
    norm = {"residual_ptr": "*bf16", "h_ptr": "*bf16", "weight_ptr": "*bf16", "eps": "fp32"}
    constants = {"BLOCK": 4096, "HAS_PERM": True, "LOW_QMAX": 127, "LOW_STEP": 1 / 127, "TWO": True, "SUMS": True,
                 "PDL": capability == 90}  # fmt: skip
    for kernel in (act_quant._quantize_kernel, act_quant._silu_mul_kernel):
        assert build(kernel, shared, constants, capability, 4).asm["cubin"]
    constants["HAS_RESIDUAL"] = True
    assert build(act_quant._rms_norm_kernel, {**shared, **norm}, constants, capability, 4).asm["cubin"]


def gluon():
    """What the Gluon tests need, or a skip where this Triton has no Gluon."""
    pytest.importorskip("triton.experimental.gluon")
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    def tensor_map(kind, block, swizzle, bits):
        return f"tensordesc<{kind}{list(block)},{NVMMASharedLayout(swizzle, bits, rank=len(block))!r}>"

    return GluonASTSource, tensor_map


@pytest.mark.parametrize("tile,group_size,two,output", [
    (Tile(8, 64, 4, 4, 4, depth=4, registers=128), 128, True, "bf16"),
    (Tile(64, 64, 2, 4, 3, depth=4, registers=168), 64, False, "fp16"),
    (Tile(256, 128, 1, 8, 3), 128, False, "fp32"), (Tile(128, 128, 1, 4, 3), -1, True, "fp32"),
    (Tile(128, 128, 1, 4, 2, depth=2, ahead=1), 128, True, "bf16"),
    (Tile(256, 128, 1, 8, 3, depth=2, ahead=1), 64, True, "bf16"),
])  # fmt: skip
def test_hopper_gemm(tile, group_size, two, output):
    source, tensor_map = gluon()
    from vllm_comet.kernels import w4ax_gemm_hopper as hopper

    constants = {**hopper.constants(tile, tile.split, group_size, two, sums=True), "BIAS": True}
    arguments = {"x_desc": tensor_map("i8", (tile.depth, tile.block_m, 128), 128, 8), "w_ptr": "*i32", "g_ptr": "*i16",
                 "partial_ptr": "*i32", "counter_ptr": "*i32", **GEMM_TAIL,
                 **dict.fromkeys(("M", "N", "n_pairs", "blocks_k", "low_blocks", "total_steps"), "i32"),
                 "y_ptr": f"*{output}"}  # fmt: skip
    if group_size == -1:
        constants["g_ptr"] = None
    compiled = build(hopper._w4ax_kernel, arguments, constants, 90, tile.warps, source=source,
                     maxnreg=tile.registers or None)
    assert "wgmma.mma_async" in compiled.asm["ptx"] and compiled.asm["cubin"]
    if constants["UNSIGNED"]:
        path = rewrite_ptx(compiled.asm["ptx"], *hopper.UNSIGNED_PTX)
        assert path == rewrite_ptx(compiled.asm["ptx"], *hopper.UNSIGNED_PTX)
        unsigned = build(hopper._w4ax_kernel, arguments, constants, 90, tile.warps, source=source,
                         maxnreg=tile.registers or None, ir_override=path)
        assert ".s32.u8.s8" in unsigned.asm["ptx"] and unsigned.asm["cubin"] != compiled.asm["cubin"]


def test_rewrite_refuses_other_code():
    with pytest.raises(RuntimeError, match="without 'wgmma'"):
        rewrite_ptx("mov.b32", "wgmma", "x")


@pytest.mark.parametrize("tile,group_size,two", [
    (Tile(8, 32, 1, 8, 8, form="small"), 128, True), (Tile(16, 64, 1, 16, 4, form="small"), 64, False),
    (Tile(64, 64, 1, 8, 3, form="small"), -1, True),
])  # fmt: skip
def test_hopper_small_gemm(tile, group_size, two):
    source, tensor_map = gluon()
    from vllm_comet.kernels import w4ax_gemm_hopper_small as small

    constants = {**small.constants(tile, BLOCKS, group_size, two), "BIAS": True}
    ways, slabs, groups = constants["WAYS"], constants["SLABS"], constants["GROUPS"]
    arguments = {"x_desc": tensor_map("i8", (ways, tile.block_m, 128), 128, 8),
                 "w_desc": tensor_map("i32", (1, ways, 2, slabs, 128), 0, 32),
                 "g_desc": tensor_map("u8", (ways, groups, 16 * slabs), 0, 8),
                 **dict.fromkeys(("M", "N", "blocks_k", "low_blocks"), "i32"), **GEMM_TAIL}  # fmt: skip
    if group_size == -1:
        constants["g_desc"] = None
    compiled = build(small._w4ax_small_kernel, arguments, constants, 90, tile.warps, source=source)
    assert "mma.sync" in compiled.asm["ptx"] and compiled.asm["cubin"]


@pytest.mark.parametrize("tile,reason", [
    (Tile(256, 128, 1, 8, 4, depth=2), "shared memory"), (Tile(128, 256, 1, 8, 3), "block_n must be"),
    (Tile(128, 128, 1, 8, 1), "more stages"),
])  # fmt: skip
def test_hopper_refuses_tiles(tile, reason):
    gluon()
    from vllm_comet.kernels.w4ax_gemm_hopper import constants

    with pytest.raises(ValueError, match=reason):
        constants(tile, 1, 128, True, True)
