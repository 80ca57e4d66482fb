# SPDX-License-Identifier: Apache-2.0
"""CometAttentionBackend: the 4-bit KV cache as a vLLM attention backend.

Declares the page (``kernels/kv4_cache.py``) to vLLM, which then plans, logs and allocates it, carries each batch's
metadata, and hands both to the device's kernels. K and V are quantised when written and attention reads only what is
written, also for the tokens of the current step, so chunked prefill, prefix hits, preemption and rollback see the
same values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_comet.attention import prefill
from vllm_comet.checkpoint import K_OFFSET
from vllm_comet.kernels import kv4_cache, kv4_cpu, kv4_decode

BLOCK_SIZE_MULTIPLE = 16


class CometAttentionBackend(AttentionBackend):
    """Subclassed per KV group size by :func:`backend_for`; the class itself only says what is supported."""

    forward_includes_kv_cache_update = True  # one call from Python a layer, not two, wherever no CUDA graph covers it
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    group_size: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        return "COMET"

    @staticmethod
    def get_impl_cls() -> type[CometAttentionImpl]:
        return CometAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CometMetadataBuilder]:
        return CometMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A page's planes lie in the contiguous [N, C] bytes of one (block, head).
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if not cls.group_size:
            raise ValueError("--attention-backend COMET needs a COMET checkpoint with a kv_cache section.")
        if spec.state_content_bytes is not None:
            return spec
        content = kv4_cache.bytes_per_token(spec.head_size, cls.group_size)
        return replace(spec, dtype=torch.uint8, state_content_bytes=content)


@functools.cache
def backend_for(group_size: int) -> type[CometAttentionBackend]:
    """The backend class whose pages have ``group_size`` channels per scale (vLLM wants a class, not an object)."""
    impl = type(f"CometAttentionImplG{group_size}", (CometAttentionImpl,), {"group_size": group_size})
    members = {"group_size": group_size, "get_impl_cls": staticmethod(lambda: impl)}
    return type(f"CometAttentionBackendG{group_size}", (CometAttentionBackend,), members)


@dataclass
class CometAttentionMetadata(AttentionMetadata):
    """One batch: R requests, T tokens; request r owns query rows ``query_start_loc[r] .. query_start_loc[r+1]``.

    The first ``num_decodes`` requests have one query token each.
    """

    num_actual_tokens: int
    num_decodes: int
    query_start_loc: torch.Tensor  # int32 [R + 1]
    seq_lens: torch.Tensor  # int32 [R], tokens in the cache including this step's
    block_table: torch.Tensor  # int32 [R, P]
    slot_mapping: torch.Tensor  # int64 [T or more], −1 where the batch is padded
    prefills: list[prefill.PrefillRun] = field(default_factory=list)  # the other requests; GPU only
    scratch: dict[int | None, kv4_decode.DecodeScratch] = field(default_factory=dict)  # by sliding window; GPU only
    workspace: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None)  # K and V for FlashAttention


class CometMetadataBuilder(AttentionMetadataBuilder[CometAttentionMetadata]):
    """Splits a batch in decodes and prefills, which vLLM puts in that order, and plans the decodes on the GPU."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.head_dim = kv_cache_spec.head_size
        self.workspace_tokens = prefill.workspace_tokens(vllm_config)
        self.scratch: dict[int | None, kv4_decode.DecodeScratch] = {}
        self.flash: prefill.FlashPrefill | None = None
        if device.type == "cuda":
            layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
            requests = vllm_config.scheduler_config.max_num_seqs
            for layer in layers:
                if isinstance(layer.impl.prefill, prefill.FlashPrefill):
                    self.flash = layer.impl.prefill
                if layer.sliding_window not in self.scratch:
                    self.scratch[layer.sliding_window] = kv4_decode.make_scratch(
                        requests, layer.num_heads, layer.num_kv_heads, self.head_dim, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CometAttentionMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("COMET attention is causal only; serve this model with --kv-cache-dtype bfloat16.")
        decodes, prefills, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        for window, scratch in self.scratch.items() if decodes else ():
            kv4_decode.plan(common.seq_lens[:decodes], window, self.head_dim, scratch)
        runs = prefill.split(common, decodes, self.workspace_tokens) if self.scratch and prefills else []
        workspace = self.flash.workspace().unbind() if self.flash and runs else (None, None)
        return CometAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=decodes,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            prefills=runs,
            scratch=self.scratch,
            workspace=workspace,
        )


class CometAttentionImpl(AttentionImpl[CometAttentionMetadata]):
    """Store and attend on 4-bit pages; ``kv_cache`` is uint8 ``[B, H, block_size, C]`` (``kernels/kv4_cache.py``)."""

    group_size: ClassVar[int] = 0

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        # Kept for attention.select, which refuses what the kernels don't do.
        self.alibi_slopes = alibi_slopes
        self.logits_soft_cap = logits_soft_cap
        self.prefill = prefill.paged_prefill
        if current_platform.is_cuda():
            self.prefill = prefill.choose(get_current_vllm_config(), self.num_kv_heads, head_size)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V per token and KV head."""
        return kv4_cache.bytes_per_token(self.head_size, self.group_size)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CometAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store ``key``, ``value`` ``[T, H, D]``, then attend with ``query`` ``[T, Hq, D]`` to the pages."""
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        k_offset = getattr(layer, K_OFFSET, None)
        if kv_cache.is_cuda:
            self._forward_gpu(query, key, value, k_offset, kv_cache, attn_metadata, output)
        else:
            tokens, slots = attn_metadata.num_actual_tokens, attn_metadata.slot_mapping
            kv4_cache.store_kv_ref(key[: len(slots)], value[: len(slots)], kv_cache, slots, self.group_size, k_offset)
            kv4_cpu.attention(
                query[:tokens], kv_cache, attn_metadata.block_table, attn_metadata.query_start_loc,
                attn_metadata.seq_lens, self.group_size, self.scale, self.sliding_window, output[:tokens])
        return output

    def _forward_gpu(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, k_offset: torch.Tensor | None,
        kv_cache: torch.Tensor, batch: CometAttentionMetadata, output: torch.Tensor,
    ) -> None:  # fmt: skip
        n, window = batch.num_decodes, self.sliding_window
        fresh = bool(batch.prefills) and batch.prefills[0].fresh
        kv4_cache.store_kv(key, value, kv_cache, batch.slot_mapping, self.group_size,
                           *(batch.workspace if fresh else (None, None)), k_offset)
        if n:
            kv4_decode.decode(
                query[:n], kv_cache, batch.block_table[:n], self.group_size, self.scale, window, output[:n],
                batch.scratch[window])
        for run in batch.prefills:
            self.prefill(query[run.rows], kv_cache, run, self.group_size, self.scale, window, output[run.rows],
                         *batch.workspace)
