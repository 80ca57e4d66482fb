# SPDX-License-Identifier: Apache-2.0
"""The 4-bit KV-cache page: its layout, quantisation, store and load.

Quantisation is asymmetric, per (token, KV head, group of ``group_size`` channels along head_dim), K after RoPE:

    scale = fp16((max − min) / 15)    zero = fp16(min)    code = clamp(rint((x − zero) / scale), 0, 15)
    x̂ = code · scale + zero           (float32)

Where a checkpoint gives K an offset, x is K − offset: what all keys of a head have in common moves every score of a
query by the same amount, which softmax takes out again, so nothing is added back when the cache is read.

A page holds ``block_size`` tokens of one KV head in ``block_size · C`` contiguous bytes, as planes, so that every plane
starts 16-byte aligned and a tile of tokens is one contiguous run (D = head_dim, G = D / group_size):

    K codes [block_size, D/2] | V codes [block_size, D/2] | K meta [block_size, G, 2] | V meta [block_size, G, 2]

``meta`` is (scale, zero) in fp16. The codes of a token are D/4 int16 lanes: nibble i (from the low end) of lane j holds
channel ``i · D/4 + j``, so one AND yields two channels that lie in the right place for a tensor-core operand.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from vllm_comet.kernels._triton import Launcher, cdiv, require_triton, tl, triton
from vllm_comet.kernels.act_quant import pdl_supported


class PageViews(NamedTuple):
    """Planes of a cache ``[B, H, block_size, C]`` uint8, views into its memory."""

    k_codes: torch.Tensor  # int16 [B, H, block_size, D/4]
    v_codes: torch.Tensor  # int16 [B, H, block_size, D/4]
    k_meta: torch.Tensor  # fp16 [B, H, block_size, G, 2]
    v_meta: torch.Tensor  # fp16 [B, H, block_size, G, 2]


def bytes_per_token(head_dim: int, group_size: int) -> int:
    """C: bytes of K and V of one token and KV head, codes and meta."""
    return head_dim + 2 * (head_dim // group_size) * 4


def check_pages(cache: torch.Tensor, head_dim: int, group_size: int) -> None:
    """Raise ValueError unless ``cache`` ``[B, H, block_size, C]`` uint8 holds contiguous 4-bit pages per head."""
    content = cache.shape[3]
    if content != bytes_per_token(head_dim, group_size) or cache.stride()[2:] != (content, 1):
        raise ValueError(f"KV cache of shape {tuple(cache.shape)} and strides {cache.stride()} is not a 4-bit page of "
                         f"head_dim {head_dim} and group_size {group_size}: a (page, head) must be contiguous.")


def page_views(cache: torch.Tensor, head_dim: int, group_size: int) -> PageViews:
    """Planes of ``cache`` ``[B, H, block_size, C]`` uint8; a (page, head) must be contiguous."""
    check_pages(cache, head_dim, group_size)
    pages, heads, block_size, content = cache.shape
    groups = head_dim // group_size
    page = cache.as_strided((pages, heads, block_size * content), (cache.stride(0), cache.stride(1), 1))
    codes, meta = block_size * head_dim // 2, block_size * groups * 4
    k, v, km, vm = page.split([codes, codes, meta, meta], dim=-1)
    code_shape, meta_shape = (block_size, head_dim // 4), (block_size, groups, 2)
    return PageViews(
        k.view(torch.int16).unflatten(-1, code_shape),
        v.view(torch.int16).unflatten(-1, code_shape),
        km.view(torch.float16).unflatten(-1, meta_shape),
        vm.view(torch.float16).unflatten(-1, meta_shape),
    )


def quantize_kv_ref(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` ``[..., D]`` → codes int16 ``[..., D/4]`` and meta fp16 ``[..., G, 2]``, as the page stores them."""
    head_dim = x.shape[-1]
    groups = x.to(torch.float32).unflatten(-1, (head_dim // group_size, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    fp16_max = torch.finfo(torch.float16).max
    meta = torch.cat([(high - low) / 15, low], dim=-1).clamp(-fp16_max, fp16_max).to(torch.float16)
    scale, zero = meta.to(torch.float32).split(1, dim=-1)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    code = torch.round((groups - zero) * inverse).clamp(0, 15).to(torch.int32)
    lanes = code.flatten(-2).unflatten(-1, (4, head_dim // 4))
    word = lanes[..., 0, :] | lanes[..., 1, :] << 4 | lanes[..., 2, :] << 8 | lanes[..., 3, :] << 12
    return word.to(torch.int16), meta


def dequantize_kv_ref(codes: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """codes int16 ``[..., D/4]`` and meta fp16 ``[..., G, 2]`` → float32 ``[..., D]``."""
    word = codes.to(torch.int32)
    code = torch.stack([(word >> shift) & 15 for shift in (0, 4, 8, 12)], dim=-2).flatten(-2)
    scale, zero = meta.to(torch.float32).unbind(-1)
    groups = code.unflatten(-1, (meta.shape[-2], -1)).to(torch.float32)
    return (groups * scale.unsqueeze(-1) + zero.unsqueeze(-1)).flatten(-2)


def store_kv_ref(
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, group_size: int,
    k_offset: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Quantise ``key``, ``value`` ``[T, H, D]`` into ``cache`` ``[B, H, block_size, C]`` at ``slot_mapping`` ``[T]``.

    Slot s is token ``s % block_size`` of page ``s // block_size``; −1 marks padding and writes nothing. k_offset:
    float32 ``[H, D]``, subtracted from ``key`` in float32, or None.
    """
    if k_offset is not None:
        key = key.to(torch.float32) - k_offset
    views = page_views(cache, key.shape[-1], group_size)
    keep = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[keep].to(torch.int64)
    page, token = slots // cache.shape[2], slots % cache.shape[2]
    for x, codes, meta in ((key, views.k_codes, views.k_meta), (value, views.v_codes, views.v_meta)):
        codes[page, :, token], meta[page, :, token] = quantize_kv_ref(x[keep], group_size)


def load_kv_ref(
    cache: torch.Tensor, pages: torch.Tensor, length: int, head_dim: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K̂ and V̂ float32 ``[H, length, D]`` of the first ``length`` tokens in pages ``pages`` ``[P]``."""
    views = page_views(cache, head_dim, group_size)
    pages = pages[: -(-length // cache.shape[2])].to(torch.int64)

    def load(codes: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        x = dequantize_kv_ref(codes[pages], meta[pages])  # [P, H, block_size, D]
        return x.transpose(0, 1).flatten(1, 2)[:, :length]

    return load(views.k_codes, views.k_meta), load(views.v_codes, views.v_meta)


@triton.jit
def _store_one(
    x_ptr, center_ptr, out_ptr, codes_ptr, meta_ptr, token, in_token, offset, ok,
    stride_token, stride_out, ROWS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr,
    CENTERED: tl.constexpr, ROUND_TRIP: tl.constexpr,
):  # fmt: skip
    """Quantise rows ``token`` of K or V of one head, pack them into the page; optionally write what a load would give.

    center_ptr: what is subtracted from each row, if CENTERED. codes_ptr, meta_ptr: int16 and fp16 pointers to the
    planes in the first page; offset: int64 bytes / 2 to each row's page; in_token: the row's position in its page.
    """
    L: tl.constexpr = D // 4
    GROUP_SIZE: tl.constexpr = D // GROUPS
    lane = tl.arange(0, LANES)[None, :]
    real = ok[:, None] & (lane < L)
    x = ()
    for i in tl.static_range(4):
        plane = tl.load(x_ptr + token[:, None] * stride_token + i * L + lane, mask=real, other=0.0).to(tl.float32)
        if CENTERED:
            plane -= tl.load(center_ptr + i * L + lane, mask=lane < L, other=0.0)
        x = x + (plane,)
    scales = ()
    zeros = ()
    for g in tl.static_range(GROUPS):
        low = tl.full((ROWS, LANES), float("inf"), tl.float32)
        high = tl.full((ROWS, LANES), float("-inf"), tl.float32)
        for i in tl.static_range(4):
            if (i + 1) * L > g * GROUP_SIZE and i * L < (g + 1) * GROUP_SIZE:  # plane i meets group g
                member = (lane < L) & ((i * L + lane) // GROUP_SIZE == g)
                low = tl.minimum(low, tl.where(member, x[i], float("inf")))
                high = tl.maximum(high, tl.where(member, x[i], float("-inf")))
        low = tl.min(low, 1)
        step = tl.div_rn(tl.max(high, 1) - low, tl.full((ROWS,), 15.0, tl.float32))
        scale = tl.minimum(step, 65504.0).to(tl.float16)
        zero = tl.minimum(tl.maximum(low, -65504.0), 65504.0).to(tl.float16)
        at = meta_ptr + offset + in_token * (2 * GROUPS) + 2 * g
        tl.store(at, scale, mask=ok)
        tl.store(at + 1, zero, mask=ok)
        scales = scales + (scale.to(tl.float32),)
        zeros = zeros + (zero.to(tl.float32),)
    word = tl.zeros((ROWS, LANES), tl.int32)
    for i in tl.static_range(4):
        scale = tl.zeros((ROWS, LANES), tl.float32)
        zero = tl.zeros((ROWS, LANES), tl.float32)
        for g in tl.static_range(GROUPS):
            if (i + 1) * L > g * GROUP_SIZE and i * L < (g + 1) * GROUP_SIZE:
                member = (i * L + lane) // GROUP_SIZE == g
                scale = tl.where(member, scales[g][:, None], scale)
                zero = tl.where(member, zeros[g][:, None], zero)
        inverse = tl.where(scale > 0, tl.div_rn(tl.full((ROWS, LANES), 1.0, tl.float32), scale), 0.0)
        code = tl.minimum(tl.maximum((x[i] - zero) * inverse, 0.0), 15.0)
        code = (code + 8388608.0).to(tl.int32, bitcast=True) & 15  # at 2²³ the spacing of floats is 1: rounds to even
        word |= code << (4 * i)
        if ROUND_TRIP:
            x_hat = code.to(tl.float32) * scale + zero
            tl.store(out_ptr + token[:, None] * stride_out + i * L + lane, x_hat, mask=real)
    tl.store(codes_ptr + (offset + in_token * L)[:, None] + lane, word.to(tl.int16), mask=real)


@triton.jit(do_not_specialize=["tokens"])
def _store_kernel(
    key_ptr, value_ptr, center_ptr, key_out_ptr, value_out_ptr, codes_ptr, meta_ptr, slot_ptr, tokens,
    stride_key: tl.int64, stride_key_head: tl.int64, stride_value: tl.int64, stride_value_head: tl.int64,
    stride_out: tl.int64, stride_page: tl.int64, stride_head: tl.int64,
    D: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    CENTERED: tl.constexpr, ROUND_TRIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (token tiles, H): ROWS tokens of one KV head, K then V. Cache strides in int16."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + token, mask=token < tokens, other=-1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    ok = slot >= 0
    slot = tl.where(ok, slot, 0)
    offset = slot // BLOCK * stride_page + head * stride_head
    in_token = slot % BLOCK
    CODES: tl.constexpr = BLOCK * (D // 4)
    _store_one(
        key_ptr + head * stride_key_head, center_ptr + head * D, key_out_ptr + head * D, codes_ptr,
        meta_ptr + 2 * CODES, token, in_token, offset, ok, stride_key, stride_out, ROWS, D, GROUPS, LANES, CENTERED,
        ROUND_TRIP,
    )  # fmt: skip
    _store_one(
        value_ptr + head * stride_value_head, center_ptr, value_out_ptr + head * D, codes_ptr + CODES,
        meta_ptr + 2 * CODES + BLOCK * GROUPS * 2, token, in_token, offset, ok, stride_value, stride_out, ROWS, D,
        GROUPS, LANES, False, ROUND_TRIP,
    )  # fmt: skip


_STORE_ROWS = 16  # tokens a program


@functools.cache
def _store(
    head_dim: int, group_size: int, block_size: int, centered: bool, round_trip: bool, device: torch.device
) -> Launcher:
    require_triton("store_kv")
    lanes, pdl = triton.next_power_of_2(head_dim // 4), pdl_supported(device)
    return Launcher(
        _store_kernel, D=head_dim, GROUPS=head_dim // group_size, BLOCK=block_size, ROWS=_STORE_ROWS, LANES=lanes,
        CENTERED=centered, ROUND_TRIP=round_trip, PDL=pdl, num_warps=2 if lanes <= 32 else 4, launch_pdl=pdl)


def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    group_size: int,
    key_out: torch.Tensor | None = None,
    value_out: torch.Tensor | None = None,
    k_offset: torch.Tensor | None = None,
) -> None:
    """``store_kv_ref`` on the GPU, bit for bit, for the first ``len(slot_mapping)`` rows of ``key`` and ``value``.

    key, value: ``[T, H, D]``, channels contiguous. key_out, value_out: contiguous ``[T, H, D]``, or None; they receive
    the stored values as a load would return them, in their dtype. Rows of padding slots are left alone. k_offset:
    contiguous float32 ``[H, D]``, or None.
    """
    tokens, (_, heads, head_dim) = slot_mapping.shape[0], key.shape
    check_pages(cache, head_dim, group_size)
    if tokens == 0:
        return
    round_trip = key_out is not None and value_out is not None
    if (key_out is None) != (value_out is None) or (round_trip and not (
        key_out.is_contiguous() and value_out.is_contiguous()
    )):  # fmt: skip
        raise ValueError("key_out and value_out must both be contiguous tensors [T, H, D], or both None.")
    if k_offset is not None and not (
        k_offset.is_contiguous() and k_offset.shape == (heads, head_dim) and k_offset.dtype == torch.float32
    ):  # fmt: skip
        raise ValueError(f"k_offset must be a contiguous float32 tensor [{heads}, {head_dim}], not "
                         f"{k_offset.dtype} {tuple(k_offset.shape)}.")
    store = _store(head_dim, group_size, cache.shape[2], k_offset is not None, round_trip, cache.device)
    store(
        (cdiv(tokens, _STORE_ROWS), heads, 1),
        key, value, key if k_offset is None else k_offset,
        key_out if round_trip else key, value_out if round_trip else value,
        cache.view(torch.int16), cache.view(torch.float16), slot_mapping, tokens,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1), heads * head_dim,
        cache.stride(0) // 2, cache.stride(1) // 2,
    )  # fmt: skip
