# SPDX-License-Identifier: Apache-2.0
"""The W4Ax GEMM for Hopper, in Gluon: wgmma with W in registers, activations through bulk tensor copies.

Import it only where ``hopper_kernel_supported``; it needs a Triton that has Gluon (3.6 or later).

A program owns 64·R weight rows × BM tokens of one slice of K, which it walks in steps of ``depth`` blocks of 128
channels. Weights and group scales go from global memory straight to registers, AHEAD blocks ahead: they lie in wgmma
register order, so a thread reads 16 consecutive bytes and unpacks them into its fragment of A, and they don't compete
for shared memory with the activations that wgmma reads there. Activations arrive a step per copy, STAGES − 1 steps
ahead; long steps amortise the barriers around a copy. While one half block (64 channels) is multiplied, the next is
unpacked.

Between the two activation segments the accumulator is shifted into units of the second. Where they meet inside a step,
that step is done once for each, with the other's weights as zero.

Given the sums of each token's codes, weights with groups are multiplied as w + 128, unsigned: what LiquidGEMM's
multiply-add (arXiv 2509.01229) yields before its XOR. 128 times the sum of the codes is taken off again, exactly.

Weights don't depend on the kernel before, so with programmatic dependent launch the first of them are fetched while
that kernel still runs; only then does the program wait for its activations.
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm_comet.checkpoint import BLOCK
from vllm_comet.kernels._triton import Launcher, cdiv
from vllm_comet.kernels.tiles import Tile
from vllm_comet.kernels.w4ax_gemm import PAD_ROWS, TILE_ROWS, KernelWeight, split_k
from vllm_comet.kernels.w4ax_gemm_hopper_output import (
    add_slots,
    flat,
    rescale_staged,
    stage,
    stage_tokens,
    unflat,
    view,
    write_output,
)

# Three names changed between Triton 3.6 and 3.9.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
cta_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# -------------------------------------------------------------------------------------------------------------- layouts
@gluon.constexpr_function
def _mma_layout(BM, WARPS):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, min(BM, 128), 32])


@gluon.constexpr_function
def _tile_bits(R):
    """Bits of the index of a program's tiles of 64 rows; a second warp group takes the odd tiles."""
    return [1 << i for i in range(R.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(R, WARPS):
    """Who reads which of a block's weight words ``[R, 4, 256]``: 4 consecutive words a lane, 64 rows a warp group."""
    rows, groups = [[b, 0, 0] for b in _tile_bits(R)], WARPS // 8
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 2, 0], *rows[groups:]],
        lane_bases=[[0, 0, 4 << i] for i in range(5)],
        warp_bases=[[0, 0, 128], [0, 1, 0], *rows[:groups]],
        block_bases=[],
        shape=[R, 4, 256],
    )


@gluon.constexpr_function
def _pairs_layout(R, WARPS):
    """Who reads which of a group's scale pairs ``[R, 32]``: those of the two rows that a thread has of a tile."""
    rows, groups = [[b, 0] for b in _tile_bits(R)], WARPS // 8
    return gl.DistributedLinearLayout(
        reg_bases=rows[groups:],
        lane_bases=[[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]],
        warp_bases=[[0, 8], [0, 16], *rows[:groups]],
        block_bases=[],
        shape=[R, 32],
    )


# ------------------------------------------------------------------------------------------------------------ unpacking
@gluon.jit
def _fragment(words, part: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr, dot: gl.constexpr):
    """Words ``[R, 4, 256]`` of part ``part`` of a block → ``[64·R, 128 / PARTS]`` in A-fragment order, each word
    repeated for its four channels; they lie in its low nibbles or, for the second half of the parts, in its high ones.
    """
    STEPS: gl.constexpr = 4 // PARTS  # of 32 channels
    if STEPS == 1:
        first, second = gl.split(words.reshape([R, 2, 512]).permute([0, 2, 1]))
        words = second if part % 2 else first
    words = gl.join(gl.join(words, words), gl.join(words, words))
    # [tile, 32-channel step, warp, row, quad, k half, row half, (4 channels)]
    words = words.reshape([R, STEPS, 4, 8, 4, 2, 2, 4]).permute([0, 2, 6, 3, 1, 5, 4, 7])
    return gl.convert_layout(words.reshape([64 * R, 32 * STEPS]), dot, assert_trivial=True)


