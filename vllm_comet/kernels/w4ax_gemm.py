# SPDX-License-Identifier: Apache-2.0
"""W4Ax GEMM: y = x Wᵀ with two-level 4-bit weights and two-segment 8/4-bit activations, accumulated in int32.

The reference defines the result. ``pack_weight`` brings a checkpoint's weight into the layout of the kernel that will
read it, and ``w4ax_gemm_triton`` is the plain Triton kernel for every GPU; Hopper's is in ``w4ax_gemm_hopper``.

Both kernels compute ``(W xᵀ)ᵀ``, so that W is the operand in registers: unpacked weights never touch shared memory.
Weights lie in contiguous tiles of 64 rows × 128 channels (4 KiB); a byte holds channel j of a block in its low nibble
and channel j + 64 in its high one, so that one load feeds two dot products. When N/tile leaves multiprocessors idle, K
is cut in ``split`` slices of whole blocks; the last slice of a tile to arrive adds up the integer sums of all of them,
so results don't depend on the order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_comet.checkpoint import BLOCK, num_blocks, unpack_int4
from vllm_comet.kernels._triton import Launcher, cdiv, require_triton, tl, triton
from vllm_comet.kernels.act_quant import pdl_supported
from vllm_comet.kernels.tiles import Tile

TILE_ROWS = 64
PAD_ROWS = 128
"""Rows of a packed weight are a multiple of this, so that tiles of up to as many rows need no bounds check."""
MAX_SPLIT_TILES = 2048
"""Counters of a weight: the most output tiles that a launch with split-K may have."""
PACK_SLICE_BYTES = 1 << 26


# ------------------------------------------------------------------------------------------------------------ reference
def w4ax_gemm_ref(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    split: int,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``y[m, n] = s[m, 1] · (Σ_{k<split} a·w · s[m, 0] / s[m, 1]  +  Σ_{k≥split} a·w) · c[n] + bias[n]`` → ``[M, N]``.

    codes int8 ``[M, K]`` and act_scales float32 ``[M, 2]`` from ``quantize_activation_ref``; weight int8 ``[N, K]``
    from ``checkpoint.integer_weight``; weight_scale float32 ``[N]``. Sums are exact integers, and so is the first one
    in units of the second scale (``rescale_sum``); the rest is float32. Without a second segment the scale is s[m, 0].
    """
    a, w = codes.to(torch.float64), weight.to(torch.float64)  # products and sums below 2**53: exact
    y = scaled_sums((a[:, :split] @ w[:, :split].T).to(torch.int32), (a[:, split:] @ w[:, split:].T).to(torch.int32),
                    act_scales, two=split < codes.shape[1]) * weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def rescale_sum(low: torch.Tensor, act_scales: torch.Tensor) -> torch.Tensor:
    """int32 sums ``[M, N]`` of the low segment in units of the high one's scale, halves rounded up."""
    bits = act_scales.view(torch.int32)
    shift = (bits[:, 1:] - bits[:, :1]) >> 23  # the scales differ by a power of two
    right = shift.clamp_min(0)
    return ((low << (-shift).clamp_min(0)) + ((1 << right) >> 1)) >> right


def scaled_sums(low: torch.Tensor, high: torch.Tensor, act_scales: torch.Tensor, two: bool) -> torch.Tensor:
    """float32 ``[M, N]`` of the int32 sums of both segments; two: whether there is a high segment."""
    if not two:
        return low.to(torch.float32) * act_scales[:, :1]
    return (rescale_sum(low, act_scales) + high).to(torch.float32) * act_scales[:, 1:]


