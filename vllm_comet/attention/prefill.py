# SPDX-License-Identifier: Apache-2.0
"""Prefill inside vLLM: FlashAttention over K and V dequantised to a workspace, or the kernel that reads the pages.

Both see the values that the pages hold. FlashAttention is several times faster: dequantising costs by the token,
attention by tokens times context. The workspace is vLLM's, shared by all layers and counted before vLLM sizes the KV
cache; it holds any one request and any one step. For fresh prompts, whose whole context is this step's, the kernel that
stores K and V fills it; the others' context is gathered from the pages. Where those don't fit together, they take
turns in runs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
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
    fresh: bool  # the whole context is this step's
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
    """Requests ``first`` and up of a batch, in runs of at most ``capacity`` tokens of context; no device sync.

    Runs of fresh prompts come first, as gathering for the others overwrites what the store left in the workspace.
    """
    lengths, starts = common.seq_lens_cpu_upper_bound, common.query_start_loc_cpu  # lengths are exact for prefills
    if lengths is None:
        raise RuntimeError("COMET attention needs vLLM's seq_lens_cpu_upper_bound, which this model runner leaves out.")
    queries = starts.diff()
    runs = []
    for begin, end, fresh in sorted(_bounds(lengths, queries, first, capacity), key=lambda bounds: not bounds[2]):
        seq_lens, rows = common.seq_lens[begin:end], slice(int(starts[begin]), int(starts[end]))
        query_start_loc = common.query_start_loc[begin : end + 1] - rows.start
        runs.append(PrefillRun(
            rows, fresh, common.block_table_tensor[begin:end], seq_lens, query_start_loc,
            key_start_loc=query_start_loc if fresh else torch.nn.functional.pad(
                seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
            max_query_len=int(queries[begin:end].max()), max_seq_len=int(lengths[begin:end].max()),
        ))  # fmt: skip
    return runs


def _bounds(
    lengths: torch.Tensor, queries: torch.Tensor, first: int, capacity: int
) -> Iterator[tuple[int, int, bool]]:
    """First and end of runs of consecutive requests, all fresh or none; a step's fresh prompts fit in any case."""
    fresh = (lengths == queries).tolist()
    begin = first
    for is_fresh, group in itertools.groupby(fresh[first:]):
        end = begin + len(list(group))
        if is_fresh:
            yield begin, end, True
        else:
            yield from ((*bounds, False) for bounds in split_prefill_chunks(lengths[begin:end], capacity, begin))
        begin = end


class FlashPrefill:
    """vLLM's FlashAttention for one layer's heads, and the shape of its part of the workspace."""

    def __init__(self, flash: Callable[..., Any], tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.flash = flash
        self.workspace_spec = ((2, tokens, num_kv_heads, head_dim), dtype)
        self.compiled = False
        self.workspace()  # vLLM allows no growth after warming up

    def workspace(self) -> torch.Tensor:
        """K and V ``[2, tokens, H, D]``; the same memory in every layer."""
        return current_workspace_manager().get_simultaneous(self.workspace_spec)[0]

    def __call__(
        self, q: torch.Tensor, cache: torch.Tensor, run: PrefillRun, group_size: int, scale: float,
        window: int | None, out: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    ) -> None:  # fmt: skip
        """Attention of the run's queries ``[T, Hq, D]`` into ``out``; arguments as in ``kv4_prefill.prefill``.

        key, value: the halves of the workspace, which hold the step's own K̂ and V̂ if the run is fresh.
        """
        if run.fresh:
            key, value = key[run.rows], value[run.rows]
        if not (run.fresh and self.compiled):  # vLLM warms up with fresh prompts only: the first call gathers as well
            kv4_prefill.gather_kv(cache, run.block_table, run.key_start_loc, run.max_seq_len, group_size, key, value)
            self.compiled = True
        kv4_prefill.flash_attention(
            self.flash, q, key, value, run.query_start_loc, run.key_start_loc, run.max_query_len, run.max_seq_len,
            scale, window, out)


def paged_prefill(
    q: torch.Tensor, cache: torch.Tensor, run: PrefillRun, group_size: int, scale: float, window: int | None,
    out: torch.Tensor, *_: None,
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