@gluon.jit
def _row_scales(pairs, R: gl.constexpr, dot: gl.constexpr):
    """int16 pairs ``[R, 32]`` → int32 ``[64·R]``, the scales of the rows of a thread's A fragment."""
    pairs = pairs.to(gl.int32)
    scales = gl.join(pairs & 255, (pairs >> 8) & 255).reshape([R, 4, 8, 2]).permute([0, 1, 3, 2])
    return gl.convert_layout(scales.reshape([64 * R]), gl.SliceLayout(1, dot), assert_trivial=True)


@gluon.jit
def unpack(words, scale, HIGH: gl.constexpr, GROUPS: gl.constexpr, UNSIGNED: gl.constexpr = False):
    """Low or high nibbles of a register of 8 → four int8 weights g·(q−8); as ``w4ax_gemm._unpack``, same source.

    UNSIGNED: four uint8 weights g·(q−8) + 128 instead, an instruction less (only with groups).
    """
    if GROUPS == 0:
        shift: gl.constexpr = "mov.b32 t, $1;" if HIGH else "shl.b32 t, $1, 4;"
        times16: gl.constexpr = "{ .reg .b32 t; " + shift + " and.b32 $0, t, 0xF0F0F0F0; }"
        return gl.inline_asm_elementwise(times16, "=r,r,r,r,r", [words], dtype=gl.int8, is_pure=True, pack=4)
    else:
        s = gl.expand_dims(scale.to(gl.int32), len(scale.shape))
        offset = s * -134744072 - 2139062144  # 0x80808080 − s · 0x08080808
        nibble: gl.constexpr = "shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;" if HIGH else "and.b32 t, $1, 0x0F0F0F0F;"
        sign: gl.constexpr = "mov.b32 $0, t;" if UNSIGNED else "xor.b32 $0, t, 0x80808080;"
        scaled: gl.constexpr = "{ .reg .b32 t; " + nibble + " mad.lo.u32 t, t, $5, $9; " + sign + " }"
        return gl.inline_asm_elementwise(scaled, "=r,r,r,r,r,r,r,r,r,r,r,r,r", [words, s, offset], dtype=gl.int8,
                                         is_pure=True, pack=4)


