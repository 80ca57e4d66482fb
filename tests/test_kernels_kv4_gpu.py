# SPDX-License-Identifier: Apache-2.0
"""The 4-bit KV-cache kernels against the references: on a GPU, or in the interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from vllm_comet.checkpoint import KV_GROUP_SIZES
from vllm_comet.kernels.kv4_attention import attention_ref
from vllm_comet.kernels.kv4_cache import (
    bytes_per_token,
    dequantize_kv_ref,
    load_kv_ref,
    quantize_kv_ref,
    store_kv,
    store_kv_ref,
)
from vllm_comet.kernels.kv4_decode import decode, make_scratch, plan
from vllm_comet.kernels.kv4_prefill import flash_attention, gather_kv, prefill

pytest.importorskip("triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRET else "cuda")
pytestmark = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()), reason="no CUDA GPU, and TRITON_INTERPRET=1 is not set"
)


def paged(lengths, heads, head_dim, group_size, block_size, seed):
    """A cache filled through ``store_kv_ref`` over scattered pages; unused bytes are 0xFF, so their scales are NaN."""
    gen = torch.Generator().manual_seed(seed)
    counts = [-(-n // block_size) for n in lengths]
    pages = torch.randperm(sum(counts) + 3, generator=gen).to(torch.int32)
    cache = torch.full((len(pages), heads, block_size, bytes_per_token(head_dim, group_size)), 255, dtype=torch.uint8)
    table = torch.full((len(lengths), max(counts, default=0) + 2), 2**30, dtype=torch.int32)
    used = 0
    for r, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[r, :count] = pages[used : used + count]
        used += count
        outliers = 1 + 8 * (torch.rand(1, heads, head_dim, generator=gen) > 0.97)
        k, v = torch.randn(2, n, heads, head_dim, generator=gen) * outliers + 0.3
        token = torch.arange(n)
        store_kv_ref(k, v, cache, table[r, token // block_size].long() * block_size + token % block_size, group_size)
    return cache.to(DEVICE), table.to(DEVICE)


HALF_PRECISION = 2e-3
"""Bound of an output's relative error: the kernels round probabilities to fp16 (2**-11), and what scales and
zero-points contribute cancels in part, which enlarges that a few times. Rounding to bf16 alone costs up to 2**-9."""


def relative_error(out, ref):
    return ((out.double() - ref).norm() / ref.norm().clamp_min(1e-30)).item()


SHAPES = [(d, g) for d in (64, 96, 128, 256) for g in KV_GROUP_SIZES if d % g == 0]


@pytest.mark.parametrize(
    ("head_dim", "group_size", "dtype"),
    [(*shape, torch.bfloat16) for shape in SHAPES] + [(128, 128, torch.float16), (96, 32, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("centered", [False, True])
def test_store_is_bit_exact(head_dim, group_size, dtype, centered):
    gen = torch.Generator().manual_seed(head_dim + group_size)
    tokens, heads, block_size = 37, 2, 16
    qkv = torch.randn(tokens, 2 * heads + 1, head_dim, generator=gen) * torch.rand(tokens, 1, 1, generator=gen) * 9
    qkv[3] = 1.5  # constant groups: scale 0
    qkv[4] = 0
    qkv[5] *= 1e-6  # fp16 subnormal scales
    qkv[6] *= 6e3
    if dtype != torch.float16:
        qkv[7] *= 1e6  # beyond fp16: clamped
    key, value = qkv.to(DEVICE, dtype)[:, 1:].split(heads, dim=1)  # views with gaps
    slots = torch.randperm(5 * block_size, generator=gen)[:tokens].to(DEVICE)
    slots[::5] = -1
    shape = (5, heads, block_size, bytes_per_token(head_dim, group_size))
    expect, got = (torch.full(shape, 255, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    key_out, value_out = (torch.full((tokens, heads, head_dim), -7, dtype=dtype, device=DEVICE) for _ in range(2))
    offset = (20 * torch.randn(heads, head_dim, generator=gen)).to(DEVICE) if centered else None
    store_kv_ref(key, value, expect, slots, group_size, offset)
    store_kv(key, value, got, slots, group_size, k_offset=offset)
    assert torch.equal(got, expect)
    store_kv(key, value, got.fill_(255), slots, group_size, key_out, value_out, offset)
    assert torch.equal(got, expect)
    for x, out in ((key.float() - offset if centered else key, key_out), (value, value_out)):
        x_hat = dequantize_kv_ref(*quantize_kv_ref(x, group_size)).to(dtype)
        ulp = 2**-7 if INTERPRET and dtype == torch.bfloat16 else 0  # the interpreter truncates to bf16
        torch.testing.assert_close(out, torch.where(slots[:, None, None] >= 0, x_hat, -7), rtol=ulp, atol=0)


@pytest.mark.parametrize(
    ("lengths", "heads", "group", "head_dim", "group_size", "block_size", "window"),
    [
        ([1, 17, 300, 0, 129], 2, 4, 128, 128, 16, None),
        ([1000], 1, 8, 128, 64, 32, None),
        ([64, 1, 200], 2, 7, 64, 64, 16, None),
        ([33, 500], 1, 1, 64, 32, 64, 50),
        ([70, 260], 1, 16, 128, 32, 128, 100),
        ([5, 140], 2, 2, 256, 128, 16, 1),
        ([90, 131], 1, 6, 256, 64, 16, None),
        ([150], 1, 3, 96, 96, 16, None),
        ([1, 140], 1, 4, 96, 32, 16, None),
        ([135], 2, 2, 256, 32, 32, None),
    ],
)
def test_decode(lengths, heads, group, head_dim, group_size, block_size, window):
    cache, table = paged(lengths, heads, head_dim, group_size, block_size, seed=sum(lengths))
    q = torch.randn(len(lengths), heads * group, head_dim, device=DEVICE).to(torch.bfloat16)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(len(lengths) + 1, device=DEVICE)
    scratch = make_scratch(len(lengths), heads * group, heads, head_dim, DEVICE)
    scratch.partial.fill_(float("nan")), scratch.lse.fill_(float("nan"))
    scale = head_dim**-0.5
    ref = attention_ref(q, cache, table, starts, seq_lens, group_size, scale, window)
    for _ in range(2):  # the second call finds the scratch as the first left it
        out = torch.full(q.shape, float("nan"), device=DEVICE)
        plan(seq_lens, window, head_dim, scratch)
        decode(q, cache, table, group_size, scale, window, out, scratch)
        assert relative_error(out, ref) < HALF_PRECISION


def run_decode(q, cache, table, lengths, heads, group_size, window=None, max_requests=None):
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    scratch = make_scratch(max_requests or len(lengths), q.shape[1], heads, q.shape[2], DEVICE)
    plan(seq_lens, window, q.shape[2], scratch)
    out = torch.full_like(q, float("nan"))
    return decode(q, cache, table, group_size, q.shape[2] ** -0.5, window, out, scratch)


def test_decode_does_not_depend_on_batch_order():
    lengths, heads = [200, 1, 70, 333], 2
    cache, table = paged(lengths, heads, 64, 64, 16, seed=3)
    q = torch.randn(4, 8, 64, device=DEVICE)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    out = run_decode(q, cache, table, lengths, heads, 64)
    again = run_decode(q[order], cache, table[order], [lengths[i] for i in order], heads, 64, max_requests=9)
    assert torch.equal(again, out[order])


@pytest.mark.skipif(INTERPRET, reason="long contexts: on a GPU only")
@pytest.mark.parametrize("seed", range(8))
def test_decode_fuzz(seed):
    gen = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=gen))]

    head_dim, group_size = SHAPES[int(torch.randint(len(SHAPES), (1,), generator=gen))]
    heads, group, block_size, window = pick(1, 2, 8), pick(1, 4, 5, 8, 16), pick(16, 32, 64, 128), pick(None, 1000)
    longest = pick(100, 3000, 131072 // heads)
    lengths = torch.randint(0, longest, (pick(1, 3, 40) if longest < 5000 else 2,), generator=gen).tolist()
    cache, table = paged(lengths, heads, head_dim, group_size, block_size, seed)
    q = torch.randn(len(lengths), heads * group, head_dim, generator=gen).to(DEVICE, torch.bfloat16)
    out = run_decode(q.float(), cache, table, lengths, heads, group_size, window)
    starts = torch.arange(len(lengths) + 1)
    lens = torch.tensor(lengths)
    ref = attention_ref(q, cache, table, starts, lens, group_size, head_dim**-0.5, window)
    assert relative_error(out, ref) < HALF_PRECISION, (head_dim, group_size, heads, group, block_size, window, lengths)


@pytest.mark.skipif(INTERPRET, reason="CUDA graphs need a GPU")
def test_decode_in_a_cuda_graph_serves_other_lengths():
    heads, head_dim, most = 2, 128, 700
    cache, table = paged([most] * 4, heads, head_dim, 128, 16, seed=5)
    q = torch.randn(4, 8, head_dim, device=DEVICE)
    seq_lens = torch.ones(4, dtype=torch.int32, device=DEVICE)
    scratch, out = make_scratch(4, 8, heads, head_dim, DEVICE), torch.empty_like(q)
    plan(seq_lens, None, head_dim, scratch)
    decode(q, cache, table, 128, 0.1, None, out, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(q, cache, table, 128, 0.1, None, out, scratch)
    for lengths in ([700, 1, 64, 333], [2, 650, 0, 0]):
        seq_lens.copy_(torch.tensor(lengths))
        plan(seq_lens, None, head_dim, scratch)
        out.fill_(float("nan"))
        graph.replay()
        ref = attention_ref(q, cache, table, torch.arange(5), seq_lens, 128, 0.1)
        assert relative_error(out, ref) < HALF_PRECISION


@pytest.mark.skipif(INTERPRET, reason="kernels overlap on a GPU only")
def test_kernels_that_start_early_give_the_same():
    """Store and decode of several layers in one graph, sharing scratch, against the same calls one at a time."""
    lengths, heads, head_dim, layers = [900, 17, 64, 333], 8, 128, 6
    caches, tables = zip(*(paged(lengths, heads, head_dim, 128, 16, seed=i) for i in range(layers)), strict=True)
    scratch = make_scratch(4, 4 * heads, heads, head_dim, DEVICE)
    qkv = torch.empty(layers, 4, 6 * heads, head_dim, dtype=torch.bfloat16, device=DEVICE)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    slots = torch.zeros(layers, 4, dtype=torch.int64, device=DEVICE)
    out = torch.empty(layers, 4, 4 * heads, head_dim, device=DEVICE)

    def step(wait):
        for i in range(layers):
            q, k, v = qkv[i].split([4 * heads, heads, heads], dim=1)
            store_kv(k, v, caches[i], slots[i], 128)
            wait()
            decode(q, caches[i], tables[i], 128, 0.1, None, out[i], scratch)
            wait()

    def renew(seed):
        torch.manual_seed(seed)
        qkv.normal_()
        seq_lens.copy_(torch.tensor([int(torch.randint(1, n + 1, ())) for n in lengths]))
        last = (seq_lens - 1).long()
        for i in range(layers):
            slots[i] = tables[i].gather(1, last[:, None] // 16)[:, 0] * 16 + last % 16
        plan(seq_lens, None, head_dim, scratch)

    renew(0)
    step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(lambda: None)
    for seed in range(5):
        renew(seed)
        out.fill_(float("nan"))
        graph.replay()
        early = out.clone()
        torch.cuda.synchronize()
        step(torch.cuda.synchronize)
        assert torch.equal(early, out) and not out.isnan().any()


def flash_in_torch(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, softmax_scale, causal, window_size, out
):  # fmt: skip
    """Stands for vLLM's ``flash_attn_varlen_func``: the arguments that we pass, in plain torch."""
    assert causal and max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    before, after = window_size or (2**30, 0)
    for r in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[r], cu_seqlens_q[r + 1])
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x[cu_seqlens_k[r] : cu_seqlens_k[r + 1]].repeat_interleave(repeat, 1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), keys) * softmax_scale
        last = torch.arange(scores.shape[2], device=q.device)[scores.shape[2] - scores.shape[1] :, None]
        distance = last - torch.arange(scores.shape[2], device=q.device)
        hidden = (distance < -after) | (distance > before)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values).to(q.dtype)


