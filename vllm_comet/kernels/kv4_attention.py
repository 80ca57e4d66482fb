# SPDX-License-Identifier: Apache-2.0
"""Attention over the 4-bit KV cache: the torch reference, and what the decode and prefill kernels share.

Arithmetic of the kernels. A nibble alone in bits 0-3 (4-7) of an fp16 is the subnormal code · 2⁻²⁴ (code · 2⁻²⁰), which
tensor cores multiply exactly: unpacking is one AND for two values, with no conversion. What is left of x̂ = code · scale
+ zero moves out of the inner product, one group of channels at a time (log2 domain, c = scale · log2 e):

    score[q, t] = Σ_g  K scale[t, g] · c · Σ_{i in g} q_i · code_i  +  K zero[t, g] · c · Σ_{i in g} q_i
    out[q, i]   = Σ_t  (p[q, t] · V scale[t, g]) · code_i           +  Σ_t p[q, t] · V zero[t, g]

Decode does this, as it meets every K and V once; where a lane plane spans groups (head_dim 96 or 256 with groups of
32), slice by slice. In prefill, where a K and V serve many queries, they are dequantised in registers instead.
"""

from __future__ import annotations

import os

import torch

from vllm_comet.kernels._triton import tl, triton
from vllm_comet.kernels.kv4_cache import load_kv_ref

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs no inline PTX; plain Triton stands in for it there."""


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


if INTERPRET:

    @triton.jit
    def nibbles(lanes, plane: tl.constexpr):
        """Nibble ``plane`` of int16 lanes as fp16: code · 2⁻²⁴ for planes 0 and 2, code · 2⁻²⁰ for 1 and 3."""
        return ((lanes >> (8 * (plane // 2))) & (15 << (4 * (plane % 2)))).to(tl.float16, bitcast=True)

else:

    @triton.jit
    def nibbles(lanes, plane: tl.constexpr):
        """Nibble ``plane`` of int16 lanes as fp16: code · 2⁻²⁴ for planes 0 and 2, code · 2⁻²⁰ for 1 and 3."""
        # Two lanes a register; LLVM would take 16-bit arithmetic apart and permute the halves together again.
        if plane == 0:
            asm: tl.constexpr = "and.b32 $0, $1, 0x000F000F;"
        elif plane == 1:
            asm: tl.constexpr = "and.b32 $0, $1, 0x00F000F0;"
        elif plane == 2:
            asm: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x000F000F; }"
        else:
            asm: tl.constexpr = "{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, 0x00F000F0; }"
        return tl.inline_asm_elementwise(asm, "=r,r", [lanes], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def meta_scale(meta):
    """The fp16 scale in the low half of int32 (scale, zero) pairs, as float32."""
    return meta.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def meta_zero(meta):
    """The fp16 zero-point in the high half of int32 (scale, zero) pairs, as float32."""
    return (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def dequantize(lanes, plane: tl.constexpr, meta_ptr, lane, ok, L: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Plane ``plane`` of int16 ``lanes`` as float32, where a plane may span groups; zeros where not ``ok``.

    meta_ptr: pointers to the (scale, zero) of a token's first group; lane: the lane index of each element; both, and
    ``ok``, of shapes that broadcast with ``lanes``.
    """
    meta = tl.load(meta_ptr + (plane * L + lane) // GROUP_SIZE, mask=ok, other=0)
    code = ((lanes >> (4 * plane)) & 15).to(tl.float32)
    return code * meta_scale(meta) + meta_zero(meta)
