# SPDX-License-Identifier: Apache-2.0
"""The W4Ax GEMM for Hopper, in Gluon: wgmma with W in registers, everything else through bulk tensor copies.

Import it only where ``hopper_kernel_supported``; it needs a Triton that has Gluon (3.6 or later).

A program owns 64·R weight rows × BM tokens of one slice of K. Weights, group scales and activations of STAGES blocks
of 128 channels are in flight at a time; large tiles hold the weights in registers instead, ``Tile.depth`` blocks ahead.
Weights lie in wgmma register order, so a thread reads 16 consecutive bytes and unpacks them into its fragment of A; no
data moves between threads. While one half block (64 channels) is multiplied, the next is unpacked.

Weights don't depend on the kernel before, so with programmatic dependent launch their first stages are fetched while
that kernel still runs; only then does the program wait for its activations.
"""

from __future__ import annotations

import torch
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_comet.checkpoint import BLOCK
from vllm_comet.kernels.tiles import Tile
from vllm_comet.kernels.w4ax_gemm import PAD_ROWS, TILE_ROWS, KernelWeight, split_k

# Two names changed between Triton 3.6 and 3.9.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
cta_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


# -------------------------------------------------------------------------------------------------------------- layouts
@gluon.constexpr_function
def _mma_layout(BM, WARPS):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, min(BM, 128), 32])


@gluon.constexpr_function
def _words_layout(R, WARPS):
    """Who reads which of a block's weight words ``[R, 4, 256]``: 4 consecutive words a lane, 64 rows a warp group."""
    rows = [[1 << i, 0, 0] for i in range(R.bit_length() - 1)]
    groups = WARPS // 8  # a second warp group takes the odd tiles of 64 rows
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 2, 0], *rows[groups:]],
        lane_bases=[[0, 0, 4 << i] for i in range(5)],
        warp_bases=[[0, 0, 128], [0, 1, 0], *rows[:groups]],
        block_bases=[],
        shape=[R, 4, 256],
    )


@gluon.constexpr_function
def _scale_line(R):
    """Scales fetched for a half block: 64·R, but a bulk copy's target must be 128-byte aligned."""
    return max(64 * R, 128)


# ------------------------------------------------------------------------------------------------------------ unpacking
@gluon.jit
def _fragment(words, R: gl.constexpr, dot: gl.constexpr):
    """int32 words ``[R, 4, 256]`` → ``[64·R, 64]`` in A-fragment order, each word repeated for its four channels."""
    words = gl.join(gl.join(words, words), gl.join(words, words))
    # [tile, 32-channel step, warp, row, quad, k half, row half, (4 channels)]
    words = words.reshape([R, 2, 4, 8, 4, 2, 2, 4]).permute([0, 2, 6, 3, 1, 5, 4, 7])
    return gl.convert_layout(words.reshape([64 * R, 64]), dot, assert_trivial=True)