# -------------------------------------------------------------------------------------------------------- weight layout
@dataclass(frozen=True)
class KernelWeight:
    """A weight ``[N, K]`` in the layout of its kernel.

    packed: int32 ``[tiles, ceil(K/128), 1024]``, tiles of 64 rows × 128 channels; an even number of them.
    group_scale: uint8 ``[ceil(K/128) · 128/group_size, 64·tiles]``, or None for group_size −1; in layout ``hopper``
        with rows i and i + 8 of each 16 side by side, since a thread needs both.
    counters: int32, all zero between launches; kernels with split-K count arrivals in them.
    layout: ``triton`` (a row of a tile is 64 consecutive bytes) or ``hopper`` (wgmma register order).
    """

    packed: torch.Tensor
    group_scale: torch.Tensor | None
    counters: torch.Tensor
    n: int
    k: int
    group_size: int
    split: int
    layout: str


def hopper_kernel_supported(device: torch.device) -> bool:
    """Whether ``device`` has wgmma and the bulk tensor copies that the Hopper kernel is made of (capability 9.x)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def pack_weight(
    weight_packed: torch.Tensor,
    weight_group_scale: torch.Tensor | None,
    group_size: int,
    split: int,
    layout: str | None = None,
) -> KernelWeight:
    """Repack ``weight_packed`` int32 ``[N, K/8]`` and ``weight_group_scale`` uint8 ``[N, ceil(K/group_size)]``.

    split: channels of the low activation segment, a multiple of 128 or K. layout: None chooses by the device's
    capability. Works on the tensors' device in slices of a few dozen MiB, so the peak is one layer, not one model.
    Rows up to a multiple of 128 and channels up to one of 128 are filled with weights of value zero.
    """
    n, k = weight_packed.shape[0], weight_packed.shape[1] * 8
    if split % BLOCK and split != k or not 0 <= split <= k:
        raise ValueError(f"split is {split}; allowed: multiples of {BLOCK} up to K = {k}, or K.")
    if (weight_group_scale is None) != (group_size == -1):
        wanted = "absent" if group_size == -1 else "given"
        raise ValueError(f"group_size is {group_size}: weight_group_scale must be {wanted}.")
    if layout is None:
        layout = "hopper" if hopper_kernel_supported(weight_packed.device) else "triton"
    tiles, blocks = padded_rows(n) // TILE_ROWS, num_blocks(k)
    packed = weight_packed.new_empty(tiles, blocks, 1024)
    step = max(1, PACK_SLICE_BYTES // (PAD_ROWS * blocks * BLOCK)) * (PAD_ROWS // TILE_ROWS)
    for first in range(0, tiles, step):
        rows = weight_packed[first * TILE_ROWS : (first + step) * TILE_ROWS]
        packed[first : first + step] = _pack_tiles(rows, group_size, layout)
    counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=packed.device)
    scales = _pack_group_scale(weight_group_scale, n, k, group_size, layout)
    return KernelWeight(packed, scales, counters, n, k, group_size, split, layout)


def padded_rows(n: int) -> int:
    return -(-n // PAD_ROWS) * PAD_ROWS


def _pack_tiles(weight_packed: torch.Tensor, group_size: int, layout: str) -> torch.Tensor:
    """int32 ``[n, K/8]`` in the checkpoint's packing → int32 ``[tiles, blocks, 1024]``."""
    q = unpack_int4(weight_packed)
    n, k = q.shape
    tiles, blocks = padded_rows(n) // TILE_ROWS, num_blocks(k)
    q = torch.nn.functional.pad(q, (0, blocks * BLOCK - k, 0, tiles * TILE_ROWS - n), value=8)
    if group_size == -1:
        q = q ^ 8  # the nibble of q − 8 in two's complement: 16·(q − 8) is the nibble in the high half of a byte
    if layout == "triton":
        halves = q.view(tiles, TILE_ROWS, blocks, 2, 64).permute(0, 2, 3, 1, 4)
    else:  # a thread's wgmma A fragment is 16 contiguous bytes: [32-channel step, warp, row, quad, k half, row half, 4]
        halves = q.view(tiles, 4, 2, 8, blocks, 2, 2, 2, 4, 4).permute(0, 4, 5, 6, 1, 3, 8, 7, 2, 9)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).contiguous().view(torch.int32).view(tiles, blocks, 1024)


