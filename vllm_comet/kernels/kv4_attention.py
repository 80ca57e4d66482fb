# SPDX-License-Identifier: Apache-2.0
"""Attention over the 4-bit KV cache: the torch reference that decode and prefill kernels are measured against."""

from __future__ import annotations

import torch

from vllm_comet.kernels.kv4_cache import load_kv_ref


def attention_ref(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    group_size: int,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each request over its 4-bit pages, in float64 → ``[T, Hq, D]`` float64.

    q: ``[T, Hq, D]``; request r owns rows ``query_start_loc[r] .. query_start_loc[r+1]``: its last tokens, stored.
    cache: uint8 ``[B, H, block_size, C]`` (``kv4_cache``). q head h reads KV head ``h // (Hq / H)``.
    block_table: int ``[R, P]``, page ids; entries behind a request's last page are never read.
    query_start_loc: int ``[R + 1]``, ascending. seq_lens: int ``[R]``, tokens in the cache, the query's own included.
    scale: factor of q·k before softmax. window: a token sees itself and the ``window − 1`` tokens before it; None: all.

    Rows that no request owns, and requests of length 0 (padding), give zeros.
    """
    head_dim, repeat = q.shape[2], q.shape[1] // cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    starts = query_start_loc.tolist()
    for request, length in enumerate(seq_lens.tolist()):
        start, end = starts[request], starts[request + 1]
        if start == end or length == 0:
            continue
        k, v = load_kv_ref(cache, block_table[request], length, head_dim, group_size)
        k, v = (x.to(torch.float64).repeat_interleave(repeat, dim=0) for x in (k, v))
        scores = torch.einsum("thd,hld->htl", q[start:end].to(torch.float64), k) * scale
        position = torch.arange(length - (end - start), length, device=q.device)[:, None]
        token = torch.arange(length, device=q.device)
        visible = token <= position
        if window is not None:
            visible &= token > position - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("htl,hld->thd", weights, v)
    return out
