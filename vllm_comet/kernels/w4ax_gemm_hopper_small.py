# SPDX-License-Identifier: Apache-2.0
"""The W4Ax GEMM for Hopper at few tokens (M up to 64) and rows: K is not split over the grid but inside a program.

At decode sizes the time goes to latency: the chain of K blocks in a program, and the exchange of partial sums between
programs. So a program owns ``block_n`` weight rows of the whole K; ``ways`` of its warps work on as many K blocks at
once, as the batch of a batched product, and are added up in shared memory at the end, as integers.

The products are mma.sync and not wgmma: a warp multiplies 16 rows by itself, so that the warps of a program can be on
different K blocks. Where there are many rows, the other kernel is as fast or faster from one token on.

Everything comes through bulk tensor copies, as many K blocks ahead as shared memory holds. Weights don't depend on the
kernel before, so with programmatic dependent launch they are fetched while that kernel still runs.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_comet.checkpoint import BLOCK
from vllm_comet.kernels._triton import Launcher, cdiv
from vllm_comet.kernels.tiles import Tile
from vllm_comet.kernels.w4ax_gemm import KernelWeight
from vllm_comet.kernels.w4ax_gemm_hopper import SHARED_MEMORY, X_LAYOUT, cta_barrier, tma_load, unpack
from vllm_comet.kernels.w4ax_gemm_hopper_output import rescale, rescale_factors


# -------------------------------------------------------------------------------------------------------------- layouts
@gluon.constexpr_function
def _bits(size):
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(WAYS, SLABS):
    """Who reads which of ``[1, WAYS, 2, SLABS, 128]`` words: a warp has a way and a slab of 16 rows, a lane 4 words."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 0, 0, 1], [0, 0, 0, 0, 2], [0, 0, 1, 0, 0]],
        lane_bases=[[0, 0, 0, 0, 4 << i] for i in range(5)],
        warp_bases=[[0, 0, 0, b, 0] for b in _bits(SLABS)] + [[0, b, 0, 0, 0] for b in _bits(WAYS)],
        block_bases=[],
        shape=[1, WAYS, 2, SLABS, 128],
    )