def unpack_tiles(weight: KernelWeight) -> torch.Tensor:
    """The integer weight g·(q−8) int8 ``[N, K]`` of a packed weight: the inverse of ``pack_weight``."""
    tiles, blocks, _ = weight.packed.shape
    data = weight.packed.view(torch.uint8)
    if weight.layout == "triton":
        data = data.view(tiles, blocks, TILE_ROWS, 64)
    else:
        data = data.view(tiles, blocks, 2, 4, 8, 4, 2, 2, 4).permute(0, 1, 3, 7, 4, 2, 6, 5, 8)
        data = data.reshape(tiles, blocks, TILE_ROWS, 64)
    nibbles = torch.stack((data & 15, data >> 4), dim=3)  # [tiles, blocks, 64, 2, 64]
    q = nibbles.permute(0, 2, 1, 3, 4).reshape(tiles * TILE_ROWS, blocks * BLOCK)[: weight.n, : weight.k]
    if weight.group_scale is None:
        return ((q ^ 8).to(torch.int16) - 8).mul(16).to(torch.int8)
    g = weight.group_scale
    if weight.layout == "hopper":
        g = g.view(g.shape[0], -1, 8, 2).transpose(2, 3).reshape(g.shape)
    g = g.T[: weight.n].to(torch.int16).repeat_interleave(weight.group_size, dim=1)[:, : weight.k]
    return ((q.to(torch.int16) - 8) * g).to(torch.int8)


def _pack_group_scale(
    scale: torch.Tensor | None, n: int, k: int, group_size: int, layout: str
) -> torch.Tensor | None:
    if scale is None:
        return None
    groups, rows = num_blocks(k) * BLOCK // group_size, padded_rows(n)
    out = scale.new_ones(groups, rows)
    out[: scale.shape[1], :n] = scale.T
    if layout == "hopper":
        out = out.view(groups, rows // 16, 2, 8).transpose(2, 3).reshape(groups, rows)
    return out


# --------------------------------------------------------------------------------------------------------------- kernel
@triton.jit
def _unpack(words, scale, HIGH: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr):
    """Low or high nibbles of int8 ``words`` → the integer weight g·(q−8), int8.

    Four weights at once, after LiquidGEMM (arXiv 2509.01229): multiply the four nibbles of a register by g, add
    128 − 8·g to each byte (no carry crosses bytes, since 0 ≤ g·(q−8) + 128 ≤ 255) and flip the top bits.
    """
    if GROUPS == 0:  # g ≡ 16
        return words & -16 if HIGH else (words << 4).to(tl.int8)
    else:
        s = scale.to(tl.int32)
        if ASM:
            offset = s * -134744072 - 2139062144  # 0x80808080 − s · 0x08080808
            shift: tl.constexpr = "shr.u32 t, $1, 4; and.b32 t, t, 0x0F0F0F0F;"
            nibble: tl.constexpr = shift if HIGH else "and.b32 t, $1, 0x0F0F0F0F;"
            asm: tl.constexpr = "{ .reg .b32 t; " + nibble + " mad.lo.u32 t, t, $2, $6; xor.b32 $0, t, 0x80808080; }"
            return tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,r,r,r,r", [words, s, offset], dtype=tl.int8,
                                             is_pure=True, pack=4)
        else:
            nibble = words.to(tl.int32) >> 4 if HIGH else words.to(tl.int32)
            return (((nibble & 15) - 8) * s).to(tl.int8)