@pytest.mark.parametrize("window", [None, 20])
def test_flash_attention_over_gathered_keys(window):
    lengths, queries, heads = [40, 9], [12, 9], 2
    cache, table = paged(lengths, heads, 64, 32, 16, seed=11)
    q = torch.randn(sum(queries), 2 * heads, 64, device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32, device=DEVICE)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    workspace = torch.full((2, 60, heads, 64), float("nan"), device=DEVICE)
    out = torch.full_like(q, float("nan"))
    gather_kv(cache, table, ends, 40, 32, *workspace)
    flash_attention(flash_in_torch, q, *workspace, starts, ends, 12, 40, 0.1, window, out)
    lens = torch.tensor(lengths, device=DEVICE)
    assert relative_error(out, attention_ref(q, cache, table, starts, lens, 32, 0.1, window)) < 1e-5


@pytest.mark.parametrize("chunk", [1, 17, 64])
def test_prefill_in_chunks_is_prefill_at_once(chunk):
    length, heads, head_dim = 75, 1, 64
    cache, table = paged([length], heads, head_dim, 64, 16, seed=7)
    q = torch.randn(length, 2, head_dim, device=DEVICE)

    def attend(start, end):
        lens = torch.tensor([end], dtype=torch.int32, device=DEVICE)
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        out = torch.full_like(q[start:end], float("nan"))
        return prefill(q[start:end], cache, table, starts, lens, end - start, 64, 0.2, None, out)

    parts = [attend(i, min(i + chunk, length)) for i in range(0, length, chunk)]
    torch.testing.assert_close(torch.cat(parts), attend(0, length), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("lengths", "queries", "heads", "group", "head_dim", "group_size", "block_size", "window"),
    [
        ([70, 5, 0, 131], [70, 1, 0, 33], 2, 4, 128, 128, 16, None),
        ([90], [64], 1, 7, 64, 32, 32, 20),
        ([40, 150], [3, 150], 1, 1, 128, 64, 128, None),
        ([77], [40], 1, 16, 128, 32, 64, 33),
        ([50], [50], 1, 2, 256, 64, 16, None),
        ([66], [20], 1, 3, 96, 96, 16, 64),
        ([70], [70], 1, 2, 96, 32, 16, None),
        ([45], [30], 1, 1, 256, 32, 16, 9),
    ],
)
def test_prefill(lengths, queries, heads, group, head_dim, group_size, block_size, window):
    cache, table = paged(lengths, heads, head_dim, group_size, block_size, seed=sum(lengths))
    q = torch.randn(sum(queries), heads * group, head_dim, device=DEVICE).to(torch.bfloat16)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32, device=DEVICE)
    scale = head_dim**-0.5
    ref = attention_ref(q, cache, table, starts, seq_lens, group_size, scale, window)
    out = torch.full(q.shape, float("nan"), device=DEVICE)
    prefill(q, cache, table, starts, seq_lens, max(queries) + 5, group_size, scale, window, out)
    assert relative_error(out, ref) < HALF_PRECISION


@pytest.mark.parametrize(("head_dim", "group_size"), SHAPES)
def test_gather_is_what_a_load_gives(head_dim, group_size):
    lengths, heads = [37, 0, 1, 64], 2
    cache, table = paged(lengths, heads, head_dim, group_size, 16, seed=head_dim)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    shape = (sum(lengths) + 3, heads, head_dim)
    key, value = (torch.full(shape, -7, dtype=torch.float16, device=DEVICE) for _ in range(2))
    gather_kv(cache, table, starts, max(lengths) + 9, group_size, key, value)
    for r, length in enumerate(lengths):
        for x, x_hat in zip((key, value), load_kv_ref(cache, table[r], length, head_dim, group_size), strict=True):
            assert torch.equal(x[starts[r] : starts[r + 1]].transpose(0, 1), x_hat.to(torch.float16))
    assert (key[-3:] == -7).all() and (value[-3:] == -7).all()
