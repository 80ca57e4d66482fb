# SPDX-License-Identifier: Apache-2.0
"""The attention backend on its GPU kernels, steps as vLLM schedules them: on a GPU, or in the interpreter.

On a GPU with vLLM's FlashAttention, in the interpreter with a stand-in for it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from test_kernels_kv4_gpu import DEVICE, HALF_PRECISION, INTERPRET, flash_in_torch, pytestmark, relative_error
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.workspace import init_workspace_manager, lock_workspace, reset_workspace_manager

from vllm_comet.attention import backend, prefill
from vllm_comet.attention.backend import CometMetadataBuilder, backend_for
from vllm_comet.kernels import kv4_cache, kv4_decode
from vllm_comet.kernels.kv4_attention import attention_ref

__all__ = ["pytestmark"]
BLOCK, HEADS, REPEAT, HEAD_DIM, GROUP_SIZE, MAX_LEN = 16, 2, 3, 64, 64, 128
DTYPE = torch.float16


def engine_config():
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_LEN, dtype=DTYPE),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8), speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )  # fmt: skip


class Layer:
    """One attention layer over its own pages; requests are rows of a block table over scattered pages."""

    def __init__(self, monkeypatch, window, flash, requests=8):
        config = engine_config()
        monkeypatch.setattr(backend, "get_current_vllm_config", lambda: config)
        if INTERPRET:
            monkeypatch.setattr(prefill, "_flash_attention", lambda *_: (flash_in_torch, "torch"))
        self.impl = backend_for(GROUP_SIZE).get_impl_cls()(
            HEADS * REPEAT, HEAD_DIM, HEAD_DIM**-0.5, HEADS, sliding_window=window)
        self.impl.prefill = prefill.paged_prefill
        self.k_offset = torch.randn(HEADS, HEAD_DIM, device=DEVICE)
        if flash:
            self.impl.prefill = prefill.choose(config, HEADS, HEAD_DIM)
            self.impl.prefill.compiled = True  # else the first call gathers fresh prompts too
            lock_workspace()
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD_DIM, dtype=DTYPE)
        self.builder = CometMetadataBuilder(spec, [], config, DEVICE)
        self.builder.scratch = {window: kv4_decode.make_scratch(8, HEADS * REPEAT, HEADS, HEAD_DIM, DEVICE)}
        self.builder.flash = self.impl.prefill if flash else None
        width = MAX_LEN // BLOCK
        self.table = torch.randperm(requests * width, device=DEVICE).to(torch.int32).view(requests, width)
        content = kv4_cache.bytes_per_token(HEAD_DIM, GROUP_SIZE)
        shape = (requests * width, HEADS, BLOCK, content)
        self.cache = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)  # unwritten scales are NaN

    def step(self, requests, qkv, lengths, queries):
        """Store and attend; row r of the batch is request ``requests[r]`` with its newest ``queries[r]`` tokens."""
        starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
        table, lens = self.table[requests], torch.tensor(lengths, dtype=torch.int32)
        position = torch.cat([torch.arange(n - m, n) for n, m in zip(lengths, queries, strict=True)]).to(DEVICE)
        row = torch.arange(len(queries)).repeat_interleave(torch.tensor(queries)).to(DEVICE)
        slots = table[row, position // BLOCK].long() * BLOCK + position % BLOCK
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(DEVICE), query_start_loc_cpu=starts, seq_lens=lens.to(DEVICE),
            num_reqs=len(lengths), num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=MAX_LEN,
            block_table_tensor=table, slot_mapping=slots, seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip
        q, key, value = qkv
        batch = self.builder.build(0, common)
        out = torch.full_like(q, float("nan"))
        stored = self.cache.clone()
        kv4_cache.store_kv_ref(key, value, stored, slots, GROUP_SIZE, self.k_offset)
        self.impl._forward_gpu(q, key, value, self.k_offset, self.cache, batch, out)
        assert torch.equal(self.cache, stored)
        return out, batch, attention_ref(
            q, self.cache, table, starts, lens, GROUP_SIZE, self.impl.scale, self.impl.sliding_window)


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    if INTERPRET:
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # needs an accelerator
    init_workspace_manager(DEVICE)
    yield
    reset_workspace_manager()


def draw(tokens):
    return (torch.randn(tokens, heads, HEAD_DIM, device=DEVICE).to(DTYPE) for heads in (HEADS * REPEAT, HEADS, HEADS))


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("flash", [True, False])
def test_mixed_step(monkeypatch, flash, window):
    """Decodes, chunks behind earlier context and fresh prompts in one batch; contexts beyond one workspace."""
    layer = Layer(monkeypatch, window, flash)
    before = [40, 70, 50, 90, 0, 0]  # earlier steps of the same requests
    for r, tokens in enumerate(before):
        if tokens:
            layer.step([r], draw(tokens), [tokens], [tokens])
    queries = [1, 1, 20, 10, 17, 5]
    lengths = [b + n for b, n in zip(before, queries, strict=True)]
    out, batch, ref = layer.step([0, 1, 2, 3, 4, 5], draw(sum(queries)), lengths, queries)
    assert batch.num_decodes == 2 and [run.max_seq_len for run in batch.prefills] == [17, 70, 100]
    assert relative_error(out, ref) < HALF_PRECISION


def test_fresh_prompts_between_others(monkeypatch):
    """Their K and V in the workspace are used before gathering for the others overwrites them."""
    layer = Layer(monkeypatch, None, flash=True)
    layer.step([1], draw(30), [30], [30])
    layer.impl.prefill.compiled = False
    queries, lengths = [12, 9, 20, 5], [12, 39, 20, 5]
    for compiled in (False, True):  # the first call gathers for fresh prompts too
        out, batch, ref = layer.step([0, 1, 2, 3], draw(sum(queries)), lengths, queries)
        assert [(run.fresh, run.rows.start) for run in batch.prefills] == [(True, 0), (True, 21), (False, 12)]
        assert relative_error(out, ref) < HALF_PRECISION, compiled


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("chunks", [[30, 1, 59], [64, 16, 10], [89, 1]], ids=str)
def test_chunks_and_prefix_hits_equal_one_step(monkeypatch, flash, chunks):
    """A prompt in chunks, or whose first chunk another request has stored, gives what it gives in one step."""
    layer, tokens = Layer(monkeypatch, None, flash), 90
    q, key, value = draw(tokens)
    whole = layer.step([0], (q, key, value), [tokens], [tokens])[0]
    start, parts = 0, []
    for n in chunks:
        part = slice(start, start + n)
        parts.append(layer.step([1], (q[part], key[part], value[part]), [start + n], [n])[0])
        start += n
    torch.testing.assert_close(torch.cat(parts), whole, rtol=4e-3, atol=4e-3)
    layer.table[2, : tokens // BLOCK] = layer.table[0, : tokens // BLOCK]  # a prefix hit of full pages
    rest = slice(tokens // BLOCK * BLOCK, tokens)
    hit = layer.step([2], (q[rest], key[rest], value[rest]), [tokens], [rest.stop - rest.start])[0]
    torch.testing.assert_close(hit, whole[rest], rtol=4e-3, atol=4e-3)


def test_float32_models_prefill_from_the_pages(monkeypatch):
    log = []
    monkeypatch.setattr(prefill.logger, "warning_once", lambda text, *args: log.append(text % args))
    config = engine_config()
    config.model_config.dtype = torch.float32
    assert prefill.choose(config, HEADS, HEAD_DIM) is prefill.paged_prefill
    assert "slower than FlashAttention: FlashAttention has no kernel for torch.float32" in log[0]
