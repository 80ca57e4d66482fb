# SPDX-License-Identifier: Apache-2.0
"""The 4-bit KV-cache references against independent arithmetic: page layout, quantisation error, causal attention."""

from __future__ import annotations

import pytest
import torch

from vllm_comet.checkpoint import KV_GROUP_SIZES
from vllm_comet.kernels.kv4_attention import attention_ref
from vllm_comet.kernels.kv4_cache import bytes_per_token, load_kv_ref, store_kv_ref

SHAPES = [(d, g) for d in (64, 96, 128, 256) for g in KV_GROUP_SIZES if d % g == 0]


def filled(lengths, heads, head_dim, group_size, block_size, seed=0):
    """A cache whose unused bytes are 0xFF (NaN scales), its block table and the random (K, V) per request in it."""
    gen = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    pages = torch.randperm(sum(counts) + 3, generator=gen).to(torch.int32)
    cache = torch.full((len(pages), heads, block_size, bytes_per_token(head_dim, group_size)), 255, dtype=torch.uint8)
    table = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
    kv, used = [], 0
    for r, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[r, :count] = pages[used : used + count]
        used += count
        k, v = torch.randn(2, n, heads, head_dim, generator=gen) + 0.3
        token = torch.arange(n)
        store_kv_ref(k, v, cache, table[r, token // block_size].long() * block_size + token % block_size, group_size)
        kv.append((k, v))
    return cache, table, kv


@pytest.mark.parametrize(("head_dim", "group_size"), SHAPES)
def test_round_trip_error_is_half_a_step(head_dim, group_size):
    cache, table, [(k, v)] = filled([37], 2, head_dim, group_size, 16)
    for x, x_hat in zip((k, v), load_kv_ref(cache, table[0], 37, head_dim, group_size), strict=True):
        groups = x.transpose(0, 1).unflatten(-1, (-1, group_size))
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        error = (groups - x_hat.unflatten(-1, (-1, group_size))).abs().amax(-1)
        assert (error <= 0.51 * step + 2e-3).all()


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_attention_ref_is_softmax_attention(window):
    """Against a naive token-by-token loop in float64."""
    lengths, queries, heads, repeat, head_dim, group_size = [1, 30, 18], [1, 5, 18], 2, 3, 64, 32
    cache, table, _ = filled(lengths, heads, head_dim, group_size, 16)
    q = torch.randn(sum(queries) + 2, heads * repeat, head_dim)  # two rows that no request owns
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)])
    got = attention_ref(q, cache, table, starts, torch.tensor(lengths), group_size, 0.2, window)
    assert got.dtype == torch.float64 and not got[sum(queries) :].any()
    for r, (n, m) in enumerate(zip(lengths, queries, strict=True)):
        k, v = (x.double() for x in load_kv_ref(cache, table[r], n, head_dim, group_size))
        for i in range(m):
            last = n - m + i
            first = 0 if window is None else max(0, last - window + 1)
            for h in range(heads * repeat):
                weights = (0.2 * k[h // repeat, first : last + 1] @ q[starts[r] + i, h].double()).exp()
                expect = weights @ v[h // repeat, first : last + 1] / weights.sum()
                torch.testing.assert_close(got[starts[r] + i, h], expect)


def test_attention_does_not_see_the_offset():
    """K of a model with a large bias: stored less its mean, scores move by the same amount for all keys."""
    length, heads, head_dim = 90, 2, 64
    gen = torch.Generator().manual_seed(1)
    bias = 300 * torch.randn(heads, head_dim, generator=gen)
    k, v = torch.randn(2, length, heads, head_dim, generator=gen)
    q = torch.randn(length, heads, head_dim, generator=gen) / 8
    slots, pages = torch.arange(length), -(-length // 16)
    found = []
    for offset in (bias, None):
        cache = torch.zeros(pages, heads, 16, bytes_per_token(head_dim, 32), dtype=torch.uint8)
        store_kv_ref(k + bias, v, cache, slots, 32, offset)
        found.append(attention_ref(q, cache, torch.arange(pages)[None], torch.tensor([0, length]),
                                   torch.tensor([length]), 32, 1.0))
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k + bias, v)), is_causal=True, scale=1.0).transpose(0, 1)
    errors = [float((out - exact).norm() / exact.norm()) for out in found]
    assert errors[0] < 0.1 < 0.5 < errors[1]


def test_store_skips_padding_slots():
    cache = torch.full((2, 1, 16, bytes_per_token(64, 64)), 7, dtype=torch.uint8)
    before = cache.clone()
    store_kv_ref(torch.randn(3, 1, 64), torch.randn(3, 1, 64), cache, torch.full((3,), -1), 64)
    assert torch.equal(cache, before)
