# SPDX-License-Identifier: Apache-2.0
"""Decide, layer by layer, whether attention runs on the checkpoint's 4-bit KV cache.

The checkpoint switches it on without a flag. A user's explicit choice (``--kv-cache-dtype``, another
``--attention-backend``) wins and is logged; what the user asked for and can't be had is an error; a layer the backend
can't serve falls back to vLLM's cache in the model's dtype with one log line that says why.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from vllm_comet.attention.backend import CometAttentionImpl, backend_for
from vllm_comet.checkpoint import K_OFFSET, CheckpointError, KVCacheFormat
from vllm_comet.kernels.kv4_decode import MAX_GROUP

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below "vllm"
GPU_HEAD_DIMS = (64, 96, 128, 256)
"""Head sizes that the GPU kernels are tested with."""


def select_kv_cache(layer: torch.nn.Module, prefix: str, fmt: KVCacheFormat) -> None:
    """Give ``layer`` (an attention layer vLLM has just built) the 4-bit backend, or leave it as it is and log why.

    vLLM calls this at construction and once more after loading; the second call changes nothing.
    """
    if isinstance(getattr(layer, "impl", None), CometAttentionImpl) and layer.impl.group_size:
        return
    config = get_current_vllm_config()
    choice = _user_choice(config)
    if choice:
        logger.info_once("COMET 4-bit KV cache is off: %s.", choice)
        return
    reason = _unsupported(layer, config, fmt)
    if reason and _is_comet(config.attention_config.backend):
        raise ValueError(f"--attention-backend COMET can't serve {prefix}: {reason}.")
    if reason and getattr(layer, "kv_sharing_target_layer_name", None):
        raise CheckpointError(f"{prefix}: {reason}. Serve with --kv-cache-dtype bfloat16.")
    if reason:
        logger.warning_once("COMET 4-bit KV cache is off for some layers, they use the model's dtype: %s.", reason)
        return
    old: Any = layer.impl
    layer.attn_backend = backend_for(fmt.group_size)
    layer.impl = layer.attn_backend.get_impl_cls()(
        layer.num_heads, layer.head_size, old.scale, layer.num_kv_heads, None, layer.sliding_window,
        layer.kv_cache_dtype, None, layer.attn_type, None,
    )
    if not fmt.k_offset:
        logger.warning_once("COMET: this checkpoint's 4-bit KV cache has no offset for K. Models with a bias in k_proj "
                            "(Qwen2, Qwen2.5) lose all accuracy without it, others a little: calibrate the model again "
                            "or, if it has such a bias, serve with --kv-cache-dtype bfloat16.")
    size = layer.impl.bytes_per_token
    logger.info_once("COMET 4-bit KV cache: %d bytes per token and KV head, %.2fx less than 16 bits (group size %d).",
                     size, 4 * layer.head_size / size, fmt.group_size)


def add_k_offset(layer: torch.nn.Module) -> None:
    """Give ``layer`` the parameter that a checkpoint's ``k_offset`` is loaded into: float32 ``[KV heads here, D]``.

    A layer whose cache is not ours has it too, and leaves it unread: subtracted or not, attention is the same.
    """
    if hasattr(layer, K_OFFSET):
        return
    offset = torch.nn.Parameter(torch.zeros(layer.num_kv_heads, layer.head_size, dtype=torch.float32),
                                requires_grad=False)
    set_weight_attrs(offset, {"weight_loader": _load_k_offset})
    layer.register_parameter(K_OFFSET, offset)


def _load_k_offset(param: torch.nn.Parameter, loaded: torch.Tensor) -> None:
    """This rank's heads of ``loaded`` ``[KV heads, D]``; ranks beyond the heads share them."""
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if loaded.shape[1:] != param.shape[1:] or len(param) != max(1, len(loaded) // size):
        raise CheckpointError(f"a checkpoint's {K_OFFSET} is {list(loaded.shape)}; its share of this rank must be "
                              f"{list(param.shape)}. Calibrate the model again.")
    first = rank * len(loaded) // size
    param.data.copy_(loaded[first : first + len(param)])


def _is_comet(backend: Any) -> bool:
    return backend is not None and backend.name == "COMET"


def _user_choice(config: VllmConfig) -> str | None:
    """An explicit setting that rules the 4-bit cache out, in words, or None."""
    if config.cache_config.cache_dtype != "auto":
        return f"--kv-cache-dtype {config.cache_config.cache_dtype} was given"
    backend = config.attention_config.backend
    if backend is not None and not _is_comet(backend):
        return f"--attention-backend {backend.name} was given"
    if config.kv_transfer_config is not None:
        return f"KV connector {config.kv_transfer_config.kv_connector} does not know its page layout"
    return None


def _unsupported(layer: Any, config: VllmConfig, fmt: KVCacheFormat) -> str | None:
    """Why the backend can't serve this layer, or None."""
    if isinstance(layer, MLAAttention):
        return "multi-head latent attention has no K and V heads to quantise"
    if layer.attn_type != AttentionType.DECODER:
        return f"attention type {layer.attn_type} is not supported, only decoder self-attention"
    if layer.head_size % fmt.group_size or layer.head_size % 32:
        return f"head_dim {layer.head_size} is not a multiple of the KV group size {fmt.group_size} and of 32"
    if current_platform.is_cuda() and layer.head_size not in GPU_HEAD_DIMS:
        return f"head_dim {layer.head_size} has no GPU kernel; allowed: {GPU_HEAD_DIMS}"
    if current_platform.is_cuda() and layer.num_heads > MAX_GROUP * layer.num_kv_heads:
        return f"{layer.num_heads} query heads over {layer.num_kv_heads} KV heads are more than {MAX_GROUP} per KV head"
    if layer.head_size_v != layer.head_size:
        return f"K and V heads differ in size ({layer.head_size}, {layer.head_size_v})"
    if layer.kv_sharing_target_layer_name is not None:
        return "layers that share another layer's KV cache are not supported"
    if layer.has_sink:
        return "attention sinks are not supported"
    if getattr(layer.impl, "alibi_slopes", None) is not None:
        return "ALiBi is not supported"
    if getattr(layer.impl, "logits_soft_cap", None):
        return "logits soft-capping is not supported"
    if layer.use_mm_prefix:
        return "bidirectional attention over multimodal prefixes is not supported"
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism is not supported"
    return None
