# SPDX-License-Identifier: Apache-2.0
"""Prefill inside vLLM: FlashAttention over K and V dequantised to a workspace, or the kernel that reads the pages.

Both see the values that the pages hold. FlashAttention is several times faster: dequantising costs by the token,
attention by tokens times context. The workspace is vLLM's, shared by all layers and counted before vLLM sizes the KV
cache; it holds any one request. Where a step's requests don't fit together, they take turns in runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_prefill_chunks
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_comet.kernels import kv4_prefill

logger = init_logger(f"vllm.{__name__}")


class PrefillRun(NamedTuple):
    """Consecutive requests of a batch whose K and V fit in the workspace together."""

    rows: slice  # query tokens in the batch
    block_table: torch.Tensor  # int32 [R, P]
    seq_lens: torch.Tensor  # int32 [R], tokens in the cache including this step's
    query_start_loc: torch.Tensor  # int32 [R + 1], from 0
    key_start_loc: torch.Tensor  # int32 [R + 1], running sum of seq_lens
    max_query_len: int
    max_seq_len: int


def workspace_tokens(config: VllmConfig) -> int:
    """Tokens the workspace holds: the longest request, or a whole step of fresh prompts."""
    return max(config.model_config.max_model_len, config.scheduler_config.max_num_batched_tokens)


def split(common: CommonAttentionMetadata, first: int, capacity: int) -> list[PrefillRun]:
    """Requests ``first`` and up of a batch, in runs of at most ``capacity`` tokens of context; no device sync."""
    lengths, starts = common.seq_lens_cpu_upper_bound, common.query_start_loc_cpu  # lengths are exact for prefills
    if lengths is None:
        raise RuntimeError("COMET attention needs vLLM's seq_lens_cpu_upper_bound, which this model runner leaves out.")
    runs = []
    for begin, end in split_prefill_chunks(lengths[first:], capacity, first):
        seq_lens = common.seq_lens[begin:end]
        key_start_loc = torch.zeros(end - begin + 1, dtype=torch.int32, device=seq_lens.device)
        torch.cumsum(seq_lens, 0, dtype=torch.int32, out=key_start_loc[1:])
        rows = slice(int(starts[begin]), int(starts[end]))
        runs.append(PrefillRun(
            rows, common.block_table_tensor[begin:end], seq_lens,
            common.query_start_loc[begin : end + 1] - rows.start, key_start_loc,
            max_query_len=int(starts[begin : end + 1].diff().max()), max_seq_len=int(lengths[begin:end].max()),
        ))  # fmt: skip
    return runs


class FlashPrefill:
    """vLLM's FlashAttention for one layer's heads, and the shape of its part of the workspace."""

    def __init__(self, flash: Callable[..., Any], tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.flash = flash
        self.workspace_spec = ((2, tokens, num_kv_heads, head_dim), dtype)
        current_workspace_manager().get_simultaneous(self.workspace_spec)  # vLLM allows no growth after warming up

    def __call__(
        self, q: torch.Tensor, cache: torch.Tensor, run: PrefillRun, group_size: int, scale: float,
        window: int | None, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the run's queries ``[T, Hq, D]`` into ``out``; arguments as in ``kv4_prefill.prefill``."""
        (workspace,) = current_workspace_manager().get_simultaneous(self.workspace_spec)
        kv4_prefill.prefill_flash(
            self.flash, q, cache, run.block_table, run.query_start_loc, run.key_start_loc, run.max_query_len,
            run.max_seq_len, group_size, scale, window, out, workspace)


def paged_prefill(
    q: torch.Tensor, cache: torch.Tensor, run: PrefillRun, group_size: int, scale: float, window: int | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """``FlashPrefill`` without FlashAttention and without a workspace."""
    kv4_prefill.prefill(q, cache, run.block_table, run.query_start_loc, run.seq_lens, run.max_query_len, group_size,
                        scale, window, out)


def choose(config: VllmConfig, num_kv_heads: int, head_dim: int) -> Callable[..., None]:
    """``FlashPrefill`` where vLLM's FlashAttention takes the model's heads and dtype, else ``paged_prefill``."""
    dtype, tokens = config.model_config.dtype, workspace_tokens(config)
    flash, reason = _flash_attention(head_dim, dtype)
    if flash is None:
        logger.warning_once("COMET prefill reads the 4-bit pages directly, slower than FlashAttention: %s.", reason)
        return paged_prefill
    prefill = FlashPrefill(flash, tokens, num_kv_heads, head_dim, dtype)
    logger.info_once("COMET prefill: %s over K and V dequantised to a workspace of %d tokens, %d MiB.", reason, tokens,
                     2 * tokens * num_kv_heads * head_dim * dtype.itemsize >> 20)
    return prefill


def _flash_attention(head_dim: int, dtype: torch.dtype) -> tuple[Callable[..., Any] | None, str]:
    """vLLM's ``flash_attn_varlen_func`` with its version bound, and its name; or None and the reason."""
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"FlashAttention has no kernel for {dtype}"
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError as error:
        return None, f"vLLM's FlashAttention can't be imported ({error})"
    version = get_flash_attn_version(head_size=head_dim)
    if version is None:
        return None, "vLLM has no FlashAttention for this device"
    return functools.partial(flash_attn_varlen_func, fa_version=version), f"FlashAttention {version}"
