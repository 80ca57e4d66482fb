# SPDX-License-Identifier: Apache-2.0
"""Prefill attention over the 4-bit KV cache, and the gather that lets FlashAttention read the cache.

``prefill`` attends to pages directly and needs no other library. ``gather_kv`` writes K̂ and V̂ of whole requests to a
workspace in the model's dtype; FlashAttention over it does the same attention faster on a chunk of thousands of tokens,
as its cost grows with tokens alone, attention's with tokens times context. Arithmetic: ``kv4_attention``.
"""

from __future__ import annotations

import math

import torch

from vllm_comet.kernels._triton import require_triton, tl, triton
from vllm_comet.kernels.kv4_attention import dequantize, meta_scale, meta_zero, nibbles
from vllm_comet.kernels.kv4_cache import page_views


@triton.jit(do_not_specialize=["window"])
def _prefill_kernel(
    q_ptr, codes_ptr, meta_ptr, table_ptr, starts_ptr, seq_lens_ptr, out_ptr,
    window, scale_log2, stride_q: tl.int64, stride_out: tl.int64, stride_table: tl.int64, stride_page, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, H, R). Rows are QUERIES tokens × HEADS query heads (GROUP of them real), columns KV tokens."""
    L: tl.constexpr = D // 4
    GROUP_SIZE: tl.constexpr = D // GROUPS
    EXPAND: tl.constexpr = GROUP_SIZE % L != 0
    FOLDS: tl.constexpr = 1 if EXPAND else GROUPS
    PLANES: tl.constexpr = 4 // FOLDS
    M: tl.constexpr = QUERIES * HEADS
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    queries = tl.load(starts_ptr + request + 1) - start
    length = tl.load(seq_lens_ptr + request)
    # The last query tiles see the most tokens: they start first.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if first_query >= queries:
        return

    row = tl.arange(0, M)
    query = first_query + row // HEADS
    lane = tl.arange(0, LANES)
    token = tl.arange(0, T)
    row_ok = (query < queries) & (row % HEADS < GROUP)
    lane_ok = lane < L
    position = length - queries + query
    q_row = (start + query) * stride_q + (head * GROUP + row % HEADS) * D
    q = ()
    q_sum = ()
    for g in tl.static_range(FOLDS):
        sum_g = tl.zeros((M,), tl.float32)
        for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
            plane = tl.load(
                q_ptr + q_row[:, None] + i * L + lane[None, :], mask=row_ok[:, None] & lane_ok[None, :], other=0.0
            ).to(tl.float16)
            sum_g += tl.sum(plane.to(tl.float32), 1)
            if i % 2 == 1 and not EXPAND:
                plane = (plane * 0.0625).to(tl.float16)  # odd planes hold 16 · code
            q = q + (plane,)
        q_sum = q_sum + ((sum_g * scale_log2)[:, None],)

    m = tl.full((M,), -1e30, tl.float32)
    den = tl.zeros((M,), tl.float32)
    z = ()
    o = ()
    for _ in tl.static_range(FOLDS):
        z = z + (tl.zeros((M,), tl.float32),)
    for _ in tl.static_range(4):
        o = o + (tl.zeros((M, LANES), tl.float32),)

    table = table_ptr + request * stride_table
    pages = tl.cdiv(length, BLOCK)
    first_token = tl.maximum(length - queries + first_query - window + 1, 0)
    last_token = tl.minimum(length - queries + first_query + QUERIES, length)
    for tile in range(first_token // T, tl.cdiv(last_token, T)):
        t = tile * T + token
        if T % BLOCK == 0:
            index = tile * (T // BLOCK) + token // BLOCK
            in_page = token % BLOCK
        else:
            index = tile // (BLOCK // T) + tl.zeros((T,), tl.int32)
            in_page = tile % (BLOCK // T) * T + token
        page = tl.load(table + index, mask=index < pages, other=0)
        base = page.to(tl.int64) * stride_page + head * stride_head
        at = base + in_page * L
        k = tl.load(codes_ptr + at[None, :] + lane[:, None], mask=lane_ok[:, None], other=0)
        v = tl.load(codes_ptr + (at + BLOCK * L)[:, None] + lane[None, :], mask=lane_ok[None, :], other=0)
        meta_at = meta_ptr + base // 2 + (BLOCK * L + in_page * GROUPS)
        stored = t < length  # what lies behind may be NaN

        s = tl.zeros((M, T), tl.float32)
        if EXPAND:
            real = lane_ok[:, None] & stored[None, :]
            for i in tl.static_range(4):
                x = dequantize(k, i, meta_at[None, :], lane[:, None], real, L, GROUP_SIZE)
                s += tl.dot(q[i], x.to(tl.float16)) * scale_log2
        else:
            for g in tl.static_range(FOLDS):
                meta = tl.load(meta_at + g, mask=stored, other=0)
                dot = tl.zeros((M, T), tl.float32)
                for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                    dot = tl.dot(q[i], nibbles(k, i), dot)
                s += dot * (meta_scale(meta) * (scale_log2 * 16777216.0))[None, :]
                s += q_sum[g] * meta_zero(meta)[None, :]
        visible = (t[None, :] <= position[:, None]) & (t[None, :] > (position - window)[:, None])
        s = tl.where(visible, s, -1e30)

        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        m = m_new
        p = tl.exp2(s - m_new[:, None])
        den = den * alpha + tl.sum(p, 1)
        z_new = ()
        o_new = ()
        meta_at += BLOCK * GROUPS
        if EXPAND:
            z_new = z
            real = stored[:, None] & lane_ok[None, :]
            for i in tl.static_range(4):
                x = dequantize(v, i, meta_at[:, None], lane[None, :], real, L, GROUP_SIZE)
                o_new = o_new + (tl.dot(p.to(tl.float16), x.to(tl.float16), o[i] * alpha[:, None]),)
        else:
            for g in tl.static_range(FOLDS):
                meta = tl.load(meta_at + g, mask=stored, other=0)
                z_new = z_new + (z[g] * alpha + tl.sum(p * meta_zero(meta)[None, :], 1),)
                pv = (p * tl.minimum(meta_scale(meta) * 64.0, 65504.0)[None, :]).to(tl.float16)
                for i in tl.static_range(g * PLANES, (g + 1) * PLANES):
                    o_new = o_new + (tl.dot(pv, nibbles(v, i), o[i] * alpha[:, None]),)
        z = z_new
        o = o_new

    inverse = 1.0 / den
    out_row = (start + query) * stride_out + (head * GROUP + row % HEADS) * D
    for i in tl.static_range(4):
        unit = 1.0 if EXPAND else 262144.0 if i % 2 == 0 else 16384.0
        o_i = o[i] * (inverse * unit)[:, None] + (z[0 if EXPAND else i // PLANES] * inverse)[:, None]
        tl.store(
            out_ptr + out_row[:, None] + i * L + lane[None, :], o_i, mask=row_ok[:, None] & lane_ok[None, :]
        )  # fmt: skip


def prefill(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    group_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of each request's newest tokens over its 4-bit pages; fills and returns ``out``.

    q, out: ``[T, Hq, D]`` (bf16, fp16 or fp32), heads of a token contiguous; the other arguments as in
    ``attention_ref``, on the device, indices int32. max_query_len: an upper bound of the queries of a request.
    """
    require_triton("prefill attention")
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.shape
    group, tokens = num_heads // num_kv_heads, 64 if head_dim <= 128 else 32
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads.")
    if tokens % block_size and block_size % tokens:
        raise ValueError(f"block size {block_size}; allowed: multiples and divisors of {tokens}.")
    page_views(cache, head_dim, group_size)  # checks the layout
    heads = triton.next_power_of_2(group)
    queries = max(1, (128 if head_dim <= 128 else 64) // heads)
    expand = group_size % (head_dim // 4) != 0
    grid = (triton.cdiv(max_query_len, queries), num_kv_heads, seq_lens.shape[0])
    _prefill_kernel[grid](
        q, cache.view(torch.int16), cache.view(torch.int32), block_table, query_start_loc, seq_lens, out,
        2**30 if window is None else window, scale * math.log2(math.e), q.stride(0), out.stride(0),
        block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2,
        GROUP=group, D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, T=tokens, QUERIES=queries,
        HEADS=heads, LANES=max(16, triton.next_power_of_2(head_dim // 4)),
        num_warps=8 if queries * heads >= 128 else 4, num_stages=1 if expand else 3,
    )  # fmt: skip
    return out


@triton.jit
def _gather_kernel(
    codes_ptr, meta_ptr, table_ptr, starts_ptr, key_ptr, value_ptr,
    stride_table: tl.int64, stride_page, stride_head, stride_out: tl.int64,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, H, R): T tokens of one request and KV head, K then V."""
    L: tl.constexpr = D // 4
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - start
    t = tl.program_id(0) * T + tl.arange(0, T)
    if tl.program_id(0) * T >= length:
        return
    lane = tl.arange(0, LANES)[None, :]
    real = (t < length)[:, None] & (lane < L)
    page = tl.load(table_ptr + request * stride_table + t // BLOCK, mask=t < length, other=0)
    base = page.to(tl.int64) * stride_page + head * stride_head
    codes_at = codes_ptr + (base + t % BLOCK * L)[:, None] + lane
    meta_at = meta_ptr + (base // 2 + BLOCK * L + t % BLOCK * GROUPS)[:, None]
    out_at = (start + t)[:, None] * stride_out + head * D + lane
    k = tl.load(codes_at, mask=real, other=0)
    v = tl.load(codes_at + BLOCK * L, mask=real, other=0)
    for i in tl.static_range(4):
        x = dequantize(k, i, meta_at, lane, real, L, D // GROUPS)
        tl.store(key_ptr + out_at + i * L, x, mask=real)
        x = dequantize(v, i, meta_at + BLOCK * GROUPS, lane, real, L, D // GROUPS)
        tl.store(value_ptr + out_at + i * L, x, mask=real)


def gather_kv(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    key_start_loc: torch.Tensor,
    max_seq_len: int,
    group_size: int,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    """Write K̂, V̂ of every request, one behind the other, to ``key`` and ``value`` ``[tokens, H, D]`` (contiguous).

    key_start_loc: int32 ``[R + 1]`` on the device, running sum of the sequence lengths; max_seq_len: an upper bound of
    a length. The workspace must hold ``key_start_loc[-1]`` tokens, which the caller knows from its own upper bounds.
    """
    require_triton("gather_kv")
    _, num_kv_heads, block_size, _ = cache.shape
    head_dim = key.shape[2]
    page_views(cache, head_dim, group_size)  # checks the layout
    if not (key.is_contiguous() and value.is_contiguous()):
        raise ValueError("key and value must be contiguous tensors [tokens, H, D].")
    grid = (triton.cdiv(max_seq_len, 32), num_kv_heads, key_start_loc.shape[0] - 1)
    _gather_kernel[grid](
        cache.view(torch.int16), cache.view(torch.int32), block_table, key_start_loc, key, value,
        block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2, key.stride(0),
        D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, T=32,
        LANES=max(16, triton.next_power_of_2(head_dim // 4)), num_warps=4,
    )  # fmt: skip