@gluon.constexpr_function
def _scales_layout(WAYS, SLABS, GROUPS):
    """Who reads which of the scales ``[WAYS, GROUPS, 16·SLABS]``: the pair of rows in a thread's A fragment."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1]] + ([[0, 1, 0]] if GROUPS == 2 else []),
        lane_bases=[[0, 0, 0], [0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 0, 8]],
        warp_bases=[[0, 0, 16 * b] for b in _bits(SLABS)] + [[b, 0, 0] for b in _bits(WAYS)],
        block_bases=[],
        shape=[WAYS, GROUPS, 16 * SLABS],
    )


@gluon.jit
def _fragment(words, WAYS: gl.constexpr, SLABS: gl.constexpr, dot: gl.constexpr):
    """Words ``[1, WAYS, 2, SLABS, 128]`` → ``[WAYS, 16·SLABS, 64]`` in A-fragment order, no data moves."""
    words = gl.join(gl.join(words, words), gl.join(words, words))
    # [way, 32-channel step, slab, row, quad, k half, row half, (4 channels)]
    words = words.reshape([WAYS, 2, SLABS, 8, 4, 2, 2, 4]).permute([0, 2, 6, 3, 1, 5, 4, 7])
    return gl.convert_layout(words.reshape([WAYS, 16 * SLABS, 64]), dot, assert_trivial=True)


# ------------------------------------------------------------------------------------------------------------- pipeline
@gluon.jit
def _fetch_weights(w_desc, g_desc, w_ring, g_ring, w_full, g_full, slot, row, group, pred,
                   WAYS: gl.constexpr, SLABS: gl.constexpr, GROUPS: gl.constexpr):  # fmt: skip
    """Start copying the weights and scales of the ``WAYS`` blocks of ``group`` into stage ``slot``."""
    mbarrier.expect(w_full.index(slot), WAYS * SLABS * 1024, pred=pred)
    if GROUPS > 0:
        mbarrier.expect(g_full.index(slot), WAYS * GROUPS * SLABS * 16, pred=pred)
    at = [row // 64, group * WAYS, 0, row % 64 // 16, 0]
    tma_load(w_desc, at, w_full.index(slot), w_ring.index(slot), pred=pred)
    if GROUPS > 0:
        tma_load(g_desc, [group * WAYS, 0, row], g_full.index(slot), g_ring.index(slot), pred=pred)


@gluon.jit
def _dot_groups(x_desc, w_desc, g_desc, x_ring, w_ring, g_ring, x_full, w_full, g_full, first, end, revisited, groups,
                row, token, BM: gl.constexpr, WAYS: gl.constexpr, SLABS: gl.constexpr, STAGES: gl.constexpr,
                GROUPS: gl.constexpr, REFILL: gl.constexpr):  # fmt: skip
    """Integer sums over blocks ``first .. end`` by way: int32 ``[WAYS, BN, BM]``.

    revisited: a group that the call after this one works on too, so that its stage stays, or −1.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, SLABS, 1], [1, 16, 8])
    w_dot: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    x_dot: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    scale: gl.constexpr = gl.SliceLayout(2, w_dot)
    way = gl.expand_dims(gl.arange(0, WAYS, layout=gl.SliceLayout(1, scale)), 1)
    acc = gl.zeros([WAYS, 16 * SLABS, BM], gl.int32, mma)
    for i in range(first // WAYS, gl.cdiv(end, WAYS)):
        slot, phase = i % STAGES, (i // STAGES) & 1
        block = i * WAYS + way
        inside = (block >= first) & (block < end)  # a block of the other segment counts as zero
        mbarrier.wait(w_full.index(slot), phase)
        words = _fragment(w_ring.index(slot).load(_words_layout(WAYS, SLABS)), WAYS, SLABS, w_dot)
        g_low = way
        g_high = way
        if GROUPS == 0:
            words = gl.where(gl.expand_dims(inside, 2), words, 0)
        else:
            mbarrier.wait(g_full.index(slot), phase)
            scales = g_ring.index(slot).load(_scales_layout(WAYS, SLABS, GROUPS)).to(gl.int32)
            scales = scales.reshape([WAYS, GROUPS, SLABS, 8, 2]).permute([0, 1, 2, 4, 3])
            scales = scales.reshape([WAYS, GROUPS, 16 * SLABS])
            if GROUPS == 1:
                g_low = gl.convert_layout(scales.reshape([WAYS, 16 * SLABS]), scale, assert_trivial=True)
                g_low = gl.where(inside, g_low, 0)
                g_high = g_low
            else:
                g_low, g_high = gl.split(scales.permute([0, 2, 1]))
                g_low = gl.where(inside, gl.convert_layout(g_low, scale, assert_trivial=True), 0)
                g_high = gl.where(inside, gl.convert_layout(g_high, scale, assert_trivial=True), 0)
        low = unpack(words, g_low, False, GROUPS)
        high = unpack(words, g_high, True, GROUPS)
        mbarrier.wait(x_full.index(slot), phase)
        x = x_ring.index(slot).permute([0, 2, 1])
        acc = mma_v2(low, x.slice(0, 64, dim=1).load(x_dot), acc)
        acc = mma_v2(high, x.slice(64, 64, dim=1).load(x_dot), acc)
        if REFILL:
            cta_barrier()  # every warp has read the stage
            group = i + STAGES
            refill = (i != revisited) & (group < groups)
            mbarrier.expect(x_full.index(slot), WAYS * BM * 128, pred=refill)
            _fetch_weights(w_desc, g_desc, w_ring, g_ring, w_full, g_full, slot, row, group, refill, WAYS, SLABS,
                           GROUPS)
            tma_load(x_desc, [group * WAYS, token, 0], x_full.index(slot), x_ring.index(slot), pred=refill)
    return acc


@gluon.jit
def _add_ways(acc, BM: gl.constexpr, WAYS: gl.constexpr, SLABS: gl.constexpr, out: gl.constexpr):
    """``acc`` ``[WAYS, BN, BM]`` summed over the ways, through shared memory, in layout ``out``."""
    BN: gl.constexpr = 16 * SLABS
    columns: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0, 1])
    exchange = gl.allocate_shared_memory(gl.int32, [WAYS * BN, BM], columns, value=acc.reshape([WAYS * BN, BM]))
    total = exchange.slice(0, BN, dim=0).load(out)
    for way in gl.static_range(1, WAYS):
        total += exchange.slice(way * BN, BN, dim=0).load(out)
    return total


