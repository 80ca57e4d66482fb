# SPDX-License-Identifier: Apache-2.0
"""Attention over the 4-bit KV cache on a CPU, vectorised torch in float32; the definition is ``attention_ref``."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_comet.kernels.kv4_cache import dequantize_kv_ref, page_views

DECODE_TOKENS = 1 << 16
"""Padded cache tokens per decode call: bounds the float32 copy of K and V."""
QUERY_ROWS = 256
"""Query rows per prefill call: bounds the score matrix."""


def attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    group_size: int,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Arguments as ``attention_ref``; writes ``out`` ``[T, Hq, D]``. Requests with one query row run in batches."""
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    requests = [r for r in range(len(lengths)) if starts[r + 1] > starts[r]]
    single = sorted((r for r in requests if starts[r + 1] == starts[r] + 1), key=lambda r: lengths[r])
    for batch in _batches(single, lengths):
        rows = torch.tensor([starts[r] for r in batch])
        k, v, mask = _gather(cache, block_table, batch, lengths, q.shape[2], group_size)
        if window is not None:
            last = torch.tensor([lengths[r] for r in batch])[:, None]
            mask &= torch.arange(mask.shape[1]) >= last - window
        # The query heads of a KV head are the rows of one product: K and V are not repeated.
        queries = q[rows].unflatten(1, (k.shape[1], -1)).to(torch.float32)
        heads = scaled_dot_product_attention(queries, k, v, attn_mask=mask[:, None, None, :], scale=scale)
        out[rows] = heads.flatten(1, 2).to(out.dtype)
    for r in requests:
        if starts[r + 1] > starts[r] + 1:
            k, v, _ = _gather(cache, block_table, [r], lengths, q.shape[2], group_size)
            _prefill(q[starts[r] : starts[r + 1]], k[0], v[0], scale, window, out[starts[r] : starts[r + 1]])


def _batches(requests: list[int], lengths: list[int]) -> list[list[int]]:
    """Cut ``requests`` (shortest first) so that each batch, padded to its longest, stays under DECODE_TOKENS tokens."""
    batches: list[list[int]] = []
    for r in requests:
        if batches and (len(batches[-1]) + 1) * lengths[r] <= DECODE_TOKENS:
            batches[-1].append(r)
        else:
            batches.append([r])
    return batches


def _gather(
    cache: torch.Tensor,
    block_table: torch.Tensor,
    requests: list[int],
    lengths: list[int],
    head_dim: int,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K̂, V̂ float32 ``[R, H, L, D]``, zero-padded to the longest request, and the mask ``[R, L]`` of real tokens."""
    block_size = cache.shape[2]
    length = torch.tensor([lengths[r] for r in requests])
    used = -(-length // block_size)
    table = block_table[torch.tensor(requests), : int(used.max())].to(torch.int64)
    table = torch.where(torch.arange(table.shape[1]) < used[:, None], table, table[:, :1])
    mask = torch.arange(int(length.max())) < length[:, None]
    views = page_views(cache, head_dim, group_size)

    def load(codes: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        x = dequantize_kv_ref(codes[table], meta[table])  # [R, P, H, block_size, D]
        x = x.transpose(1, 2).flatten(2, 3)[:, :, : mask.shape[1]]
        return x.masked_fill(~mask[:, None, :, None], 0.0)  # memory never written may hold NaN

    return load(views.k_codes, views.k_meta), load(views.v_codes, views.v_meta), mask


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, out: torch.Tensor
) -> None:
    """Causal attention of the last T tokens: q, out ``[T, Hq, D]``; k, v ``[H, L, D]``."""
    context = k.shape[1] - q.shape[0]
    for start in range(0, q.shape[0], QUERY_ROWS):
        rows = q[start : start + QUERY_ROWS]
        end = context + start + rows.shape[0]
        begin = 0 if window is None else max(0, context + start - window + 1)
        token = torch.arange(begin, end)
        position = torch.arange(end - rows.shape[0], end)[:, None]
        mask = token <= position
        if window is not None:
            mask &= token > position - window
        grouped = rows.unflatten(1, (k.shape[0], -1)).permute(1, 2, 0, 3).to(torch.float32)  # [H, group, rows, D]
        heads = scaled_dot_product_attention(
            grouped.flatten(1, 2), k[:, begin:end], v[:, begin:end],
            attn_mask=mask.repeat(grouped.shape[1], 1), scale=scale,
        )
        heads = heads.unflatten(1, grouped.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
        out[start : start + QUERY_ROWS] = heads.to(out.dtype)
