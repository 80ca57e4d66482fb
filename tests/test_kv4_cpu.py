# SPDX-License-Identifier: Apache-2.0
"""The CPU attention over 4-bit pages equals the float64 reference, whatever lies in memory nobody wrote."""

import pytest
import torch

from vllm_comet.kernels import kv4_cache, kv4_cpu
from vllm_comet.kernels.kv4_attention import attention_ref

SHAPES = [  # head_dim, group_size, KV heads, query heads per KV head, block size
    (64, 64, 3, 3, 16), (128, 128, 2, 4, 32), (128, 64, 1, 7, 16), (256, 128, 1, 4, 48), (96, 32, 2, 1, 16),
]


@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("head_dim, group_size, heads, repeat, block_size", SHAPES)
def test_mixed_batch_equals_reference(head_dim, group_size, heads, repeat, block_size, window, monkeypatch):
    monkeypatch.setattr(kv4_cpu, "DECODE_TOKENS", 256)  # several decode batches
    monkeypatch.setattr(kv4_cpu, "QUERY_ROWS", 32)  # several prefill pieces
    torch.manual_seed(0)
    queries, lengths = [1, 5, 1, 40, 1, 150, 0, 1], [1, 5, 70, 100, 33, 150, 0, 200]
    pages = sum(-(-n // block_size) for n in lengths) + 3
    content = kv4_cache.bytes_per_token(head_dim, group_size)
    cache = torch.full((pages, heads, block_size, content), 0xFF, dtype=torch.uint8)  # NaN scales
    order = torch.randperm(pages)
    table = torch.full((len(lengths), 20), pages + 1000, dtype=torch.int32)  # entries past a request are invalid
    for r, length in enumerate(lengths):
        used = -(-length // block_size)
        table[r, :used], order = order[:used].to(torch.int32), order[used:]
        token = torch.arange(length)
        slots = table[r, token // block_size].long() * block_size + token % block_size
        k, v = torch.randn(2, length, heads, head_dim).unbind()
        kv4_cache.store_kv_ref(k, v, cache, slots, group_size)
    table[lengths.index(0)] = 0
    q = torch.randn(sum(queries), heads * repeat, head_dim)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    args = (q, cache, table, starts, torch.tensor(lengths), group_size, head_dim**-0.5, window)
    out = torch.full_like(q, float("nan"))
    kv4_cpu.attention(*args, out)
    assert torch.allclose(out.double(), attention_ref(*args), atol=1e-5, rtol=1e-5)
