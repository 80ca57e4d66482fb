# SPDX-License-Identifier: Apache-2.0
"""CometConfig: what vLLM asks about a COMET checkpoint, and which method serves which layer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from vllm_comet.checkpoint import K_OFFSET, QUANT_METHOD, CheckpointError, CometFormat, verify_checkpoint
from vllm_comet.settings import Settings

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below "vllm"
ADVISED_GRAPH_SIZE = 2048
"""Tokens; what it gains: ``serve-trace-nvidia-h100-80gb-hbm3.json`` beside ``serve-nvidia-h100-80gb-hbm3.json``."""


@register_quantization_config(QUANT_METHOD)
class CometConfig(QuantizationConfig):
    """A COMET checkpoint's ``quantization_config``; see :mod:`vllm_comet.checkpoint` for the format."""

    def __init__(self, fmt: CometFormat | None = None) -> None:
        super().__init__()
        if fmt is None:
            raise CheckpointError("--quantization comet needs a COMET checkpoint, and this model has no "
                                  "quantization_config. Make one with: comet-calibrate MODEL --out DIR")
        self.format = fmt
        self.ignore = list(fmt.ignore)

    def __repr__(self) -> str:
        return f"CometConfig({self.format})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CometConfig:
        return cls(CometFormat.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Verify a local checkpoint before anything is loaded (vLLM calls this once the model is known)."""
        directory = Path(model_name)
        if Settings.load().verify and directory.is_dir() and any(directory.glob("*.safetensors")):
            _verify_once(directory.resolve())

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """vLLM's attention layer lies one level below the module that a checkpoint names."""
        return WeightsMapper(orig_to_new_suffix={f".self_attn.{K_OFFSET}": f".self_attn.attn.{K_OFFSET}"})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            if should_ignore_layer(prefix, self.ignore, self.packed_modules_mapping):
                return UnquantizedLinearMethod()
            from vllm_comet.quantization.fusion import install_fusion
            from vllm_comet.quantization.linear import CometLinearMethod

            vllm_config = get_current_vllm_config()
            install_fusion(vllm_config)
            _advise_graph_size(vllm_config)
            return CometLinearMethod(self.format, prefix, Settings.load(vllm_config.additional_config))
        if isinstance(layer, (Attention, MLAAttention)) and self.format.kv_cache is not None:
            from vllm_comet.attention.select import add_k_offset, select_kv_cache

            if self.format.kv_cache.k_offset and isinstance(layer, Attention):
                add_k_offset(layer)
            select_kv_cache(layer, prefix, self.format.kv_cache)
        if isinstance(layer, RoutedExperts):
            raise CheckpointError(f"{prefix}: mixture-of-experts layers are not supported by vllm-comet. Serve the "
                                  "original checkpoint.")
        return None


@functools.lru_cache
def _verify_once(directory: Path) -> None:
    summary = verify_checkpoint(directory)
    logger.info("COMET checkpoint %s verified: %d quantised layers, %.2f GB, mean INT8 share %.1f %%.",
                directory.name, len(summary.layers), summary.num_bytes / 1e9, 100 * summary.int8_share)


def _advise_graph_size(vllm_config: VllmConfig) -> None:
    """Say once that longer steps than CUDA graphs cover wait for the host; vLLM alone can choose that size."""
    compilation = vllm_config.compilation_config
    if not current_platform.is_cuda_alike() or compilation.cudagraph_mode.mixed_mode() == CUDAGraphMode.NONE:
        return  # steps with prompts have no graphs of any size
    largest = compilation.max_cudagraph_capture_size or 0
    advised = min(ADVISED_GRAPH_SIZE, vllm_config.scheduler_config.max_num_batched_tokens)
    if 0 < largest < advised:
        logger.info_once("COMET: steps of more than %d tokens run without CUDA graphs and wait for the host. "
                         "--max-cudagraph-capture-size %d shortens the time to the first token under load.",
                         largest, advised)