# --------------------------------------------------------------------------------------------------------------- kernel
@gluon.jit(do_not_specialize=["M", "blocks_k", "low_blocks"])
def _w4ax_small_kernel(x_desc, w_desc, g_desc, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, blocks_k, low_blocks,
                       BM: gl.constexpr, WAYS: gl.constexpr, SLABS: gl.constexpr, STAGES: gl.constexpr,
                       GROUPS: gl.constexpr, REFILL: gl.constexpr, TWO: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    BN: gl.constexpr = 16 * SLABS
    row, token = gl.program_id(0) * BN, gl.program_id(1) * BM
    groups = gl.cdiv(blocks_k, WAYS)
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, WAYS, BM, 128], x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 1, WAYS, 2, SLABS, 128], w_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    g_ring, g_full = w_ring, w_full
    if GROUPS > 0:
        g_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, WAYS, GROUPS, BN], g_desc.layout)
        g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(x_full.index(slot), count=1)
        mbarrier.init(w_full.index(slot), count=1)
        if GROUPS > 0:
            mbarrier.init(g_full.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.expect(x_full.index(slot), WAYS * BM * 128, pred=slot < groups)
        _fetch_weights(w_desc, g_desc, w_ring, g_ring, w_full, g_full, slot, row, slot, slot < groups, WAYS, SLABS,
                       GROUPS)
    gdc_launch_dependents()
    gdc_wait()
    for slot in gl.static_range(STAGES):
        tma_load(x_desc, [slot * WAYS, token, 0], x_full.index(slot), x_ring.index(slot), pred=slot < groups)

    out: gl.constexpr = gl.BlockedLayout([1, 1], [min(BN, 32), 32 // min(BN, 32)], [1, SLABS * WAYS], [0, 1])
    revisited = gl.where(low_blocks % WAYS == 0, -1, low_blocks // WAYS)
    low_acc = _dot_groups(x_desc, w_desc, g_desc, x_ring, w_ring, g_ring, x_full, w_full, g_full, 0, low_blocks,
                          revisited, groups, row, token, BM, WAYS, SLABS, STAGES, GROUPS, REFILL)
    low = _add_ways(low_acc, BM, WAYS, SLABS, out)
    rn = row + gl.arange(0, BN, layout=gl.SliceLayout(1, out))
    rm = token + gl.arange(0, BM, layout=gl.SliceLayout(0, out))
    total = low
    if TWO:
        high_acc = _dot_groups(x_desc, w_desc, g_desc, x_ring, w_ring, g_ring, x_full, w_full, g_full, low_blocks,
                               blocks_k, -1, groups, row, token, BM, WAYS, SLABS, STAGES, GROUPS, REFILL)
        total = rescale(low, rescale_factors(as_ptr, rm, M)) + _add_ways(high_acc, BM, WAYS, SLABS, out)
    y = total.to(gl.float32) * gl.expand_dims(gl.load(as_ptr + rm * 2 + (1 if TWO else 0), mask=rm < M, other=0.0), 0)
    y *= gl.expand_dims(gl.load(c_ptr + rn, mask=rn < N, other=0.0), 1)
    if BIAS:
        y += gl.expand_dims(gl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(gl.float32), 1)
    at = gl.expand_dims(rm.to(gl.int64) * N, 0) + gl.expand_dims(rn, 1)
    gl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=gl.expand_dims(rm < M, 0) & gl.expand_dims(rn < N, 1))


# ------------------------------------------------------------------------------------------------------------- launcher
W_LAYOUT, G_LAYOUT = gl.NVMMASharedLayout(0, 32, rank=5), gl.NVMMASharedLayout(0, 8, rank=3)


def constants(tile: Tile, blocks: int, group_size: int, two: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters; raises ValueError for a tile it can't run."""
    slabs, groups = tile.block_n // 16, 0 if group_size == -1 else BLOCK // group_size
    ways = tile.warps // slabs
    if tile.block_n not in (16, 32, 64) or tile.warps not in (8, 16) or tile.block_m > 64:
        raise ValueError(f"{tile}: block_n must be 16, 32 or 64, warps 8 or 16, and block_m at most 64.")
    stages = min(tile.stages, -(-blocks // ways))
    used = stages * (ways * (tile.block_m * 128 + tile.block_n * (64 + groups)) + 24)
    used += (1 + two) * 4 * ways * tile.block_n * tile.block_m
    if used > SHARED_MEMORY:
        raise ValueError(f"{tile} needs {used} bytes of shared memory; Hopper has {SHARED_MEMORY}. Use fewer stages.")
    return dict(BM=tile.block_m, WAYS=ways, SLABS=slabs, STAGES=stages, GROUPS=groups,
                REFILL=-(-blocks // ways) > stages, TWO=two)


def descriptors(
    codes: torch.Tensor, weight: KernelWeight, tile: Tile, ways: int
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor | None]:
    """Tensor maps of activations ``[blocks, M, 128]``, weights ``[tiles, blocks, 2, 4, 128]`` and scales."""
    (tiles, blocks, _), slabs = weight.packed.shape, tile.block_n // 16
    x_desc = TensorDescriptor(codes, [blocks, codes.shape[0], BLOCK], [BLOCK, codes.stride(0), 1],
                              [ways, tile.block_m, BLOCK], X_LAYOUT)
    w_desc = TensorDescriptor(weight.packed, [tiles, blocks, 2, 4, 128], [blocks * 1024, 1024, 512, 128, 1],
                              [1, ways, 2, slabs, 128], W_LAYOUT)
    if weight.group_scale is None:
        return x_desc, w_desc, None
    groups, rows = BLOCK // weight.group_size, weight.group_scale.shape[1]
    return x_desc, w_desc, TensorDescriptor(weight.group_scale, [blocks, groups, rows], [groups * rows, rows, 1],
                                            [ways, groups, tile.block_n], G_LAYOUT)


@functools.cache
def _launcher(tile: Tile, blocks: int, group_size: int, two: bool, bias: bool) -> Launcher:
    return Launcher(_w4ax_small_kernel, **constants(tile, blocks, group_size, two), BIAS=bias, num_warps=tile.warps,
                    enable_fp_fusion=False, launch_pdl=True)


def w4ax_gemm_hopper_small(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: KernelWeight,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    sums: torch.Tensor | None = None,  # of codes; not needed here
) -> torch.Tensor:
    """``w4ax_gemm_ref`` on Hopper, few tokens: codes int8 ``[M, Kpad]``, weight in layout ``hopper`` → ``[M, N]``."""
    m, blocks = codes.shape[0], weight.packed.shape[1]
    y = torch.empty(m, weight.n, dtype=out_dtype, device=codes.device)
    if m == 0:
        return y
    launch = _launcher(tile, blocks, weight.group_size, weight.split < weight.k, bias is not None)
    launch(
        (cdiv(weight.n, tile.block_n), cdiv(m, tile.block_m), 1),
        *descriptors(codes, weight, tile, launch.parameters["WAYS"]), act_scales, weight_scale, bias, y, m, weight.n,
        blocks, cdiv(weight.split, BLOCK))
    return y
