# SPDX-License-Identifier: Apache-2.0
"""The 4-bit KV-cache page: its layout, quantisation, store and load.

Quantisation is asymmetric, per (token, KV head, group of ``group_size`` channels along head_dim), K after RoPE:

    scale = fp16((max − min) / 15)    zero = fp16(min)    code = clamp(rint((x − zero) / scale), 0, 15)
    x̂ = code · scale + zero           (float32)

A page holds ``block_size`` tokens of one KV head in ``block_size · C`` contiguous bytes, as planes, so that every plane
starts 16-byte aligned and a tile of tokens is one contiguous run (D = head_dim, G = D / group_size):

    K codes [block_size, D/2] | V codes [block_size, D/2] | K meta [block_size, G, 2] | V meta [block_size, G, 2]

``meta`` is (scale, zero) in fp16. The codes of a token are D/4 int16 lanes: nibble i (from the low end) of lane j holds
channel ``i · D/4 + j``, so one AND yields two channels that lie in the right place for a tensor-core operand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PageViews(NamedTuple):
    """Planes of a cache ``[B, H, block_size, C]`` uint8, views into its memory."""

    k_codes: torch.Tensor  # int16 [B, H, block_size, D/4]
    v_codes: torch.Tensor  # int16 [B, H, block_size, D/4]
    k_meta: torch.Tensor  # fp16 [B, H, block_size, G, 2]
    v_meta: torch.Tensor  # fp16 [B, H, block_size, G, 2]


def bytes_per_token(head_dim: int, group_size: int) -> int:
    """C: bytes of K and V of one token and KV head, codes and meta."""
    return head_dim + 2 * (head_dim // group_size) * 4


def page_views(cache: torch.Tensor, head_dim: int, group_size: int) -> PageViews:
    """Planes of ``cache`` ``[B, H, block_size, C]`` uint8; a (page, head) must be contiguous."""
    pages, heads, block_size, content = cache.shape
    if content != bytes_per_token(head_dim, group_size) or cache.stride()[2:] != (content, 1):
        raise ValueError(f"KV cache of shape {tuple(cache.shape)} and strides {cache.stride()} is not a 4-bit page of "
                         f"head_dim {head_dim} and group_size {group_size}: a (page, head) must be contiguous.")
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
    key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor, group_size: int
) -> None:
    """Quantise ``key``, ``value`` ``[T, H, D]`` into ``cache`` ``[B, H, block_size, C]`` at ``slot_mapping`` ``[T]``.

    Slot s is token ``s % block_size`` of page ``s // block_size``; −1 marks padding and writes nothing.
    """
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
