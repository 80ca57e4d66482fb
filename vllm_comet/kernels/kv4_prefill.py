# SPDX-License-Identifier: Apache-2.0
"""Prefill attention over the 4-bit KV cache, and the gather that lets FlashAttention read the cache.

``prefill`` attends to pages directly and needs no other library. ``gather_kv`` gathers K̂ and V̂ of whole requests to a
workspace in the model's dtype, over which ``flash_attention`` runs: the same attention several times faster, as
gathering costs by the token, attention by tokens times context. Arithmetic: ``kv4_attention``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_comet.kernels._triton import Launcher, cdiv, require_triton, tl, triton
from vllm_comet.kernels.kv4_attention import dequantize, meta_scale, meta_zero
from vllm_comet.kernels.kv4_cache import check_pages


@triton.jit
def _plane(lanes, plane: tl.constexpr, meta_at, ok, lane, L: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Plane ``plane`` of ``lanes`` [T, LANES] dequantised to fp16; meta_at [T] points to a token's first group."""
    code = ((lanes >> (4 * plane)) & 15).to(tl.float32)
    first: tl.constexpr = plane * L // GROUP_SIZE
    meta = tl.load(meta_at + first, mask=ok, other=0)
    scale = meta_scale(meta)[:, None]
    zero = meta_zero(meta)[:, None]
    for g in tl.static_range(first + 1, ((plane + 1) * L - 1) // GROUP_SIZE + 1):  # a plane may span groups
        meta = tl.load(meta_at + g, mask=ok, other=0)
        behind = ((plane * L + lane) // GROUP_SIZE >= g)[None, :]
        scale = tl.where(behind, meta_scale(meta)[:, None], scale)
        zero = tl.where(behind, meta_zero(meta)[:, None], zero)
    x = code * scale + zero
    return x.to(tl.float16)


@triton.jit
def _dequantized(
    lanes, meta_at, ok, lane, T: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    """``lanes`` [T, LANES] dequantised to fp16 [T, 4 · LANES]: column c holds lane c // 4 of plane c % 4."""
    planes = ()
    for i in tl.static_range(4):
        planes = planes + (_plane(lanes, i, meta_at, ok, lane, L, GROUP_SIZE),)
    return tl.reshape(tl.join(tl.join(planes[0], planes[2]), tl.join(planes[1], planes[3])), (T, 4 * LANES))


# Tables and lengths of a part of a batch begin anywhere.
@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["table_ptr", "starts_ptr", "seq_lens_ptr"])
def _prefill_kernel(
    q_ptr, codes_ptr, meta_ptr, table_ptr, starts_ptr, seq_lens_ptr, out_ptr,
    window, scale_log2, stride_q: tl.int64, stride_out: tl.int64, stride_table: tl.int64, stride_page, stride_head,
    GROUP: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, H, R). Rows are QUERIES tokens × HEADS query heads (GROUP of them real), columns KV tokens."""
    L: tl.constexpr = D // 4
    GROUP_SIZE: tl.constexpr = D // GROUPS
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
    column = tl.arange(0, 4 * LANES)
    channel = column % 4 * L + column // 4
    lane = tl.arange(0, LANES)
    token = tl.arange(0, T)
    real = ((query < queries) & (row % HEADS < GROUP))[:, None] & (column // 4 < L)[None, :]
    position = length - queries + query
    q_row = (start + query) * stride_q + (head * GROUP + row % HEADS) * D
    q = tl.load(q_ptr + q_row[:, None] + channel[None, :], mask=real, other=0.0).to(tl.float16)

    m = tl.full((M,), -1e30, tl.float32)
    den = tl.zeros((M,), tl.float32)
    o = tl.zeros((M, 4 * LANES), tl.float32)
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
        at = codes_ptr + (base + in_page * L)[:, None] + lane[None, :]
        meta_at = meta_ptr + base // 2 + (BLOCK * L + in_page * GROUPS)
        stored = t < length  # what lies behind may be NaN

        k = _dequantized(tl.load(at, mask=(lane < L)[None, :], other=0), meta_at, stored, lane, T, L, LANES, GROUP_SIZE)
        s = tl.dot(q, tl.trans(k)) * scale_log2
        visible = (t[None, :] <= position[:, None]) & (t[None, :] > (position - window)[:, None])
        s = tl.where(visible, s, -1e30)
        m_new = tl.maximum(m, tl.max(s, 1))
        alpha = tl.exp2(m - m_new)
        m = m_new
        p = tl.exp2(s - (m_new - 14.0)[:, None])  # 0 to 2¹⁴: away from underflow in fp16
        den = den * alpha + tl.sum(p, 1)
        v = tl.load(at + BLOCK * L, mask=(lane < L)[None, :], other=0)
        v = _dequantized(v, meta_at + BLOCK * GROUPS, stored, lane, T, L, LANES, GROUP_SIZE)
        o = tl.dot(p.to(tl.float16), v, o * alpha[:, None])

    out_row = (start + query) * stride_out + (head * GROUP + row % HEADS) * D
    tl.store(out_ptr + out_row[:, None] + channel[None, :], o / den[:, None], mask=real)


class _Tile(NamedTuple):
    rows: int  # query tokens × query heads
    tokens: int
    warps: int
    stages: int


def _tile(head_dim: int) -> _Tile:
    return _Tile(128, 128, 8, 2) if head_dim <= 128 else _Tile(64, 64, 4, 2)


@functools.cache
def _prefill(group: int, head_dim: int, group_size: int, block_size: int) -> tuple[Launcher, int]:
    """The launcher and the query tokens of a program."""
    require_triton("prefill attention")
    tile, heads = _tile(head_dim), triton.next_power_of_2(group)
    if tile.tokens % block_size and block_size % tile.tokens:
        raise ValueError(f"block size {block_size}; allowed: multiples and divisors of {tile.tokens}.")
    queries = max(1, tile.rows // heads)
    return Launcher(
        _prefill_kernel, GROUP=group, D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, T=tile.tokens,
        QUERIES=queries, HEADS=heads, LANES=max(16, triton.next_power_of_2(head_dim // 4)), num_warps=tile.warps,
        num_stages=tile.stages), queries  # fmt: skip


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
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = cache.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads.")
    check_pages(cache, head_dim, group_size)
    launch, queries = _prefill(num_heads // num_kv_heads, head_dim, group_size, block_size)
    launch(
        (cdiv(max_query_len, queries), num_kv_heads, seq_lens.shape[0]),
        q, cache.view(torch.int16), cache.view(torch.int32), block_table, query_start_loc, seq_lens, out,
        2**30 if window is None else window, scale * math.log2(math.e), q.stride(0), out.stride(0),
        block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=["table_ptr", "starts_ptr"])
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


_GATHER_TOKENS = 32  # a program


@functools.cache
def _gather(head_dim: int, group_size: int, block_size: int) -> Launcher:
    require_triton("gather_kv")
    return Launcher(_gather_kernel, D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, T=_GATHER_TOKENS,
                    LANES=max(16, triton.next_power_of_2(head_dim // 4)), num_warps=4)


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
    _, num_kv_heads, block_size, _ = cache.shape
    head_dim = key.shape[2]
    check_pages(cache, head_dim, group_size)
    if not (key.is_contiguous() and value.is_contiguous()):
        raise ValueError("key and value must be contiguous tensors [tokens, H, D].")
    _gather(head_dim, group_size, block_size)(
        (cdiv(max_seq_len, _GATHER_TOKENS), num_kv_heads, key_start_loc.shape[0] - 1),
        cache.view(torch.int16), cache.view(torch.int32), block_table, key_start_loc, key, value,
        block_table.stride(0), cache.stride(0) // 2, cache.stride(1) // 2, key.stride(0),
    )  # fmt: skip


def flash_attention(
    flash: Callable[..., object],
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """``prefill`` by FlashAttention over K̂ and V̂ as ``gather_kv`` leaves them; fills and returns ``out``.

    flash: vLLM's ``flash_attn_varlen_func``, its ``fa_version`` bound. key_start_loc, max_seq_len: as in ``gather_kv``.
    """
    flash(
        q, key, value, max_seqlen_q=max_query_len, cu_seqlens_q=query_start_loc, max_seqlen_k=max_seq_len,
        cu_seqlens_k=key_start_loc, softmax_scale=scale, causal=True,
        window_size=None if window is None else [window - 1, 0], out=out,
    )  # fmt: skip
    return out
