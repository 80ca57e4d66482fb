# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the 4-bit KV cache: one query token per request, pages read once, work split evenly.

The tiles of all requests form one list, cut in equal shares, one a program and KV head (the idea of stream-K, for
attention: Lean Attention, arXiv:2405.10480). So a batch of any mixture of lengths loads every SM alike, and the grid
depends on nothing but the GPU: a CUDA graph captured once serves every batch. A request that lies in several shares
leaves one partial result a share in scratch memory; the program that finishes last merges them, without a second
kernel or a host sync. Arithmetic: ``kv4_attention``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vllm_comet.kernels._triton import tl, triton
from vllm_comet.kernels.kv4_attention import dequantize, meta_scale, meta_zero, nibbles
from vllm_comet.kernels.kv4_cache import page_views

MAX_GROUP = 16
"""Query heads per KV head: they are the 16 rows of a tensor-core instruction."""


class DecodeScratch(NamedTuple):
    """Device memory that ``decode`` needs between its programs. Layers of one shape on one stream may share it."""

    partial: torch.Tensor  # float32 [H, 2 · programs, Hq / H, D]
    lse: torch.Tensor  # float32 [H, 2 · programs, Hq / H], log2
    counters: torch.Tensor  # int32 [max requests, H], zero between calls


@triton.jit
def _merge(
    partial_ptr, lse_ptr, out_ptr, head, first, last, slots,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of programs ``first .. last`` of a request and KV head into ``out_ptr`` [GROUP, D]."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    m = tl.full((ROWS,), -1e30, tl.float32)
    den = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(first, last + 1, CHUNK):
        program = start + tl.arange(0, CHUNK)
        # slot 0 of a program: its share begins inside the request; slot 1: the request begins inside its share
        slot = (head * slots + 2 * program + (program == first).to(tl.int32))[:, None] * GROUP + row[None, :]
        real = (program <= last)[:, None] & (row < GROUP)[None, :]
        # .cg: other SMs wrote these, so the L1 cache may hold old ones
        lse = tl.load(lse_ptr + slot, mask=real, other=-1e30, cache_modifier=".cg")
        part = tl.load(
            partial_ptr + slot[:, :, None] * D + channel[None, None, :],
            mask=real[:, :, None] & (channel < D)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse, 0))
        weight = tl.exp2(lse - m_new[None, :])
        alpha = tl.exp2(m - m_new)
        den = den * alpha + tl.sum(weight, 0)
        o = o * alpha[:, None] + tl.sum(part * weight[:, :, None], 0)
        m = m_new
    at = row[:, None] * D + channel[None, :]
    tl.store(out_ptr + at, o / den[:, None], mask=(row < GROUP)[:, None] & (channel < D)[None, :])


