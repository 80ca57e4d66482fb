# SPDX-License-Identifier: Apache-2.0
"""From integer sums to output in the Hopper GEMMs: activation segments joined, slices of K added, scales applied.

What a tile's output needs of its rows and tokens is fetched into shared memory before the products (``stage``), where
its latency is hidden and it costs no registers; the output leaves through the memory that held the activations.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def view(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        return memory.reinterpret(dtype, shape, layout)

else:

    @gluon.jit
    def view(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def rescale_factors(as_ptr, rm, M):
    """What takes the low sums of tokens ``rm`` into units of the high scale, see ``act_quant.align_scales``: factor,
    half a unit, right shift."""
    a = gl.load(as_ptr + rm * 2, mask=rm < M, other=0.0).to(gl.int32, bitcast=True)
    shift = (gl.load(as_ptr + rm * 2 + 1, mask=rm < M, other=0.0).to(gl.int32, bitcast=True) - a) >> 23
    right = gl.maximum(shift, 0)
    return 1 << gl.maximum(-shift, 0), (1 << right) >> 1, right


@gluon.jit
def rescale(low, factors):
    """``w4ax_gemm.rescale_sum``: ``factors`` belong to the last axis of ``low``."""
    times, half, right = factors
    return (low * gl.expand_dims(times, 0) + gl.expand_dims(half, 0)) >> gl.expand_dims(right, 0)


@gluon.jit
def stage(values):
    """A vector in shared memory: what the output needs of rows and tokens, fetched early and out of the registers."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    return gl.allocate_shared_memory(values.dtype, values.shape, layout, values)


@gluon.jit
def stage_tokens(as_ptr, sums_ptr, tile_m, M, BM: gl.constexpr, WARPS: gl.constexpr, TWO: gl.constexpr,
                 UNSIGNED: gl.constexpr):  # fmt: skip
    """Of a token tile: the scale of its sums, what is too much in them, and the factors of ``rescale``.

    Weights that were multiplied as w + 128 leave 128 times the sum of a token's codes too much in each segment; that of
    the low segment goes with the factors. int32 wraps around, so what overflows on the way comes back.
    """
    LAST: gl.constexpr = 1 if TWO else 0
    rm = tile_m * BM + gl.arange(0, BM, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    scale = stage(gl.load(as_ptr + rm * 2 + LAST, mask=rm < M, other=0.0))
    excess = scale
    if UNSIGNED:
        excess = stage(gl.load(sums_ptr + rm * 2 + LAST, mask=rm < M, other=0) * 128)
    factors = (scale, scale, scale)
    if TWO:
        times, half, right = rescale_factors(as_ptr, rm, M)
        if UNSIGNED:
            half -= gl.load(sums_ptr + rm * 2, mask=rm < M, other=0) * 128 * times
        factors = (stage(times), stage(half), stage(right))
    return scale, excess, factors


@gluon.jit
def rescale_staged(low, tokens):
    """``rescale`` of int32 sums ``[BN, BM]`` with what ``stage_tokens`` gave."""
    times, half, right = tokens[2]
    at: gl.constexpr = gl.SliceLayout(0, low.type.layout)
    return rescale(low, (times.load(at), half.load(at), right.load(at)))


@gluon.jit
def write_output(acc, ring, tile_m, tile_n, tokens, row_scale, bias_ptr, y_ptr, M, N,
                  WARPS: gl.constexpr, BIAS: gl.constexpr, UNSIGNED: gl.constexpr):  # fmt: skip
    """Sums int32 ``[BN, BM]`` → their tile of y ``[M, N]``: float32 times token scale, times row scale, plus bias.

    ring: shared memory that is free by now; tokens, row_scale: from ``stage_tokens`` and ``stage``.
    """
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    columns: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    if UNSIGNED:
        acc -= gl.expand_dims(tokens[1].load(columns), 0)
    y = acc.to(gl.float32) * gl.expand_dims(tokens[0].load(columns), 0)
    y *= gl.expand_dims(row_scale.load(rows), 1)
    if BIAS:
        rn = tile_n * BN + gl.arange(0, BN, layout=rows)
        y += gl.expand_dims(gl.load(bias_ptr + rn, mask=rn < N, other=0.0).to(gl.float32), 1)
    # through shared memory, for 16-byte stores along N: that of the activations, if it is sure to hold the tile
    kind: gl.constexpr = y_ptr.dtype.element_ty
    y = y.to(kind)
    coalesced: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])
    if kind.primitive_bitwidth == 16:
        staged = view(ring, kind, [BN, BM], gl.NVMMASharedLayout(128, 16, rank=2, transposed=True))
        staged.store(y)
        y = staged.load(coalesced)
    else:
        y = gl.convert_layout(y, coalesced)
    rn = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, coalesced))
    rm = tile_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, coalesced))
    offset = gl.expand_dims(rm.to(gl.int64) * N, 0) + gl.expand_dims(rn, 1)
    gl.store(y_ptr + offset, y, mask=gl.expand_dims(rm < M, 0) & gl.expand_dims(rn < N, 1))


@gluon.jit
def flat(acc):
    """Sum ``[BN, BM]`` as a vector in which a thread's four neighbouring registers are consecutive; no data moves."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    return acc.reshape([BN // 16, 2, 8, BM // 8, 4, 2]).permute([0, 3, 2, 4, 1, 5]).reshape([BN * BM])


@gluon.jit
def unflat(flat, BN: gl.constexpr, BM: gl.constexpr, mma: gl.constexpr):
    acc = flat.reshape([BN // 16, BM // 8, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([BN, BM])
    return gl.convert_layout(acc, mma, assert_trivial=True)


@gluon.jit
def add_slots(total, slots, cell, first, end, WARPS: gl.constexpr):
    """``total`` plus the sums in slots ``first .. end``."""
    AT_ONCE: gl.constexpr = max(1, 64 * 32 * WARPS // total.shape[0])  # loads for 64 registers in flight
    for base in range(first, end, AT_ONCE):
        for i in gl.static_range(AT_ONCE):
            slot = base + i
            wanted = (cell >= 0) & (slot < end)
            total += gl.load(slots + slot * total.shape[0] + cell, mask=wanted, other=0, cache_modifier=".cg")
    return total
