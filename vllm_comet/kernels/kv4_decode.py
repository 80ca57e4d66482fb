# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the 4-bit KV cache: one query token per request, pages read once, work split evenly.

The tiles of all requests form one list, cut in equal shares, one a program and KV head (the idea of stream-K, for
attention: Lean Attention, arXiv:2405.10480). So a batch of any mixture of lengths loads every SM alike, and the grid
depends on nothing but the GPU: a CUDA graph captured once serves every batch. A request that lies in several shares
leaves one partial result a share in scratch memory, which a second kernel merges. Arithmetic: ``kv4_attention``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vllm_comet.kernels._triton import require_triton, tl, triton
from vllm_comet.kernels.kv4_attention import dequantize, meta_scale, meta_zero, nibbles
from vllm_comet.kernels.kv4_cache import page_views

MAX_GROUP = 16
"""Query heads per KV head: they are the 16 rows of a tensor-core instruction."""


class DecodeScratch(NamedTuple):
    """Device memory for partial results. Layers of one shape on one stream may share it; its content never matters."""

    partial: torch.Tensor  # float32 [H, programs, 2, D, rows]
    lse: torch.Tensor  # float32 [H, programs, 2, rows], log2


@triton.jit
def _share(seq_lens_ptr, requests, window, programs, r, T: tl.constexpr):
    """How the tiles of all requests are cut: their running ends ``[len(r)]``, and the tiles in a program's share.

    An empty request (graph padding) counts as one tile and gives zeros.
    """
    lens = tl.load(seq_lens_ptr + r, mask=r < requests, other=0)
    tiles = tl.maximum(tl.cdiv(lens, T) - tl.maximum(lens - window, 0) // T, 1)
    ends = tl.cumsum(tl.where(r < requests, tiles, 0), 0)
    return ends, tl.cdiv(tl.max(ends, 0), programs)


@triton.jit(do_not_specialize=["requests", "window"])
def _decode_kernel(
    q_ptr, codes_ptr, meta_ptr, table_ptr, seq_lens_ptr, out_ptr, partial_ptr, lse_ptr,
    requests, window, scale_log2, stride_q: tl.int64, stride_out: tl.int64, stride_table: tl.int64,
    stride_page, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, MAX_REQUESTS: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs, H), one warp each. Tokens are the rows of the tensor-core instructions, query heads the columns.

    Strides of the cache are in int16. LANES is D / 4 and ROWS the query heads, rounded up to what a dot takes.
    """
    L: tl.constexpr = D // 4
    GROUP_SIZE: tl.constexpr = D // GROUPS
    EXPAND: tl.constexpr = GROUP_SIZE % L != 0  # a plane spans groups: dequantise, as scales can't leave the product
    FOLDS: tl.constexpr = 1 if EXPAND else GROUPS  # groups whose scale and zero-point fold into scores and output
    PLANES: tl.constexpr = 4 // FOLDS  # planes per such group
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    head = tl.program_id(1)

    r = tl.arange(0, MAX_REQUESTS)
    ends, share = _share(seq_lens_ptr, requests, window, programs, r, T)
    share_begin = program * share
    share_end = tl.minimum(share_begin + share, tl.max(ends, 0))
    if share_begin >= share_end:
        return
    request_begin = tl.sum((ends <= share_begin).to(tl.int32), 0)
    request_end = tl.sum((ends < share_end).to(tl.int32), 0) + 1

    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    token = tl.arange(0, T)
    lane_ok = lane < L
    row_ok = row < GROUP
    for request in range(request_begin, request_end):
        length = tl.load(seq_lens_ptr + request)
        first_token = tl.maximum(length - window, 0)
        end = tl.sum(tl.where(r == request, ends, 0), 0)
        begin = end - tl.maximum(tl.cdiv(length, T) - first_token // T, 1)
        tile_begin = tl.maximum(share_begin, begin) - begin + first_token // T
        tile_end = tl.minimum(share_end, end) - begin + first_token // T

        q_at = q_ptr + request * stride_q + (head * GROUP + row)[None, :] * D + lane[:, None]
        q = ()
        q_sum = ()
        for g in tl.static_range(FOLDS):
            sum_g = tl.zeros((ROWS,), tl.float32)
            for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                plane = tl.load(q_at + i * L, mask=lane_ok[:, None] & row_ok[None, :], other=0.0).to(tl.float16)
                sum_g += tl.sum(plane.to(tl.float32), 0)
                if i % 2 == 1 and not EXPAND:
                    plane = (plane * 0.0625).to(tl.float16)  # odd planes hold 16 · code
                q = q + (plane,)
            q_sum = q_sum + ((sum_g * scale_log2)[None, :],)

        m = tl.full((ROWS,), -1e30, tl.float32)
        den = tl.zeros((ROWS,), tl.float32)
        z = ()
        o = ()
        for _ in tl.static_range(FOLDS):
            z = z + (tl.zeros((ROWS,), tl.float32),)
        for _ in tl.static_range(4):
            o = o + (tl.zeros((LANES, ROWS), tl.float32),)

        table = table_ptr + request * stride_table
        for tile in range(tile_begin, tile_end):
            t = tile * T + token
            ok = (t >= first_token) & (t < length)
            page = tl.load(table + t // BLOCK, mask=t < length, other=0)
            base = page.to(tl.int64) * stride_page + head * stride_head
            at = base + (t % BLOCK) * L
            k = tl.load(codes_ptr + at[:, None] + lane[None, :], mask=lane_ok[None, :], other=0)
            v = tl.load(codes_ptr + (at + BLOCK * L)[None, :] + lane[:, None], mask=lane_ok[:, None], other=0)
            meta_at = meta_ptr + base // 2 + (BLOCK * L + (t % BLOCK) * GROUPS)

            s = tl.where(ok, 0.0, -1e30)[:, None]
            if EXPAND:
                real = ok[:, None] & lane_ok[None, :]
                for i in tl.static_range(4):
                    x = dequantize(k, i, meta_at[:, None], lane[None, :], real, L, GROUP_SIZE)
                    s += tl.dot(x, q[i]) * scale_log2
            else:
                for g in tl.static_range(FOLDS):
                    meta = tl.load(meta_at + g, mask=ok, other=0)
                    dot = tl.zeros((T, ROWS), tl.float32)
                    for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                        dot = tl.dot(nibbles(k, i), q[i], dot)
                    s += dot * (meta_scale(meta) * (scale_log2 * 16777216.0))[:, None]
                    s += q_sum[g] * meta_zero(meta)[:, None]

            m_new = tl.maximum(m, tl.max(s, 0))
            alpha = tl.exp2(m - m_new)
            m = m_new
            p = tl.exp2(s - m_new[None, :])
            den = den * alpha + tl.sum(p, 0)
            z_new = ()
            o_new = ()
            meta_at += BLOCK * GROUPS
            if EXPAND:
                z_new = z
                real = lane_ok[:, None] & ok[None, :]
                for i in tl.static_range(4):
                    x = dequantize(v, i, meta_at[None, :], lane[:, None], real, L, GROUP_SIZE)
                    o_new = o_new + (tl.dot(x, p.to(tl.float16), o[i] * alpha[None, :]),)
            else:
                for g in tl.static_range(FOLDS):
                    meta = tl.load(meta_at + g, mask=ok, other=0)
                    z_new = z_new + (z[g] * alpha + tl.sum(p * meta_zero(meta)[:, None], 0),)
                    pv = (p * tl.minimum(meta_scale(meta) * 64.0, 65504.0)[:, None]).to(tl.float16)
                    for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                        o_new = o_new + (tl.dot(nibbles(v, i), pv, o[i] * alpha[None, :]),)
            z = z_new
            o = o_new

        whole = (begin >= share_begin) & (end <= share_end)
        # slot 0: the share begins inside the request; slot 1: the request begins inside the share
        slot = 2 * (head * programs + program) + (begin >= share_begin).to(tl.int32)
        out_at = out_ptr + request * stride_out + (head * GROUP + row)[None, :] * D + lane[:, None]
        partial_at = partial_ptr + (slot * D + lane)[:, None] * ROWS + row[None, :]
        if not whole:
            tl.store(lse_ptr + slot * ROWS + row, m + tl.log2(den))
        for i in tl.static_range(4):
            o_i = o[i]
            if not EXPAND:  # the units of the nibbles (2⁻²⁴, odd planes 2⁻²⁰) and the 64 in P
                o_i *= 262144.0 if i % 2 == 0 else 16384.0
            o_i = (o_i + z[0 if EXPAND else i // PLANES][None, :]) / den[None, :]
            if whole:
                tl.store(out_at + i * L, o_i, mask=lane_ok[:, None] & row_ok[None, :])
            else:
                tl.store(partial_at + i * L * ROWS, o_i, mask=lane_ok[:, None])


@triton.jit(do_not_specialize=["requests", "window", "programs"])
def _merge_kernel(
    partial_ptr, lse_ptr, seq_lens_ptr, out_ptr, requests, window, programs, stride_out: tl.int64,
    GROUP: tl.constexpr, D: tl.constexpr, MAX_REQUESTS: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (R, H, ceil(D / CHANNELS)): merge the partial results of a request that lies in several shares."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    r = tl.arange(0, MAX_REQUESTS)
    ends, share = _share(seq_lens_ptr, requests, window, programs, r, T)
    first = tl.max(tl.where(r < request, ends, 0), 0) // share
    last = (tl.sum(tl.where(r == request, ends, 0), 0) - 1) // share
    if first < last:
        if PDL:
            tl.extra.cuda.gdc_wait()
        row = tl.arange(0, ROWS)
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        m = tl.full((ROWS,), -1e30, tl.float32)
        den = tl.zeros((ROWS,), tl.float32)
        o = tl.zeros((CHANNELS, ROWS), tl.float32)
        for start in range(first, last + 1, CHUNK):
            program = start + tl.arange(0, CHUNK)
            real = (program <= last)[:, None]
            slot = 2 * (head * programs + program) + (program == first).to(tl.int32)
            lse = tl.load(lse_ptr + slot[:, None] * ROWS + row[None, :], mask=real, other=-1e30)
            part = tl.load(
                partial_ptr + (slot[:, None, None] * D + channel[None, :, None]) * ROWS + row[None, None, :],
                mask=real[:, :, None] & (channel < D)[None, :, None], other=0.0,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(lse, 0))
            weight = tl.exp2(lse - m_new[None, :])
            alpha = tl.exp2(m - m_new)
            den = den * alpha + tl.sum(weight, 0)
            o = o * alpha[None, :] + tl.sum(part * weight[:, None, :], 0)
            m = m_new
        out_at = out_ptr + request * stride_out + (head * GROUP + row)[None, :] * D + channel[:, None]
        tl.store(out_at, o / den[None, :], mask=(channel < D)[:, None] & (row < GROUP)[None, :])


class _Tile(NamedTuple):
    tokens: int
    stages: int
    programs_per_sm: int
    registers: int | None  # a thread; what lets programs_per_sm one-warp programs fit


def _tile(head_dim: int) -> _Tile:
    return _Tile(64, 5, 12, 168)


def _rows(num_heads: int, num_kv_heads: int) -> int:
    return 8 if num_heads // num_kv_heads <= 8 else 16


def make_scratch(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> DecodeScratch:
    """Scratch for ``decode``; allocate before CUDA-graph capture."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = max(1, sms * _tile(head_dim).programs_per_sm // num_kv_heads)
    shape, rows = (num_kv_heads, programs, 2), _rows(num_heads, num_kv_heads)
    return DecodeScratch(
        torch.empty(*shape, head_dim, rows, dtype=torch.float32, device=device),
        torch.empty(*shape, rows, dtype=torch.float32, device=device),
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

    Safe inside a CUDA graph: nothing is read on the host, and the grid depends on R, the GPU and the KV heads alone.
    """
    require_triton("decode attention")
    requests, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.shape
    group, groups = num_heads // num_kv_heads, head_dim // group_size
    if group > MAX_GROUP or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads over {num_kv_heads} KV heads; allowed: 1 to {MAX_GROUP} per one.")
    page_views(cache, head_dim, group_size)  # checks the layout
    expand = group_size % (head_dim // 4) != 0
    tile, rows, programs = _tile(head_dim), _rows(num_heads, num_kv_heads), scratch.lse.shape[1]
    window = 2**30 if window is None else window
    max_requests = next(n for n in (16, 128, 1024, 8192, 65536) if requests <= n)
    pdl = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    _decode_kernel[(programs, num_kv_heads)](
        q, cache.view(torch.int16), cache.view(torch.int32), block_table, seq_lens, out, *scratch,
        requests, window, scale * math.log2(math.e), q.stride(0), out.stride(0), block_table.stride(0),
        cache.stride(0) // 2, cache.stride(1) // 2,
        GROUP=group, D=head_dim, GROUPS=groups, BLOCK=block_size, MAX_REQUESTS=max_requests, T=tile.tokens,
        ROWS=rows, LANES=max(16, triton.next_power_of_2(head_dim // 4)), PDL=pdl,
        num_warps=1, num_stages=1 if expand else tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    channels = max(16, triton.next_power_of_2(head_dim) // (8 if requests <= 4 else 4 if requests <= 16 else 1))
    _merge_kernel[(requests, num_kv_heads, triton.cdiv(head_dim, channels))](
        *scratch, seq_lens, out, requests, window, programs, out.stride(0),
        GROUP=group, D=head_dim, MAX_REQUESTS=max_requests, T=tile.tokens, ROWS=rows, CHANNELS=channels,
        CHUNK=8192 // (channels * rows), PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
