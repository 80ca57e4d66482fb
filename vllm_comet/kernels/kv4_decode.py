# SPDX-License-Identifier: Apache-2.0
"""Decode attention over the 4-bit KV cache: one query token per request, every page read once.

``plan`` cuts each request in parts of about equal length, as many as fill the GPU once; it runs once a step, on the
device. ``decode`` runs once a layer: one program a part and KV head, then a kernel that merges the parts of a request.
Both grids depend on padded sizes alone, so a captured CUDA graph serves every batch that is padded to its size: call
``plan`` before each replay. Arithmetic: ``kv4_attention``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from vllm_comet.kernels._triton import Launcher, cdiv, require_triton, tl, triton
from vllm_comet.kernels.act_quant import pdl_supported
from vllm_comet.kernels.kv4_attention import meta_scale, meta_zero, nibbles
from vllm_comet.kernels.kv4_cache import check_pages

MAX_GROUP = 16
"""Query heads per KV head: they are the 16 rows of a tensor-core instruction."""


class DecodeScratch(NamedTuple):
    """Plan and partial results. Layers of one shape, window and stream may share it."""

    parts: torch.Tensor  # int32 [programs, 8]: request, first tile, end tile (0: no part), is it the only part, length
    spans: torch.Tensor  # int32 [max requests, 2]: first part and number of parts of a request
    partial: torch.Tensor  # float32 [programs, H, D, rows]
    lse: torch.Tensor  # float32 [programs, H, rows], log2


@triton.jit(do_not_specialize=["requests", "rows", "window", "programs", "fill"])
def _plan_kernel(
    seq_lens_ptr, parts_ptr, spans_ptr, requests, rows, window, programs, fill,
    MAX_REQUESTS: tl.constexpr, T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the shortest part length at which the parts are at most ``fill``, by bisection; then the lists."""
    r = tl.arange(0, MAX_REQUESTS)
    real = r < requests
    lens = tl.load(seq_lens_ptr + r, mask=real, other=0)
    first = tl.maximum(lens - window, 0) // T
    tiles = tl.where(real, tl.maximum(tl.cdiv(lens, T) - first, 1), 0)  # an empty request (graph padding) gives zeros
    low = 0  # too short
    high = tl.max(tiles, 0)
    while high - low > 1:
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(tiles, middle), 0) <= fill
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    count = tl.cdiv(tiles, high)
    begin = tl.cumsum(count, 0) - count
    tl.store(spans_ptr + 2 * r, begin, mask=r < rows)
    tl.store(spans_ptr + 2 * r + 1, count, mask=r < rows)  # 0 behind the last request
    length = tl.cdiv(tiles, tl.maximum(count, 1))
    for start in range(0, programs, CHUNK):  # no part for programs behind the last
        at = parts_ptr + 8 * (start + tl.arange(0, CHUNK))
        tl.store(at + 2, tl.zeros((CHUNK,), tl.int32), mask=start + tl.arange(0, CHUNK) < programs)
    tl.debug_barrier()
    for i in range(0, tl.max(count, 0)):
        at = parts_ptr + 8 * (begin + i)
        tl.store(at, r, mask=i < count)
        tl.store(at + 1, first + i * length, mask=i < count)
        tl.store(at + 2, first + tl.minimum((i + 1) * length, tiles), mask=i < count)
        tl.store(at + 3, (count == 1).to(tl.int32), mask=i < count)
        tl.store(at + 4, lens, mask=i < count)