# ------------------------------------------------------------------------------------------------------------- pipeline
@gluon.jit
def _first_block(step, plan, DEPTH: gl.constexpr):
    """First K block of a step, and whether the step is of the low segment.

    plan: (steps of the low segment, its blocks, all blocks). The high segment's steps begin with the block that holds
    the boundary.
    """
    low_steps, low_blocks, _ = plan
    is_low = step < low_steps
    return gl.where(is_low, step, step - low_steps + low_blocks // DEPTH) * DEPTH, is_low


@gluon.jit
def _load_block(weights, tile_n, step, i: gl.constexpr, plan, pred,
                R: gl.constexpr, DEPTH: gl.constexpr, GROUPS: gl.constexpr, UNSIGNED: gl.constexpr):  # fmt: skip
    """Weight words and both halves' scale pairs of block ``i`` of a step; weights of zero if it has no such block."""
    NO_PAIR: gl.constexpr = 0x1010 if UNSIGNED else 0  # 16 · (0 − 8) + 128 is 0
    w_ptr, g_ptr, words_at, pairs_at, n_pairs = weights
    _, low_blocks, blocks = plan
    block, is_low = _first_block(step, plan, DEPTH)
    block += i
    pred = pred & (block < blocks) & ((block < low_blocks) == is_low)
    w_ptr += tile_n.to(gl.int64) * (R * 1024) * blocks + block * 1024
    words = gl.load(w_ptr + words_at, mask=pred, other=0, cache_modifier=".cg")
    g_low = words
    g_high = words
    if GROUPS > 0:
        g_ptr += (block * GROUPS).to(gl.int64) * n_pairs + tile_n * (32 * R)
        g_low = gl.load(g_ptr + pairs_at, mask=pred, other=NO_PAIR)
        g_high = g_low
        if GROUPS > 1:
            g_high = gl.load(g_ptr + n_pairs + pairs_at, mask=pred, other=NO_PAIR)
    return words, g_low, g_high


@gluon.jit
def _fetch_activations(pipe, turn, tile_m, step, plan, pred,
                       BM: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Start copying the activations of a step, the program's ``turn``-th."""
    x_desc, ring, full = pipe
    slot = turn % STAGES
    block, _ = _first_block(step, plan, DEPTH)
    mbarrier.expect(full.index(slot), DEPTH * BM * 128, pred=pred)
    tma_load(x_desc, [block, tile_m * BM, 0], full.index(slot), ring.index(slot), pred=pred)


@gluon.jit
def _dot_steps(acc, pipe, weights, queue, tile_m, tile_n, first, begin, end, last, plan, R: gl.constexpr,
               BM: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr, AHEAD: gl.constexpr,
               GROUPS: gl.constexpr, PARTS: gl.constexpr, UNSIGNED: gl.constexpr):  # fmt: skip
    """``acc`` int32 ``[64·R, BM]`` plus the integer sum over steps ``begin .. end`` of the program's ``first .. last``.

    queue: the first AHEAD blocks of step ``begin`` as ``_load_block`` gives them; those of ``end`` are returned beside
    the sum.
    """
    mma: gl.constexpr = _mma_layout(BM, WARPS)
    dot: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    _, ring, full = pipe
    x_blocks = view(ring, gl.int8, [STAGES * DEPTH, BM, 128], gl.NVMMASharedLayout(128, 8, rank=2))
    for step in range(begin, end):
        turn = step - first
        slot = turn % STAGES
        mbarrier.wait(full.index(slot), (turn // STAGES) & 1)
        for i in gl.static_range(DEPTH):
            words, g_low, g_high = queue[i % AHEAD]
            if GROUPS > 0:
                g_low = _row_scales(g_low, R, dot)
                g_high = _row_scales(g_high, R, dot) if GROUPS > 1 else g_low
            x = x_blocks.index(slot * DEPTH + i).permute([1, 0])
            for part in gl.static_range(PARTS):
                a = _fragment(words, part, R, PARTS, dot)
                a = unpack(a, g_low if 2 * part < PARTS else g_high, 2 * part >= PARTS, GROUPS, UNSIGNED)
                # early, as ptxas lets all loads in flight share a scoreboard: the next wait is for these
                if part == (0 if AHEAD < DEPTH else PARTS - 1):
                    target = step + (i + AHEAD) // DEPTH
                    block = _load_block(weights, tile_n, target, (i + AHEAD) % DEPTH, plan, target < last, R, DEPTH,
                                        GROUPS, UNSIGNED)
                    queue = queue[: i % AHEAD] + (block,) + queue[i % AHEAD + 1 :]
                acc = warpgroup_mma(a, x.slice(part * (128 // PARTS), 128 // PARTS, dim=0), acc, is_async=True)
                if i == 0 and part == PARTS // 2:  # every warp is done with the step before, so its stage is free
                    cta_barrier()
                    ahead = step + STAGES - 1
                    _fetch_activations(pipe, turn + STAGES - 1, tile_m, ahead, plan, (turn >= 1) & (ahead < last), BM,
                                       DEPTH, STAGES)
                acc = warpgroup_mma_wait(PARTS // 2, deps=[acc])
    return warpgroup_mma_wait(0, deps=[acc]), queue


# --------------------------------------------------------------------------------------------------------------- kernel
@gluon.jit
def _tile_at(index, tiles_m, tiles_n, GROUP_N: gl.constexpr):
    """Token tile and row tile of output tile ``index``: GROUP_N row tiles share the activations that L2 holds."""
    group = index // (GROUP_N * tiles_m)
    width = gl.minimum(tiles_n - group * GROUP_N, GROUP_N)
    inside = index - group * GROUP_N * tiles_m
    return inside // width, group * GROUP_N + inside % width


@gluon.jit(do_not_specialize=["M", "blocks_k", "low_blocks", "total_steps"])
def _w4ax_kernel(x_desc, w_ptr, g_ptr, as_ptr, sums_ptr, c_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N,
                 n_pairs, blocks_k, low_blocks, total_steps, R: gl.constexpr, BM: gl.constexpr, SPLIT: gl.constexpr,
                 GROUP_N: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
                 AHEAD: gl.constexpr, GROUPS: gl.constexpr, PARTS: gl.constexpr, UNSIGNED: gl.constexpr,
                 TWO: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """Program (tile, slice of K); SPLIT says whether there is more than one slice."""
    BN: gl.constexpr = 64 * R
    mma: gl.constexpr = _mma_layout(BM, WARPS)
    tile, piece = gl.program_id(0), gl.program_id(1)
    tile_m, tile_n = _tile_at(tile, gl.cdiv(M, BM), gl.cdiv(N, BN), GROUP_N)
    low_steps = gl.cdiv(low_blocks, DEPTH)
    plan = (low_steps, low_blocks, blocks_k)
    pieces = gl.num_programs(1)
    per_piece = gl.cdiv(total_steps, pieces)
    first = piece * per_piece
    last = gl.minimum(first + per_piece, total_steps)
    middle = gl.minimum(gl.maximum(low_steps, first), last)

    ring = gl.allocate_shared_memory(gl.int8, [STAGES, DEPTH, BM, 128], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    pipe = (x_desc, ring, full)
    words: gl.constexpr = _words_layout(R, WARPS)
    row = gl.arange(0, R, layout=gl.SliceLayout(1, gl.SliceLayout(2, words)))
    quarter = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, words)))
    word = gl.arange(0, 256, layout=gl.SliceLayout(0, gl.SliceLayout(1, words)))
    words_at = row[:, None, None] * (blocks_k * 1024) + quarter[None, :, None] * 256 + word[None, None, :]
    pairs: gl.constexpr = _pairs_layout(R, WARPS)
    row = gl.arange(0, R, layout=gl.SliceLayout(1, pairs))
    pairs_at = row[:, None] * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, pairs))[None, :]
    weights = (w_ptr, g_ptr, words_at, pairs_at, n_pairs)
    queue = (_load_block(weights, tile_n, first, 0, plan, True, R, DEPTH, GROUPS, UNSIGNED),)
    for i in gl.static_range(1, AHEAD):
        queue = queue + (_load_block(weights, tile_n, first, i, plan, True, R, DEPTH, GROUPS, UNSIGNED),)
    gdc_launch_dependents()
    gdc_wait()
    for slot in gl.static_range(STAGES):
        _fetch_activations(pipe, slot, tile_m, first + slot, plan, first + slot < last, BM, DEPTH, STAGES)

    rn = tile_n * BN + gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    row_scale = stage(gl.load(c_ptr + rn, mask=rn < N, other=0.0))
    tokens = stage_tokens(as_ptr, sums_ptr, tile_m, M, BM, WARPS, TWO, UNSIGNED)
    zeros = gl.zeros([BN, BM], gl.int32, mma)
    acc, queue = _dot_steps(zeros, pipe, weights, queue, tile_m, tile_n, first, first, middle, last, plan, R, BM, WARPS,
                            STAGES, DEPTH, AHEAD, GROUPS, PARTS, UNSIGNED)
    if not SPLIT:
        if TWO:
            acc = rescale_staged(acc, tokens)
            acc, queue = _dot_steps(acc, pipe, weights, queue, tile_m, tile_n, first, middle, last, last, plan, R, BM,
                                    WARPS, STAGES, DEPTH, AHEAD, GROUPS, PARTS, UNSIGNED)
        write_output(acc, ring, tile_m, tile_n, tokens, row_scale, bias_ptr, y_ptr, M, N, WARPS, BIAS, UNSIGNED)
    else:
        # Slot i holds the low sum of slice i or the high sum of slice i − 1: only one slice can have both.
        total = flat(acc)
        cell = gl.arange(0, BN * BM, layout=total.type.layout)
        slots = partial_ptr + tile.to(gl.int64) * ((pieces + 1) * (BN * BM))
        gl.store(slots + piece * (BN * BM) + cell, total, mask=(cell >= 0) & (middle > first))
        if TWO:
            acc, queue = _dot_steps(zeros, pipe, weights, queue, tile_m, tile_n, first, middle, last, last, plan, R, BM,
                                    WARPS, STAGES, DEPTH, AHEAD, GROUPS, PARTS, UNSIGNED)
            gl.store(slots + (piece + 1) * (BN * BM) + cell, flat(acc), mask=(cell >= 0) & (last > middle))
        cta_barrier()
        arrived = gl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == pieces - 1:
            gl.store(counter_ptr + tile, 0)
            total = add_slots(flat(zeros), slots, cell, 0, gl.cdiv(low_steps, per_piece), WARPS)
            if TWO:
                total = flat(rescale_staged(unflat(total, BN, BM, mma), tokens))
                total = add_slots(total, slots, cell, low_steps // per_piece + 1, pieces + 1, WARPS)
            write_output(unflat(total, BN, BM, mma), ring, tile_m, tile_n, tokens, row_scale, bias_ptr, y_ptr, M, N,
                          WARPS, BIAS, UNSIGNED)


# ------------------------------------------------------------------------------------------------------------- launcher
SHARED_MEMORY = 232448  # bytes a program may use on Hopper
UNSIGNED_PTX = (".s32.s8.s8", ".s32.u8.s8")  # wgmma's types: Triton has no unsigned ones
X_LAYOUT = gl.NVMMASharedLayout(128, 8, rank=3)  # made once: a launch that makes its own takes a third longer


def count_steps(blocks: int, low_blocks: int, depth: int) -> int:
    """Steps of the whole K; one that both segments share counts twice."""
    low_steps = cdiv(low_blocks, depth)
    return low_steps if low_blocks == blocks else low_steps + cdiv(blocks, depth) - low_blocks // depth


def constants(tile: Tile, split: int, group_size: int, two: bool, sums: bool) -> dict[str, int | bool]:
    """The kernel's compile-time parameters for ``tile``; raises ValueError for a tile it can't run.

    split: slices of K. two: whether there is a high segment. sums: whether the sums of codes are at hand.
    """
    r, groups = tile.block_n // TILE_ROWS, 0 if group_size == -1 else BLOCK // group_size
    ahead = tile.ahead or tile.depth
    if tile.block_n > PAD_ROWS or tile.block_n < 16 * tile.warps or tile.depth < 1 or tile.depth % ahead:
        raise ValueError(f"{tile}: block_n must be at least 16 for each warp and at most {PAD_ROWS}, depth at least 1 "
                         "and a multiple of ahead.")
    if 64 * tile.stages * tile.depth < tile.block_n:
        raise ValueError(f"{tile}: the output, {tile.block_n} rows of 16 bits, goes through the memory of "
                         f"{tile.stages} stages of {tile.depth} blocks of 128 bytes. Use more stages.")
    used = tile.stages * (tile.depth * tile.block_m * BLOCK + 8) + 20 * tile.block_m + 4 * tile.block_n
    if used > SHARED_MEMORY:
        raise ValueError(f"{tile} needs {used} bytes of shared memory; Hopper has {SHARED_MEMORY}. Use fewer stages.")
    # Two groups a block have twice the scales to prepare; long products hide it better if issued in quarters.
    parts = 4 if groups > 1 and tile.block_m > 128 else 2
    return dict(R=r, BM=tile.block_m, SPLIT=split > 1, GROUP_N=tile.group_n, WARPS=tile.warps, STAGES=tile.stages,
                DEPTH=tile.depth, AHEAD=ahead, GROUPS=groups, PARTS=parts, UNSIGNED=groups > 0 and sums, TWO=two)


@functools.cache
def _launcher(tile: Tile, split: int, group_size: int, two: bool, bias: bool, sums: bool) -> Launcher:
    parameters = constants(tile, split, group_size, two, sums)
    return Launcher(_w4ax_kernel, UNSIGNED_PTX if parameters["UNSIGNED"] else None, **parameters, BIAS=bias,
                    num_warps=tile.warps, maxnreg=tile.registers or None, enable_fp_fusion=False, launch_pdl=True)


def w4ax_gemm_hopper(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: KernelWeight,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """``w4ax_gemm_ref`` on Hopper: codes int8 ``[M, Kpad]``, weight in layout ``hopper`` → ``[M, N]``.

    sums: int32 ``[M, 2]`` from ``act_quant.code_sums_ref``, for faster unpacking of weights with groups; or None.
    """
    m, blocks, low_blocks = codes.shape[0], weight.packed.shape[1], cdiv(weight.split, BLOCK)
    y = torch.empty(m, weight.n, dtype=out_dtype, device=codes.device)
    if m == 0:
        return y
    tiles = cdiv(m, tile.block_m) * cdiv(weight.n, tile.block_n)
    steps = count_steps(blocks, low_blocks, tile.depth)
    split = split_k(tile, tiles, steps)
    cells = tiles * (split + 1) * tile.block_m * tile.block_n if split > 1 else 0
    partial = torch.empty(cells, dtype=torch.int32, device=codes.device)
    scales = weight.group_scale
    if scales is None:
        sums = None
    x_desc = TensorDescriptor(codes, [blocks, m, BLOCK], [BLOCK, codes.stride(0), 1],
                              [tile.depth, tile.block_m, BLOCK], X_LAYOUT)
    _launcher(tile, split, weight.group_size, low_blocks < blocks, bias is not None, sums is not None)(
        (tiles, split, 1), x_desc, weight.packed, None if scales is None else scales.view(torch.int16), act_scales,
        sums, weight_scale, bias, y, partial, weight.counters, m, weight.n, weight.packed.shape[0] * (TILE_ROWS // 2),
        blocks, low_blocks, steps)
    return y