@gluon.jit
def unpack(words, scale, HIGH: gl.constexpr, GROUPS: gl.constexpr):
    """Low or high nibbles of a register of 8 → four int8 weights g·(q−8); as ``w4ax_gemm._unpack``, same source."""
    if GROUPS == 0:
        shift: gl.constexpr = "mov.b32 t, $1;" if HIGH else "shl.b32 t, $1, 4;"
        times16: gl.constexpr = "{ .reg .b32 t; " + shift + " and.b32 $0, t, 0xF0F0F0F0; }"
        return gl.inline_asm_elementwise(times16, "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=4)
    else:
        s = gl.expand_dims(scale.to(gl.int32), len(scale.shape))
        offset = s * -134744072 - 2139062144  # 0x80808080 − s · 0x08080808
        nibble: gl.constexpr = "shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;" if HIGH else "and.b32 t, $1, 0x0F0F0F0F;"
        scaled: gl.constexpr = "{ .reg .b32 t; " + nibble + " mad.lo.u32 t, t, $5, $9; xor.b32 $0, t, 0x80808080; }"
        return gl.inline_asm_elementwise(scaled, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [words, s, offset], dtype=gl.int8,
                                         is_pure=True, pack=4)


# ------------------------------------------------------------------------------------------------------------- pipeline
@gluon.jit
def _fetch_weights(w_desc, g_desc, w_ring, g_ring, w_full, g_full, slot, tile_n, block, n_pad, pred,
                   R: gl.constexpr, GROUPS: gl.constexpr):  # fmt: skip
    """Start copying weights and group scales of ``block`` into stage ``slot``."""
    mbarrier.expect(w_full.index(slot), R * 4096, pred=pred)
    if GROUPS > 0:
        mbarrier.expect(g_full.index(slot), GROUPS * _scale_line(R), pred=pred)
    tma_load(w_desc, [tile_n * R, block * 4, 0], w_full.index(slot), w_ring.index(slot), pred=pred)
    for half in gl.static_range(GROUPS):
        row = (block * GROUPS + half) * n_pad + tile_n * (64 * R)
        tma_load(g_desc, [row], g_full.index(slot), g_ring.index(slot * GROUPS + half), pred=pred)


@gluon.jit
def _dot_blocks(x_desc, w_desc, g_desc, x_ring, w_ring, g_ring, x_full, w_full, g_full, first, end, blocks,
                block0, tile_m, tile_n, n_pad, R: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr,
                STAGES: gl.constexpr, GROUPS: gl.constexpr, REFILL: gl.constexpr):  # fmt: skip
    """Integer sum over blocks ``first .. end`` (of ``blocks``, counted from ``block0``): int32 ``[64·R, BM]``."""
    mma: gl.constexpr = _mma_layout(BM, WARPS)
    dot: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    acc = gl.zeros([64 * R, BM], gl.int32, mma)
    for i in range(first, end):
        slot = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(w_full.index(slot), phase)
        words = _fragment(w_ring.index(slot).load(_words_layout(R, WARPS)), R, dot)
        g_low = words
        g_high = words
        if GROUPS > 0:
            mbarrier.wait(g_full.index(slot), phase)
            g_low = g_ring.index(slot * GROUPS).slice(0, 64 * R).load(gl.SliceLayout(1, dot))
            g_high = g_low
        if GROUPS > 1:
            g_high = g_ring.index(slot * GROUPS + 1).slice(0, 64 * R).load(gl.SliceLayout(1, dot))
        x = x_ring.index(slot).permute([1, 0])
        low = unpack(words, g_low, False, GROUPS)
        mbarrier.wait(x_full.index(slot), phase)
        acc = warpgroup_mma(low, x.slice(0, 64, dim=0), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        high = unpack(words, g_high, True, GROUPS)
        if REFILL:  # every warp is done with block i − 1 here: its stage takes block i − 1 + STAGES
            cta_barrier()
            refill = (i >= 1) & (i - 1 + STAGES < blocks)
            free, block = (i + STAGES - 1) % STAGES, block0 + i - 1 + STAGES
            mbarrier.expect(x_full.index(free), BM * 128, pred=refill)
            _fetch_weights(w_desc, g_desc, w_ring, g_ring, w_full, g_full, free, tile_n, block, n_pad, refill, R,
                           GROUPS)
            tma_load(x_desc, [tile_m * BM, block * 128], x_full.index(free), x_ring.index(free), pred=refill)
        acc = warpgroup_mma(high, x.slice(64, 64, dim=0), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    return warpgroup_mma_wait(0, deps=[acc])


@gluon.jit
def _write_output(low, high, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N,
                  BM: gl.constexpr, WARPS: gl.constexpr, TWO: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    y = low.to(gl.float32) * gl.expand_dims(gl.load(as_ptr + rm * 2, mask=rm < M, other=0.0), 0)
    if TWO:
        y += high.to(gl.float32) * gl.expand_dims(gl.load(as_ptr + rm * 2 + 1, mask=rm < M, other=0.0), 0)
    y *= gl.expand_dims(gl.load(c_ptr + rn, mask=rn < N, other=0.0), 1)
    if BIAS:
        y += gl.expand_dims(gl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(gl.float32), 1)
    y = y.to(y_ptr.dtype.element_ty)
    if BM >= 64:  # through shared memory, for 16-byte stores along N
        coalesced: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
        y = gl.convert_layout(y, coalesced)
        rn = gl.convert_layout(rn, gl.SliceLayout(1, coalesced))
        rm = gl.convert_layout(rm, gl.SliceLayout(0, coalesced))
    offset = gl.expand_dims(rm.to(gl.int64) * N, 0) + gl.expand_dims(rn, 1)
    gl.store(y_ptr + offset, y, mask=gl.expand_dims(rm < M, 0) & gl.expand_dims(rn < N, 1))


@gluon.jit
def _load_block(w_ptr, g_ptr, words_at, scales_at, block, n_pad, pred, GROUPS: gl.constexpr):
    """Weight words and both halves' scales of ``block``, straight into registers (``w_ptr`` at the program's rows)."""
    words = gl.load(w_ptr + words_at + block * 1024, mask=pred, other=0, cache_modifier=".cg")
    g_low = words
    g_high = words
    if GROUPS > 0:
        g_low = gl.load(g_ptr + scales_at + (block * GROUPS) * n_pad, mask=pred, other=0).to(gl.int32)
        g_high = g_low
    if GROUPS > 1:
        g_high = gl.load(g_ptr + scales_at + (block * GROUPS + 1) * n_pad, mask=pred, other=0).to(gl.int32)
    return words, g_low, g_high


@gluon.jit
def _dot_blocks_direct(x_desc, x_ring, x_full, w_ptr, g_ptr, words_at, scales_at, queue, first, end, blocks, block0,
                       tile_m, n_pad, R: gl.constexpr, BM: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
                       GROUPS: gl.constexpr, DEPTH: gl.constexpr, REFILL: gl.constexpr):  # fmt: skip
    """As ``_dot_blocks``, weights loaded DEPTH blocks ahead into registers: ``queue`` holds blocks ``first`` and on, as
    ``_load_block`` gives them. Returns the sum and the queue for ``end``."""
    mma: gl.constexpr = _mma_layout(BM, WARPS)
    dot: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    acc = gl.zeros([64 * R, BM], gl.int32, mma)
    for i in range(first, end):
        slot = i % STAGES
        words, g_low, g_high = queue[0]
        fragment = _fragment(words, R, dot)
        low = unpack(fragment, g_low, False, GROUPS)
        mbarrier.wait(x_full.index(slot), (i // STAGES) & 1)
        x = x_ring.index(slot).permute([1, 0])
        acc = warpgroup_mma(low, x.slice(0, 64, dim=0), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        high = unpack(fragment, g_high, True, GROUPS)
        ahead = i + DEPTH
        queue = queue[1:] + (_load_block(w_ptr, g_ptr, words_at, scales_at, block0 + ahead, n_pad, ahead < blocks,
                                         GROUPS),)
        if REFILL:
            cta_barrier()
            refill = (i >= 1) & (i - 1 + STAGES < blocks)
            free, block = (i + STAGES - 1) % STAGES, block0 + i - 1 + STAGES
            mbarrier.expect(x_full.index(free), BM * 128, pred=refill)
            tma_load(x_desc, [tile_m * BM, block * 128], x_full.index(free), x_ring.index(free), pred=refill)
        acc = warpgroup_mma(high, x.slice(64, 64, dim=0), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    return warpgroup_mma_wait(0, deps=[acc]), queue


@gluon.jit
def _add_slots(total, slots, cell, first, end, skip, SPLIT: gl.constexpr):
    """``total`` plus the sums in slots ``first .. end`` except ``skip``."""
    for slot in gl.static_range(SPLIT):
        wanted = (slot >= first) & (slot < end) & (slot != skip)
        at = slots + slot * (total.shape[0] * total.shape[1]) + cell
        if total.numel <= 64 * 16:  # few registers: all loads at once
            total += gl.load(at, mask=(cell >= 0) & wanted, other=0, cache_modifier=".cg")
        else:
            if wanted:
                total += gl.load(at, cache_modifier=".cg")
    return total


@gluon.jit(do_not_specialize=["M", "blocks_k", "low_blocks"])
def _w4ax_kernel(x_desc, w, g, as_ptr, c_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, n_pad, blocks_k,
                 low_blocks, R: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr, GROUP_N: gl.constexpr,
                 WARPS: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, REFILL: gl.constexpr,
                 DEPTH: gl.constexpr, TWO: gl.constexpr, STASH: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """``w`` and ``g`` are tensor maps, or pointers if DEPTH."""
    BN: gl.constexpr = 64 * R
    mma: gl.constexpr = _mma_layout(BM, WARPS)
    tile, piece = gl.program_id(0), gl.program_id(1)
    tiles_m, tiles_n = gl.cdiv(M, BM), gl.cdiv(N, BN)
    group = tile // (GROUP_N * tiles_m)  # GROUP_N column tiles share the activations that L2 holds
    width = gl.minimum(tiles_n - group * GROUP_N, GROUP_N)
    inside = tile - group * GROUP_N * tiles_m
    tile_n, tile_m = group * GROUP_N + inside % width, inside // width
    per_piece = gl.cdiv(blocks_k, SPLIT)
    block0 = piece * per_piece
    blocks = gl.minimum(per_piece, blocks_k - block0)
    middle = gl.minimum(gl.maximum(low_blocks - block0, 0), blocks)

    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BM, 128], x_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(x_full.index(slot), count=1)
    if DEPTH > 0:
        layout: gl.constexpr = _words_layout(R, WARPS)
        row = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        word = gl.arange(0, 256, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
        words_at = row[:, None, None] * (blocks_k * 1024) + quarter[None, :, None] * 256 + word[None, None, :]
        w += (tile_n * R).to(gl.int64) * (blocks_k * 1024)
        scales_at = w
        if GROUPS > 0:
            scales_at = gl.arange(0, BN, layout=gl.SliceLayout(1, gl.DotOperandLayout(0, mma, 4)))
            g += tile_n * BN
        queue = (_load_block(w, g, words_at, scales_at, block0, n_pad, True, GROUPS),)
        for i in gl.static_range(1, DEPTH):
            queue = queue + (_load_block(w, g, words_at, scales_at, block0 + i, n_pad, i < blocks, GROUPS),)
    else:
        w_ring = gl.allocate_shared_memory(gl.int32, [STAGES, R, 4, 256], w.layout)
        w_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        g_ring, g_full = w_ring, w_full
        if GROUPS > 0:
            g_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * GROUPS, _scale_line(R)], g.layout)
            g_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(STAGES):
            mbarrier.init(w_full.index(slot), count=1)
            if GROUPS > 0:
                mbarrier.init(g_full.index(slot), count=1)
        for slot in gl.static_range(STAGES):
            _fetch_weights(w, g, w_ring, g_ring, w_full, g_full, slot, tile_n, block0 + slot, n_pad, slot < blocks, R,
                           GROUPS)
    gdc_launch_dependents()
    gdc_wait()
    for slot in gl.static_range(STAGES):
        mbarrier.expect(x_full.index(slot), BM * 128, pred=slot < blocks)
        tma_load(x_desc, [tile_m * BM, (block0 + slot) * 128], x_full.index(slot), x_ring.index(slot),
                 pred=slot < blocks)

    if DEPTH > 0:
        low, queue = _dot_blocks_direct(x_desc, x_ring, x_full, w, g, words_at, scales_at, queue, 0, middle, blocks,
                                        block0, tile_m, n_pad, R, BM, WARPS, STAGES, GROUPS, DEPTH, REFILL)
    else:
        low = _dot_blocks(x_desc, w, g, x_ring, w_ring, g_ring, x_full, w_full, g_full, 0, middle, blocks, block0,
                          tile_m, tile_n, n_pad, R, BM, WARPS, STAGES, GROUPS, REFILL)
    high = low
    if TWO:
        if STASH:  # two accumulators don't fit in the registers: the first waits in shared memory
            swizzle: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
            stash = gl.allocate_shared_memory(gl.int32, [BN, BM], swizzle, value=low)
        if DEPTH > 0:
            high, queue = _dot_blocks_direct(x_desc, x_ring, x_full, w, g, words_at, scales_at, queue, middle, blocks,
                                             blocks, block0, tile_m, n_pad, R, BM, WARPS, STAGES, GROUPS, DEPTH,
                                             REFILL)
        else:
            high = _dot_blocks(x_desc, w, g, x_ring, w_ring, g_ring, x_full, w_full, g_full, middle, blocks, blocks,
                               block0, tile_m, tile_n, n_pad, R, BM, WARPS, STAGES, GROUPS, REFILL)
        if STASH:
            low = stash.load(mma)

    en = gl.arange(0, BN, layout=gl.SliceLayout(1, mma))
    em = gl.arange(0, BM, layout=gl.SliceLayout(0, mma))
    rn, rm = tile_n * BN + en, tile_m * BM + em
    if SPLIT == 1:
        _write_output(low, high, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, BM, WARPS, TWO, BIAS)
    else:
        # Slot i holds the low sum of slice i or the high sum of slice i − 1: only one slice can have both.
        cell = gl.expand_dims(en * BM, 1) + gl.expand_dims(em, 0)
        slots = partial_ptr + tile.to(gl.int64) * ((SPLIT + 1) * BN * BM)
        if middle > 0:
            gl.store(slots + piece * (BN * BM) + cell, low)
        if TWO:
            gl.store(slots + (piece + 1) * (BN * BM) + cell, high, mask=(cell >= 0) & (blocks > middle))
        cta_barrier()
        arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            gl.store(counter_ptr + tile, 0)
            low_end = gl.cdiv(low_blocks, per_piece)
            # its own sums are still in registers
            low = _add_slots(low, slots, cell, 0, low_end, piece, SPLIT)
            if TWO:
                high = _add_slots(high, slots + BN * BM, cell, low_blocks // per_piece, SPLIT, piece, SPLIT)
            _write_output(low, high, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, BM, WARPS, TWO, BIAS)


# ------------------------------------------------------------------------------------------------------------- launcher
SHARED_MEMORY = 232448  # bytes a program may use on Hopper


def constants(tile: Tile, blocks: int, split: int, group_size: int, two: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters for ``tile``; raises ValueError if they don't fit in shared memory.

    Large tiles do best with weights loaded straight into registers, ``depth`` blocks ahead: through shared memory they
    would compete with the activations that wgmma reads there.
    """
    r, groups = tile.block_n // TILE_ROWS, 0 if group_size == -1 else BLOCK // group_size
    per_piece = -(-blocks // split)
    if tile.block_n > PAD_ROWS:
        raise ValueError(f"{tile}: block_n is at most {PAD_ROWS}.")
    stash = two and tile.block_n * tile.block_m >= 128 * 32 * tile.warps
    stages = min(tile.stages, per_piece)
    stage_bytes = tile.block_m * 128 + 8 + (0 if tile.depth else r * 4096 + groups * max(64 * r, 128) + 16)
    used = stages * stage_bytes + (4 * tile.block_n * tile.block_m if stash else 0)
    if used > SHARED_MEMORY:
        raise ValueError(f"{tile} needs {used} bytes of shared memory; Hopper has {SHARED_MEMORY}. Use fewer stages.")
    return dict(R=r, BM=tile.block_m, SPLIT=split, GROUP_N=tile.group_n, WARPS=tile.warps, STAGES=stages, GROUPS=groups,
                REFILL=per_piece > stages, DEPTH=tile.depth, TWO=two, STASH=stash)


def operands(
    codes: torch.Tensor, weight: KernelWeight, tile: Tile, direct: bool
) -> tuple[TensorDescriptor, TensorDescriptor | torch.Tensor, TensorDescriptor | torch.Tensor | None]:
    """Tensor maps of activations ``[M, Kpad]``, weights ``[tiles, 4·blocks, 256]`` and flat scales, or the tensors."""
    packed, r = weight.packed, tile.block_n // TILE_ROWS
    blocks = packed.shape[1]
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    x_desc = TensorDescriptor(codes, list(codes.shape), [codes.stride(0), 1], [tile.block_m, BLOCK], swizzled)
    if direct:
        return x_desc, packed, weight.group_scale
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    w_desc = TensorDescriptor(packed, [packed.shape[0], blocks * 4, 256], [blocks * 1024, 256, 1], [r, 4, 256], plain)
    if weight.group_scale is None:
        return x_desc, w_desc, None
    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=1)
    scales = weight.group_scale
    return x_desc, w_desc, TensorDescriptor(scales, [scales.numel()], [1], [max(tile.block_n, 128)], line)


def w4ax_gemm_hopper(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: KernelWeight,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
) -> torch.Tensor:
    """``w4ax_gemm_ref`` on Hopper: codes int8 ``[M, Kpad]``, weight in layout ``hopper`` → ``[M, N]``."""
    m, blocks = codes.shape[0], weight.packed.shape[1]
    y = torch.empty(m, weight.n, dtype=out_dtype, device=codes.device)
    if m == 0:
        return y
    tiles = cdiv(m, tile.block_m) * cdiv(weight.n, tile.block_n)
    split = split_k(tile, tiles, blocks)
    cells = tiles * (split + 1) * tile.block_m * tile.block_n if split > 1 else 0
    partial = torch.empty(cells, dtype=torch.int32, device=codes.device)
    parameters = constants(tile, blocks, split, weight.group_size, weight.split < weight.k)
    _w4ax_kernel[(tiles, split)](
        *operands(codes, weight, tile, tile.depth > 0), act_scales, weight_scale, bias, y, partial,
        weight.counters, m, weight.n, weight.packed.shape[0] * TILE_ROWS, blocks, -(-weight.split // BLOCK),
        **parameters, BIAS=bias is not None, num_warps=tile.warps, enable_fp_fusion=False, launch_pdl=True)  # fmt: skip
    return y
