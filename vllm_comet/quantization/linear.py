# SPDX-License-Identifier: Apache-2.0
"""CometLinearMethod: loads a COMET linear layer through vLLM's parameter classes and runs it as W4Ax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from vllm_comet import checkpoint as ck
from vllm_comet.kernels.linear import LinearWeight, make_linear_kernel
from vllm_comet.quantization.parameters import check_loaded, create_parameters
from vllm_comet.settings import Settings

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below "vllm"
DUMMY_INT8_SHARE = 0.16
"""Share of INT8 blocks of ``--load-format dummy``: the calibrator's default."""
_compiled: set[tuple] = set()
"""Shapes and settings whose kernels this process has compiled."""


@register_weight_loader_v2_supported_method
class CometLinearMethod(LinearMethodBase):
    """4-bit weights with two-level integer scales, activations quantised per token in an INT4 and an INT8 segment."""

    def __init__(self, fmt: ck.CometFormat, prefix: str, settings: Settings) -> None:
        self.format = fmt
        self.prefix = prefix
        self.low_bits = _low_bits(settings.activations)

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        tp = input_size // k
        if tp > 1 and k % ck.BLOCK:
            raise ck.CheckpointError(
                f"{self.prefix}: {input_size} input channels over tensor-parallel size {tp} leave {k} a rank, no "
                f"multiple of {ck.BLOCK}. Use a tensor-parallel size that divides {input_size} / {ck.BLOCK}, or 1."
            )
        weight_loader: Callable[..., None] = extra["weight_loader"]
        create_parameters(layer, self.prefix, n, k, self.format.group_size, weight_loader)
        layer.comet_parts = len(output_partition_sizes)
        layer.comet_tp = tp

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not hasattr(layer, ck.WEIGHT_PACKED):
            return  # called again without a reload
        if get_current_vllm_config().load_config.load_format == "dummy":
            _fill_dummy(layer, permuted=not self.prefix.endswith("down_proj"))
        else:
            check_loaded(layer, self.prefix, layer.comet_parts, optional=(ck.INPUT_PERM,))
        tensors = {name: getattr(layer, name) for name in ck.COMET_SUFFIXES if hasattr(layer, name)}
        perm = self._local_permutation(layer, tensors[ck.INPUT_PERM])
        values = {name: parameter.data for name, parameter in tensors.items()}
        ck.check_values(values, self.prefix, 8 * values[ck.WEIGHT_PACKED].shape[1])
        for name in tensors:
            delattr(layer, name)
        weight = LinearWeight(
            values[ck.WEIGHT_PACKED], values[ck.WEIGHT_SCALE], values.get(ck.WEIGHT_GROUP_SCALE),
            self.format.group_size, values[ck.ACT_BITS_NAME], perm,
        )
        layer.comet_kernel = make_linear_kernel(weight, self.low_bits)
        layer.qweight = layer.comet_kernel.scale  # under this name vLLM's LoRA layers look for the device
        if weight.packed.device.type == "cuda":
            self._compile_kernels_once(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dim() == 2:  # without reshapes, so that the compile pass of fusion.py sees who makes x
            return layer.comet_kernel(x, bias)
        y = layer.comet_kernel(x.reshape(-1, x.shape[-1]), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _compile_kernels_once(self, layer: torch.nn.Module) -> None:
        """Layers of one shape share their kernels; the first of them compiles what the engine's batches can need."""
        kernel, bias, config = layer.comet_kernel, getattr(layer, "bias", None), get_current_vllm_config()
        tokens, dtype = config.scheduler_config.max_num_batched_tokens, config.model_config.dtype
        key = (kernel.n, kernel.k, kernel.group_size, kernel.split in (0, kernel.k), kernel.perm is None, self.low_bits,
               bias is None, tokens, dtype)
        if key not in _compiled:
            _compiled.add(key)
            kernel.compile_kernels(tokens, bias, dtype)

    def _local_permutation(self, layer: torch.nn.Module, parameter: Any) -> torch.Tensor | None:
        """The permutation within this rank's slice of K, or None if the checkpoint has none for this layer."""
        if not parameter.comet_loaded:
            return None
        perm = parameter.data
        if layer.comet_tp > 1:
            perm = perm - parameter.tp_rank * perm.numel()
        try:
            ck.check_permutation(perm, 1, f"{self.prefix}.{ck.INPUT_PERM}")
        except ck.CheckpointError as error:
            if layer.comet_tp == 1:
                raise
            raise ck.CheckpointError(
                f"{self.prefix}: this checkpoint's channel order allows tensor-parallel size "
                f"{self.format.tensor_parallel} and its divisors, not {layer.comet_tp}. Serve with one of those, or "
                f"calibrate again with --tensor-parallel {layer.comet_tp}. ({error})"
            ) from None
        return perm


def _low_bits(activations: str) -> int:
    """Bits of the INT4 segment at run time. ``auto`` is INT8 everywhere: no kernel here issues INT4 tensor-core
    instructions yet, and INT4 values on INT8 units take the same time at a lower accuracy."""
    if activations == "auto":
        logger.info_once("COMET activations: auto → int8 (W4A8); 4-bit blocks would not be faster on this device.")
        return 8
    logger.info_once("COMET activations: %s.", activations)
    return 4 if activations == "mixed" else 8


def _fill_dummy(layer: torch.nn.Module, permuted: bool) -> None:
    """Valid random contents for ``--load-format dummy`` (vLLM fills only floating-point parameters).

    permuted: the calibrator gives such a layer an ``input_perm``; it folds that of down_proj into gate and up.
    """
    generator = torch.Generator(device=layer.weight_packed.device).manual_seed(0)
    layer.weight_packed.data.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.weight_scale.data.uniform_(1e-4, 1e-3, generator=generator)
    if hasattr(layer, ck.WEIGHT_GROUP_SCALE):
        layer.weight_group_scale.data.random_(1, 17, generator=generator)
    blocks = layer.act_bits.numel()
    layer.act_bits.data.fill_(4)
    layer.act_bits.data[blocks - round(DUMMY_INT8_SHARE * blocks):] = 8
    if permuted:
        perm = layer.input_perm
        torch.randperm(perm.numel(), generator=generator, out=perm.data)
        perm.data += perm.tp_rank * perm.numel() if layer.comet_tp > 1 else 0
        perm.comet_loaded.add(None)