@triton.jit
def _dot_blocks(
    acc, w_rows, a_rows, g_rows, first, end, m_mask, n_pad,
    BN: tl.constexpr, BM: tl.constexpr, GROUPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """``acc`` int32 ``[BN, BM]`` plus the integer sum over blocks ``first .. end`` of W · xᵀ."""
    half = tl.arange(0, 64)
    group_stride = n_pad.to(tl.int64)
    for block in range(first, end):
        words = tl.load(w_rows[:, None] + (block * 4096 + half)[None, :])
        a_low = tl.load(a_rows[None, :] + (block * 128 + half)[:, None], mask=m_mask[None, :], other=0)
        a_high = tl.load(a_rows[None, :] + (block * 128 + 64 + half)[:, None], mask=m_mask[None, :], other=0)
        g_low = tl.zeros((BN, 64), tl.uint8)
        if GROUPS > 0:
            g_low = tl.load(g_rows + block * GROUPS * group_stride)[:, None].broadcast_to((BN, 64))
        g_high = g_low
        if GROUPS > 1:
            g_high = tl.load(g_rows + (block * GROUPS + 1) * group_stride)[:, None].broadcast_to((BN, 64))
        acc = tl.dot(_unpack(words, g_low, False, GROUPS, ASM), a_low, acc=acc, out_dtype=tl.int32)
        acc = tl.dot(_unpack(words, g_high, True, GROUPS, ASM), a_high, acc=acc, out_dtype=tl.int32)
    return acc


@triton.jit
def rescale(low, scales_at, inside):
    """``rescale_sum`` along the last axis; scales_at: pointers to the rows' pairs of scales."""
    a = tl.load(scales_at, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    shift = (tl.load(scales_at + 1, mask=inside, other=0.0).to(tl.int32, bitcast=True) - a) >> 23
    right = tl.maximum(shift, 0)[None, :]
    return ((low << tl.maximum(-shift, 0)[None, :]) + ((1 << right) >> 1)) >> right


@triton.jit
def _write_output(acc, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, TWO: tl.constexpr, BIAS: tl.constexpr):
    m_mask, n_mask = rm < M, rn < N
    y = acc.to(tl.float32) * tl.load(as_ptr + rm * 2 + (1 if TWO else 0), mask=m_mask, other=0.0)[None, :]
    y *= tl.load(c_ptr + rn, mask=n_mask, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + rn, mask=n_mask, other=0.0).to(tl.float32)[:, None]
    offset = rm.to(tl.int64)[None, :] * N + rn[:, None]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=m_mask[None, :] & n_mask[:, None])


@triton.jit(do_not_specialize=["M", "low_blocks"])
def _w4ax_kernel(
    a_ptr, as_ptr, w_ptr, g_ptr, c_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, n_pad, k_pad, low_blocks,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, GROUP_N: tl.constexpr, GROUPS: tl.constexpr,
    TWO: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One output tile of BN weight rows × BM tokens, one of SPLIT slices of K (program axis 1)."""
    tile, piece = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tile // (GROUP_N * tiles_m)  # GROUP_N column tiles share the activations that L2 holds
    width = tl.minimum(tiles_n - group * GROUP_N, GROUP_N)
    inside = tile - group * GROUP_N * tiles_m
    rn = (group * GROUP_N + inside % width) * BN + tl.arange(0, BN)
    rm = (inside // width) * BM + tl.arange(0, BM)
    blocks = k_pad // 128
    per_piece = tl.cdiv(blocks, SPLIT)
    first, end = piece * per_piece, tl.minimum((piece + 1) * per_piece, blocks)
    middle = tl.minimum(tl.maximum(low_blocks, first), end)
    m_mask = rm < M
    row = tl.minimum(rn, n_pad - 1)  # BN may reach past the last tile; those rows are computed and dropped
    w_rows = w_ptr + (row // 64).to(tl.int64) * (blocks * 4096) + (row % 64) * 64
    a_rows = a_ptr + rm.to(tl.int64) * k_pad
    g_rows = g_ptr + row if GROUPS > 0 else w_rows
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    scales_at = as_ptr + rm * 2
    zeros = tl.zeros((BN, BM), tl.int32)
    low = _dot_blocks(zeros, w_rows, a_rows, g_rows, first, middle, m_mask, n_pad, BN, BM, GROUPS, ASM)
    if SPLIT == 1:
        if TWO:
            low = rescale(low, scales_at, m_mask)
            low = _dot_blocks(low, w_rows, a_rows, g_rows, middle, end, m_mask, n_pad, BN, BM, GROUPS, ASM)
        _write_output(low, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, TWO, BIAS)
    else:
        high = zeros
        if TWO:
            high = _dot_blocks(zeros, w_rows, a_rows, g_rows, middle, end, m_mask, n_pad, BN, BM, GROUPS, ASM)
        # Slot i holds the low sum of slice i or the high sum of slice i − 1: only one slice can have both.
        cell = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        slots = partial_ptr + tile.to(tl.int64) * ((SPLIT + 1) * BN * BM)
        if middle > first:
            tl.store(slots + piece * (BN * BM) + cell, low)
        if TWO:  # noqa: SIM102 - TWO is known when compiling, the other condition is not
            if end > middle:
                tl.store(slots + (piece + 1) * (BN * BM) + cell, high)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            tl.store(counter_ptr + tile, 0)
            low_end = tl.cdiv(low_blocks, per_piece)
            low = tl.zeros((BN, BM), tl.int32)
            for slot in tl.static_range(SPLIT):  # slots that nothing wrote are read and dropped
                low += tl.where(slot < low_end, tl.load(slots + slot * (BN * BM) + cell, cache_modifier=".cg"), 0)
            if TWO:
                low = rescale(low, scales_at, m_mask)
                high_first = low_blocks // per_piece + 1
                for slot in tl.static_range(1, SPLIT + 1):
                    part = tl.load(slots + slot * (BN * BM) + cell, cache_modifier=".cg")
                    low += tl.where(slot >= high_first, part, 0)
            _write_output(low, rn, rm, as_ptr, c_ptr, bias_ptr, y_ptr, M, N, TWO, BIAS)


# ------------------------------------------------------------------------------------------------------------- launcher
def split_k(tile: Tile, tiles: int, blocks: int) -> int:
    """Slices of K that ``tile`` may use for this many output tiles: none empty, never more counters than there are."""
    if tiles > MAX_SPLIT_TILES:
        return 1
    per_piece = -(-blocks // min(tile.split, blocks))
    return -(-blocks // per_piece)


@functools.cache
def _launcher(tile: Tile, split: int, group_size: int, two: bool, bias: bool, device: torch.device) -> Launcher:
    require_triton("the W4Ax GEMM")
    pdl = pdl_supported(device)
    return Launcher(
        _w4ax_kernel, BM=tile.block_m, BN=tile.block_n, SPLIT=split, GROUP_N=tile.group_n,
        GROUPS=0 if group_size == -1 else BLOCK // group_size, TWO=two, BIAS=bias,
        ASM=device.type == "cuda" and torch.version.hip is None, PDL=pdl, num_warps=tile.warps,
        num_stages=tile.stages, enable_fp_fusion=False, **({"launch_pdl": True} if pdl else {}))


def w4ax_gemm_triton(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: KernelWeight,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile,
    sums: torch.Tensor | None = None,  # of codes; not needed here
) -> torch.Tensor:
    """``w4ax_gemm_ref`` in plain Triton: codes int8 ``[M, Kpad]``, weight in layout ``triton`` → ``[M, N]``."""
    m, blocks = codes.shape[0], weight.packed.shape[1]
    y = torch.empty(m, weight.n, dtype=out_dtype, device=codes.device)
    if m == 0:
        return y
    tiles = cdiv(m, tile.block_m) * cdiv(weight.n, tile.block_n)
    split = split_k(tile, tiles, blocks)
    cells = tiles * (split + 1) * tile.block_m * tile.block_n if split > 1 else 0
    partial = torch.empty(cells, dtype=torch.int32, device=codes.device)
    _launcher(tile, split, weight.group_size, weight.split < weight.k, bias is not None, codes.device)(
        (tiles, split, 1), codes, act_scales, weight.packed.view(torch.int8), weight.group_scale, weight_scale, bias, y,
        partial, weight.counters, m, weight.n, weight.packed.shape[0] * TILE_ROWS, blocks * BLOCK,
        -(-weight.split // BLOCK))
    return y