@triton.jit(do_not_specialize=["requests", "window", "programs", "stride_table"])
def _decode_kernel(
    q_ptr, codes_ptr, meta_ptr, table_ptr, seq_lens_ptr, out_ptr, partial_ptr, lse_ptr, counters_ptr,
    requests, window, scale_log2, stride_q: tl.int64, stride_out: tl.int64, stride_table: tl.int64,
    stride_page: tl.int64, stride_head: tl.int64,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    MAX_REQUESTS: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CHUNK: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (programs, HEADS). A tile is WARPS × TOKENS tokens: each warp keeps its own softmax until the epilogue.

    Tensors of a tile are [WARPS, ...]: a warp owns one leading index, so the loop needs no exchange between warps.
    Strides of the cache are in int16; LANES is D / 4 rounded up to a power of two.
    """
    L: tl.constexpr = D // 4
    T: tl.constexpr = WARPS * TOKENS
    GROUP_SIZE: tl.constexpr = D // GROUPS
    EXPAND: tl.constexpr = GROUP_SIZE % L != 0  # a plane spans groups: dequantise, as scales can't leave the product
    FOLDS: tl.constexpr = 1 if EXPAND else GROUPS  # groups whose scale and zero-point fold into scores and output
    PLANES: tl.constexpr = 4 // FOLDS  # planes per such group
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    head = tl.program_id(1)

    # This program's share of the list of tiles. An empty request (graph padding) counts as a tile and gives zeros.
    r = tl.arange(0, MAX_REQUESTS)
    lens = tl.load(seq_lens_ptr + r, mask=r < requests, other=0)
    skipped = tl.maximum(lens - window, 0) // T
    tiles = tl.where(r < requests, tl.maximum(tl.cdiv(lens, T) - skipped, 1), 0)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    share = tl.cdiv(total, programs)
    share_begin = program * share
    share_end = tl.minimum(share_begin + share, total)
    if share_begin >= total:
        return
    request_begin = tl.sum((ends <= share_begin).to(tl.int32), 0)
    request_end = tl.sum((ends < share_end).to(tl.int32), 0) + 1

    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    token = tl.arange(0, WARPS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    lane_ok = lane < L
    for request in range(request_begin, request_end):
        length = tl.load(seq_lens_ptr + request)
        first_token = tl.maximum(length - window, 0)
        end = tl.sum(tl.where(r == request, ends, 0), 0)
        begin = end - tl.maximum(tl.cdiv(length, T) - first_token // T, 1)
        tile_begin = tl.maximum(share_begin, begin) - begin + first_token // T
        tile_end = tl.minimum(share_end, end) - begin + first_token // T

        q_at = q_ptr + request * stride_q + (head * GROUP + row)[:, None] * D + lane[None, :]
        q_ok = (row < GROUP)[:, None] & lane_ok[None, :]
        q = ()
        q_sum = ()
        for g in tl.static_range(FOLDS):
            total_g = tl.zeros((ROWS,), tl.float32)
            for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                plane = tl.load(q_at + i * L, mask=q_ok, other=0.0).to(tl.float16)
                total_g += tl.sum(plane.to(tl.float32), 1)
                if i % 2 == 1 and not EXPAND:
                    plane = (plane * 0.0625).to(tl.float16)  # odd planes hold 16 · code
                q = q + (tl.broadcast_to(plane[None, :, :], (WARPS, ROWS, LANES)),)
            q_sum = q_sum + ((total_g * scale_log2)[None, :, None],)

        m = tl.full((WARPS, ROWS), -1e30, tl.float32)
        den = tl.zeros((WARPS, ROWS), tl.float32)
        z = ()
        o = ()
        for _ in tl.static_range(FOLDS):
            z = z + (tl.zeros((WARPS, ROWS), tl.float32),)
        for _ in tl.static_range(4):
            o = o + (tl.zeros((WARPS, ROWS, LANES), tl.float32),)

        table = table_ptr + request * stride_table
        for tile in range(tile_begin, tile_end):
            t = tile * T + token
            ok = (t >= first_token) & (t < length)
            page = tl.load(table + t // BLOCK, mask=t < length, other=0)
            base = page * stride_page + head * stride_head
            at = (base + (t % BLOCK) * L)[:, :, None] + lane[None, None, :]
            k = tl.load(codes_ptr + at, mask=lane_ok[None, None, :], other=0)
            v = tl.load(codes_ptr + at + BLOCK * L, mask=lane_ok[None, None, :], other=0)
            meta_at = meta_ptr + base // 2 + (BLOCK * L + (t % BLOCK) * GROUPS)

            s = tl.where(ok, 0.0, -1e30)[:, None, :]
            if EXPAND:
                real = ok[:, :, None] & lane_ok[None, None, :]
                for i in tl.static_range(4):
                    x = dequantize(k, i, meta_at[:, :, None], lane[None, None, :], real, L, GROUP_SIZE)
                    s += tl.dot(q[i], tl.trans(x, (0, 2, 1))) * scale_log2
            else:
                k = tl.trans(k, (0, 2, 1))
                for g in tl.static_range(FOLDS):
                    meta = tl.load(meta_at + g, mask=ok, other=0)
                    dot = tl.zeros((WARPS, ROWS, TOKENS), tl.float32)
                    for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                        dot = tl.dot(q[i], nibbles(k, i), dot)
                    s += dot * (meta_scale(meta) * (scale_log2 * 16777216.0))[:, None, :]
                    s += q_sum[g] * meta_zero(meta)[:, None, :]

            m_new = tl.maximum(m, tl.max(s, 2))
            alpha = tl.exp2(m - m_new)
            m = m_new
            p = tl.exp2(s - m_new[:, :, None])
            den = den * alpha + tl.sum(p, 2)
            z_new = ()
            o_new = ()
            meta_at += BLOCK * GROUPS
            if EXPAND:
                z_new = z
                for i in tl.static_range(4):
                    x = dequantize(v, i, meta_at[:, :, None], lane[None, None, :], real, L, GROUP_SIZE)
                    o_new = o_new + (tl.dot(p.to(tl.float16), x, o[i] * alpha[:, :, None]),)
            else:
                for g in tl.static_range(FOLDS):
                    meta = tl.load(meta_at + g, mask=ok, other=0)
                    z_new = z_new + (z[g] * alpha + tl.sum(p * meta_zero(meta)[:, None, :], 2),)
                    pv = (p * tl.minimum(meta_scale(meta) * 64.0, 65504.0)[:, None, :]).to(tl.float16)
                    for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                        o_new = o_new + (tl.dot(pv, nibbles(v, i), o[i] * alpha[:, :, None]),)
            z = z_new
            o = o_new

        # The warps' results into one.
        max_all = tl.max(m, 0)
        weight = tl.exp2(m - max_all[None, :])
        den_all = tl.sum(den * weight, 0)
        out = ()
        for i in tl.static_range(4):
            o_i = tl.sum(o[i] * weight[:, :, None], 0)
            if not EXPAND:  # the units of the nibbles (2⁻²⁴, odd planes 2⁻²⁰) and the 64 in P
                o_i *= 262144.0 if i % 2 == 0 else 16384.0
            o_i += tl.sum(z[0 if EXPAND else i // PLANES] * weight, 0)[:, None]
            out = out + (o_i / den_all[:, None],)

        first = begin // share
        last = (end - 1) // share
        out_at = out_ptr + request * stride_out + head * GROUP * D
        o_ok = (row < GROUP)[:, None] & lane_ok[None, :]
        if first == last:
            for i in tl.static_range(4):
                tl.store(out_at + row[:, None] * D + (i * L + lane)[None, :], out[i], mask=o_ok)
        else:
            slot = (head * (2 * programs) + 2 * program + (program == first).to(tl.int32)) * GROUP + row
            tl.store(lse_ptr + slot, max_all + tl.log2(den_all), mask=row < GROUP)
            for i in tl.static_range(4):
                tl.store(partial_ptr + slot[:, None] * D + (i * L + lane)[None, :], out[i], mask=o_ok)
            tl.debug_barrier()  # every thread's stores before the one atomic, which releases them to the other programs
            counter = counters_ptr + request * HEADS + head
            if tl.atomic_add(counter, 1, sem="acq_rel") == last - first:
                tl.store(counter, 0)
                _merge(
                    partial_ptr, lse_ptr, out_at, head, first, last, 2 * programs,
                    GROUP, MERGE_ROWS, D, 4 * LANES, CHUNK,
                )  # fmt: skip


class _Tile(NamedTuple):
    warps: int
    tokens: int  # a warp
    stages: int
    programs_per_sm: int
    registers: int | None  # a thread; what lets programs_per_sm programs fit


def _tile(head_dim: int) -> _Tile:
    return _Tile(4, 32, 5, 3, 168)


def make_scratch(
    max_requests: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeScratch:
    """Scratch for ``decode`` of up to ``max_requests`` requests a call; allocate before CUDA-graph capture."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs = max(1, sms * _tile(head_dim).programs_per_sm // num_kv_heads)
    shape = (num_kv_heads, 2 * programs, num_heads // num_kv_heads)
    return DecodeScratch(
        torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
        torch.zeros(max_requests, num_kv_heads, dtype=torch.int32, device=device),
    )


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    group_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    scratch: DecodeScratch,
) -> torch.Tensor:
    """Attention of one query token per request over its 4-bit pages; fills and returns ``out``.

    q, out: ``[R, Hq, D]`` (bf16, fp16 or fp32), heads of a token contiguous. cache: uint8 ``[B, H, block_size, C]``.
    block_table: int32 ``[R, P]``, only the entries of a request's own pages are read. seq_lens: int32 ``[R]``, the
    query's token included; 0 marks graph padding and gives zeros. window: as in ``attention_ref``.
    scratch: from ``make_scratch`` for the same heads and device.

    Safe inside a CUDA graph: nothing is read on the host, and the grid depends on the GPU and the KV heads alone.
    """
    requests, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.shape
    group, groups, lanes = num_heads // num_kv_heads, head_dim // group_size, head_dim // 4
    if group > MAX_GROUP or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads over {num_kv_heads} KV heads; allowed: 1 to {MAX_GROUP} per one.")
    if requests > scratch.counters.shape[0]:
        raise ValueError(f"{requests} requests, but the scratch was made for {scratch.counters.shape[0]}.")
    page_views(cache, head_dim, group_size)  # checks the layout
    tile = _tile(head_dim)
    programs = scratch.lse.shape[1] // 2
    rows, padded = triton.next_power_of_2(group), triton.next_power_of_2(lanes)
    _decode_kernel[(programs, num_kv_heads)](
        q, cache.view(torch.int16), cache.view(torch.int32), block_table, seq_lens, out, *scratch,
        requests, 2**30 if window is None else window, scale * math.log2(math.e),
        q.stride(0), out.stride(0), block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2,
        HEADS=num_kv_heads, GROUP=group, D=head_dim, GROUPS=groups, BLOCK=block_size,
        MAX_REQUESTS=next(n for n in (16, 128, 1024, 8192, 65536) if requests <= n),
        WARPS=tile.warps, TOKENS=tile.tokens, ROWS=16, LANES=padded,
        CHUNK=max(1, 2048 * tile.warps // (rows * 4 * padded)), MERGE_ROWS=rows,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return out