@triton.jit(do_not_specialize=["window"])
def _decode_kernel(
    q_ptr, codes_ptr, meta_ptr, table_ptr, out_ptr, parts_ptr, partial_ptr, lse_ptr,
    window, scale_log2, stride_q: tl.int64, stride_out: tl.int64, stride_table: tl.int64, stride_page, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    ROWS: tl.constexpr, PART_ROWS: tl.constexpr, CUTS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (programs, H), one warp each. Tokens are the rows of the tensor-core instructions, query heads the columns.

    Strides of the cache are in int16. The planes are cut in CUTS slices each, so that none spans groups: a scale leaves
    the product of a slice. LANES is the lanes of a slice and ROWS the query heads, rounded up to what a dot takes.
    """
    L: tl.constexpr = D // 4
    S: tl.constexpr = L // CUTS
    SLICES: tl.constexpr = 4 * CUTS // GROUPS  # slices per group; slice i holds channels i · S to (i + 1) · S
    part = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.load(parts_ptr + 8 * part)
    tile_begin = tl.load(parts_ptr + 8 * part + 1)
    tile_end = tl.load(parts_ptr + 8 * part + 2)
    whole = tl.load(parts_ptr + 8 * part + 3)
    length = tl.load(parts_ptr + 8 * part + 4)
    first_token = tl.maximum(length - window, 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the merge kernel may start and wait
    if tile_end == 0:
        return

    row = tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    token = tl.arange(0, T)
    lane_ok = lane < S
    row_ok = row < GROUP

    q_at = q_ptr + request * stride_q + (head * GROUP + row)[:, None] * D + lane[None, :]
    q = ()
    q_sum = ()
    for g in tl.static_range(GROUPS):
        sum_g = tl.zeros((ROWS,), tl.float32)
        for i in tl.static_range(g * SLICES, (g + 1) * SLICES):
            q_i = tl.load(q_at + i * S, mask=row_ok[:, None] & lane_ok[None, :], other=0.0).to(tl.float16)
            sum_g += tl.sum(q_i.to(tl.float32), 1)
            if i // CUTS % 2 == 1:
                q_i = (q_i * 0.0625).to(tl.float16)  # odd planes hold 16 · code
            q = q + (tl.trans(q_i),)
        q_sum = q_sum + ((sum_g * scale_log2)[None, :],)

    m = tl.full((ROWS,), -1e30, tl.float32)
    den = tl.zeros((ROWS,), tl.float32)
    z = ()
    o = ()
    for _ in tl.static_range(GROUPS):
        z = z + (tl.zeros((ROWS,), tl.float32),)
    for _ in tl.static_range(4 * CUTS):
        o = o + (tl.zeros((LANES, ROWS), tl.float32),)

    table = table_ptr + request * stride_table
    pages = tl.cdiv(length, BLOCK)
    for tile in range(tile_begin, tile_end):
        t = tile * T + token
        ok = (t >= first_token) & (t < length)
        if T % BLOCK == 0:
            index = tile * (T // BLOCK) + token // BLOCK
            in_page = token % BLOCK
        else:
            index = tile // (BLOCK // T) + tl.zeros((T,), tl.int32)
            in_page = tile % (BLOCK // T) * T + token
        page = tl.load(table + index, mask=index < pages, other=0)
        base = page.to(tl.int64) * stride_page + head * stride_head
        at = base + in_page * L
        k = ()
        v = ()
        for c in tl.static_range(CUTS):
            cut = c * S + lane
            k = k + (tl.load(codes_ptr + at[:, None] + cut[None, :], mask=lane_ok[None, :], other=0),)
            v = v + (tl.load(codes_ptr + (at + BLOCK * L)[None, :] + cut[:, None], mask=lane_ok[:, None], other=0),)
        meta_at = meta_ptr + base // 2 + (BLOCK * L + in_page * GROUPS)

        s = tl.where(ok, 0.0, -1e30)[:, None]
        for g in tl.static_range(GROUPS):
            meta = tl.load(meta_at + g, mask=ok, other=0)
            dot = tl.zeros((T, ROWS), tl.float32)
            for i in tl.static_range(g * SLICES, (g + 1) * SLICES):
                dot = tl.dot(nibbles(k[i % CUTS], i // CUTS), q[i], dot)
            s += dot * (meta_scale(meta) * (scale_log2 * 16777216.0))[:, None]
            s += q_sum[g] * meta_zero(meta)[:, None]

        m_new = tl.maximum(m, tl.max(s, 0))
        alpha = tl.exp2(m - m_new)
        m = m_new
        p = tl.exp2(s - (m_new - 6.0)[None, :])  # 0 to 64: away from underflow in fp16, also times a scale
        den = den * alpha + tl.sum(p, 0)
        z_new = ()
        o_new = ()
        meta_at += BLOCK * GROUPS
        for g in tl.static_range(GROUPS):
            meta = tl.load(meta_at + g, mask=ok, other=0)
            z_new = z_new + (z[g] * alpha + tl.sum(p * meta_zero(meta)[:, None], 0),)
            # exact up to a scale of 1023, a range of 15,000 in a group
            pv = (p * tl.minimum(meta_scale(meta), 1023.0)[:, None]).to(tl.float16)
            for i in tl.static_range(g * SLICES, (g + 1) * SLICES):
                o_new = o_new + (tl.dot(nibbles(v[i % CUTS], i // CUTS), pv, o[i] * alpha[None, :]),)
        z = z_new
        o = o_new

    inverse = 1.0 / den
    slot = part * tl.num_programs(1) + head
    if whole == 0:
        tl.store(lse_ptr + slot * PART_ROWS + row, m + tl.log2(den), mask=row < PART_ROWS)
    out_at = out_ptr + request * stride_out + (head * GROUP + row)[None, :] * D + lane[:, None]
    partial_at = partial_ptr + (slot * D + lane)[:, None] * PART_ROWS + row[None, :]
    for i in tl.static_range(4 * CUTS):
        unit = 16777216.0 if i // CUTS % 2 == 0 else 1048576.0  # nibbles are code · 2⁻²⁴, in odd planes 2⁻²⁰
        o_i = o[i] * (inverse * unit)[None, :] + (z[i // SLICES] * inverse)[None, :]
        if whole == 1:
            tl.store(out_at + i * S, o_i, mask=lane_ok[:, None] & row_ok[None, :])
        else:
            tl.store(partial_at + i * S * PART_ROWS, o_i, mask=lane_ok[:, None] & (row < PART_ROWS)[None, :])


@triton.jit
def _merge_kernel(
    spans_ptr, partial_ptr, lse_ptr, out_ptr, stride_out: tl.int64,
    GROUP: tl.constexpr, D: tl.constexpr, PART_ROWS: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (R, H, ceil(D · PART_ROWS / E)): the parts of a request into ``out``, E elements a program."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    first = tl.load(spans_ptr + 2 * request)
    count = tl.load(spans_ptr + 2 * request + 1)
    if PDL:  # also where there is nothing to merge: who waits for this kernel waits for all of the attention
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if count > 1:
        # A warp keeps the same elements of every part it reads: warps exchange once, lanes never.
        element = tl.program_id(2) * E + tl.arange(0, E)
        row = element % PART_ROWS
        channel = element // PART_ROWS
        m = tl.full((E,), -1e30, tl.float32)
        den = tl.zeros((E,), tl.float32)
        o = tl.zeros((E,), tl.float32)
        for start in range(0, count, CHUNK):
            i = start + tl.arange(0, CHUNK)[:, None]
            slot = (first + i) * heads + head
            lse = tl.load(lse_ptr + slot * PART_ROWS + row[None, :], mask=i < count, other=-1e30)
            part = tl.load(
                partial_ptr + slot * (D * PART_ROWS) + element[None, :],
                mask=(i < count) & (element < D * PART_ROWS)[None, :], other=0.0,
            )  # fmt: skip
            m_new = tl.maximum(m, tl.max(lse, 0))
            weight = tl.exp2(lse - m_new[None, :])
            alpha = tl.exp2(m - m_new)
            den = den * alpha + tl.sum(weight, 0)
            o = o * alpha + tl.sum(part * weight, 0)
            m = m_new
        out_at = out_ptr + request * stride_out + (head * GROUP + row) * D + channel
        tl.store(out_at, o / den, mask=(row < GROUP) & (channel < D))


class _Tile(NamedTuple):
    tokens: int
    stages: int  # of loads in flight: page numbers, then two tiles
    programs_per_sm: int  # of one warp each
    registers: int  # a thread


def _tile(head_dim: int) -> _Tile:
    """Chosen on an H100 and an H200: two buffered tiles a warp, and as few warps as still saturate the memory.

    Up to heads of 128, twice as many are 3 to 5 % slower at long contexts and 25 % at short ones, where most would find
    nothing to do; for heads of 256, half as many are 20 % slower. Larger tiles spill registers or, for heads of 64,
    gain at one long context what they lose at short ones.
    """
    return _Tile(64, 5, 4, 168) if head_dim <= 128 else _Tile(32, 5, 8, 168)


def _merge_tile(requests: int) -> tuple[int, int, int]:
    """Warps, elements of the output and parts read at once: few requests have many parts each, many have few.

    No third form for more requests: the batch sizes of CUDA graphs might not reach it, and serving would compile it.
    """
    return (4, 32, 64) if requests <= 4 else (1, 128, 8)


def _most_parts(requests: int, fill: int) -> int:
    """Parts of a step: as many as fill the GPU, or one a request, without merging, where few would be left to split."""
    return fill if 4 * requests <= 3 * fill else requests


def _part_rows(num_heads: int, num_kv_heads: int) -> int:
    return max(4, triton.next_power_of_2(num_heads // num_kv_heads))


def make_scratch(
    max_requests: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> DecodeScratch:
    """Scratch for ``plan`` and ``decode`` of up to ``max_requests`` requests; allocate before CUDA-graph capture."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    fill = max(1, sms * _tile(head_dim).programs_per_sm // num_kv_heads)
    programs, rows = max(fill, max_requests), _part_rows(num_heads, num_kv_heads)
    return DecodeScratch(
        torch.zeros(programs, 8, dtype=torch.int32, device=device),
        torch.zeros(max_requests, 2, dtype=torch.int32, device=device),
        torch.empty(fill, num_kv_heads, head_dim, rows, dtype=torch.float32, device=device),
        torch.empty(fill, num_kv_heads, rows, dtype=torch.float32, device=device),
    )


@functools.cache
def _plan(max_requests: int, head_dim: int) -> Launcher:
    require_triton("decode attention")
    most = max(16, triton.next_power_of_2(max_requests))
    return Launcher(_plan_kernel, MAX_REQUESTS=most, T=_tile(head_dim).tokens, CHUNK=1024,
                    num_warps=max(1, min(8, most // 128)))


def plan(seq_lens: torch.Tensor, window: int | None, head_dim: int, scratch: DecodeScratch) -> None:
    """Cut the requests of a step in parts, for every ``decode`` of that step with this scratch.

    seq_lens: int32 ``[R]`` on the device, the query's token included; 0 marks graph padding.
    """
    requests = seq_lens.shape[0]
    if requests > scratch.spans.shape[0]:
        raise ValueError(f"{requests} requests, but the scratch was made for {scratch.spans.shape[0]}.")
    max_requests, fill = scratch.spans.shape[0], scratch.lse.shape[0]
    _plan(max_requests, head_dim)(
        (1, 1, 1), seq_lens, scratch.parts, scratch.spans, requests, max_requests,
        2**30 if window is None else window, scratch.parts.shape[0], _most_parts(requests, fill))


@functools.cache
def _decode(
    num_heads: int, num_kv_heads: int, head_dim: int, group_size: int, block_size: int, pdl: bool
) -> Launcher:
    require_triton("decode attention")
    group, tile = num_heads // num_kv_heads, _tile(head_dim)
    if group > MAX_GROUP or num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads over {num_kv_heads} KV heads; allowed: 1 to {MAX_GROUP} per one.")
    if tile.tokens % block_size and block_size % tile.tokens:
        raise ValueError(f"block size {block_size}; allowed: multiples and divisors of {tile.tokens}.")
    lanes = math.gcd(head_dim // 4, group_size)  # of a slice
    cuts = head_dim // 4 // lanes
    # Cut planes would spill within a tile's registers: 72 us instead of 58 (256 by 32, 16 x 4096 tokens, H200).
    registers = 255 if cuts > 1 else tile.registers
    return Launcher(
        _decode_kernel, GROUP=group, D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, T=tile.tokens,
        ROWS=8 if group <= 8 else 16, PART_ROWS=_part_rows(num_heads, num_kv_heads),
        CUTS=cuts, LANES=max(16, triton.next_power_of_2(lanes)), PDL=pdl, num_warps=1,
        num_stages=tile.stages, maxnreg=registers)


@functools.cache
def _merge(num_heads: int, num_kv_heads: int, head_dim: int, tile: tuple[int, int, int], pdl: bool) -> Launcher:
    # Only this kernel starts early: decode kernels that did took up to 17 us longer on an H200, and their programs
    # ended up to twice as far apart, presumably as they crowd on the multiprocessors that are free first.
    warps, elements, chunk = tile
    return Launcher(
        _merge_kernel, GROUP=num_heads // num_kv_heads, D=head_dim, PART_ROWS=_part_rows(num_heads, num_kv_heads),
        E=elements, CHUNK=chunk, PDL=pdl, num_warps=warps, launch_pdl=pdl)


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    group_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
    scratch: DecodeScratch,
) -> torch.Tensor:
    """Attention of one query token per request over its 4-bit pages; fills and returns ``out``.

    q, out: ``[R, Hq, D]`` (bf16, fp16 or fp32), heads of a token contiguous. cache: uint8 ``[B, H, block_size, C]``.
    block_table: int32 ``[R, P]``, only the entries of a request's own pages are read. window: as in ``attention_ref``.
    scratch: from ``make_scratch`` for the same heads and device; ``plan`` has run on it with the step's sequence
    lengths and the same window. A request of length 0 (graph padding) gives zeros.

    Safe inside a CUDA graph: nothing is read on the host; the grids depend on R, the GPU and the number of KV heads.
    """
    requests, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.shape
    check_pages(cache, head_dim, group_size)
    programs, pdl = _most_parts(requests, scratch.lse.shape[0]), pdl_supported(q.device)
    _decode(num_heads, num_kv_heads, head_dim, group_size, block_size, pdl)(
        (programs, num_kv_heads, 1), q, cache.view(torch.int16), cache.view(torch.int32), block_table, out,
        scratch.parts, scratch.partial, scratch.lse, 2**30 if window is None else window, scale * math.log2(math.e),
        q.stride(0), out.stride(0), block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2)
    if requests < programs:  # else every request is one part
        rows, tile = scratch.lse.shape[2], _merge_tile(requests)
        _merge(num_heads, num_kv_heads, head_dim, tile, pdl)(
            (requests, num_kv_heads, cdiv(head_dim * rows, tile[1])), scratch.spans, scratch.partial, scratch.lse, out,
            out.stride(0))
    return out
